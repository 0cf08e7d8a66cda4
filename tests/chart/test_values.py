"""The chart's values agree with the code and with what its README says. Needs no helm."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import yaml

from control.config import flat_paths
from tests.chart.conftest import CHART, ROOT

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
README = (CHART / "README.md").read_text()

#: keys of a run that are values of their own, or follow from them
OF_THE_CHART = {"task", "spheres", "listen", "insecure", "run_dir", "orphan_timeout"}
#: where spheres are started by control itself
OF_A_LAUNCHER = re.compile(r"launcher|(ray|kubernetes)_.*")


def test_config_takes_the_keys_of_a_run() -> None:
    wanted = {key for key in flat_paths() if key not in OF_THE_CHART and not OF_A_LAUNCHER.fullmatch(key)}
    assert set(SCHEMA["properties"]["config"]["properties"]) == wanted
    for key in OF_THE_CHART:
        assert f"`{key}`" in README


def test_the_schema_has_every_value_and_no_other() -> None:
    def compare(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        if "$ref" in schema:
            schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
        if schema.get("additionalProperties") is not False or path == ".config":
            return
        assert schema["properties"].keys() - {"global", "claims"} == values.keys(), path
        for name, value in values.items():
            if isinstance(value, dict):
                compare(value, schema["properties"][name], f"{path}.{name}")

    compare(VALUES, SCHEMA, "")


def test_the_readme_has_every_value() -> None:
    table = README.partition("\n## Values\n")[2]
    named = set(re.findall(r"[`.*](\w+)`", table))

    def leaves(values: dict[str, Any], path: str) -> list[str]:
        found = []
        for name, value in values.items():
            inner = isinstance(value, dict) and value and name not in {"resources", "behavior"}
            inner = inner and path + name not in {"podSecurityContext", "securityContext"}
            found += leaves(value, f"{path}{name}.") if inner else [path + name]
        return found

    missing = [leaf for leaf in leaves(VALUES, "") if leaf.rpartition(".")[2] not in named]
    assert missing == []


def test_chart_and_project_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]

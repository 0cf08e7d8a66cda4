"""Where helm and kubectl are, and what the chart makes of values."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker" / "helm" / "armillary"
RELEASE = "rel"

Documents = list[dict[str, Any]]
Helm = Callable[..., "subprocess.CompletedProcess[str]"]


class _Reader(yaml.SafeLoader):
    """As Kubernetes reads: 1e3 is a number, and a mapping that has a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key twice: {keys}"
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """What is a number to Kubernetes is quoted where it is a text."""


for kind in (_Reader, _Writer):
    numbers = re.compile(r"([-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+|0o[0-7]+)$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", numbers, list("-+0123456789"))


def read(text: str) -> Documents:
    return [document for document in yaml.load_all(text, _Reader) if document]


def write(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Writer)


def tool(name: str) -> str:
    path = Path(os.environ.get("TOOLS", ROOT / ".tools")) / name
    if not path.exists():
        pytest.skip(f"no {path}: make test-chart gets it, where npm is there")
    return str(path)


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Run helm, away from the user's own settings and clusters."""
    binary = tool("helm")

    def ask(*words: str | Path) -> subprocess.CompletedProcess[str]:
        environ = {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "KUBECONFIG": "/nonexistent"}
        command = [binary, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, env=environ)

    return ask


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., Documents]:
    """Return what the chart makes of a file of ``ci/`` and single values."""
    cache: dict[tuple[str, ...], str] = {}

    def rendered(values: str = "default", *sets: str) -> Documents:
        key = (values, *sets)
        if key not in cache:
            more = [word for one in sets for word in ("--set", one)]
            done = helm("template", RELEASE, CHART, "--values", CHART / "ci" / f"{values}.yaml", *more)
            assert done.returncode == 0, done.stderr
            cache[key] = done.stdout
        return read(cache[key])

    return rendered

"""What the documents say is what there is: links, names, rules, states, limits, and examples in Python.

The bytes of docs/protocol.md and the golden vectors are held to the code by test_vectors.
"""

from __future__ import annotations

import ast
import gzip
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spheres.sampling import Sampler
from spheres.task import data_fingerprint, load_task

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TESTDATA = ROOT / "protos" / "testdata"

#: every page that a reader may open
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docker/README.md")]
PAGES += sorted(DOCS.rglob("*.md"))
#: page -> path below the root
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def fenced(text: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield what follows the language on the opening line, and the code, of each fenced block."""
    for match in re.finditer(rf"^```{language}\b(.*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield match[1].strip(), match[2]


# ---- links and names


def anchors(text: str) -> set[str]:
    """The anchors that headings give, as a viewer of Markdown makes them."""
    headings = re.findall(r"^#+ +(.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    page = NAMES[name]
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
        waiting += [path for link in links if (path := (page.parent / link).resolve()).exists()]
    assert set(PAGES) - reached == set()


def exists(name: str) -> bool:
    """Whether a name in backticks that looks like a file or folder of the project is one; patterns may be used."""
    return any(True for _ in ROOT.glob(name.rstrip("/")))


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name: str) -> None:
    named = set(re.findall(r"`((?:spheres|control|protos|tests|docs|examples|benchmarks)/[\w./*-]*)`", text_of(name)))
    named |= {path for path in re.findall(r"`([\w./-]+)`", text_of(name)) if path.endswith((".toml", ".yaml"))}
    named -= {"run.toml"}  # a reader's own
    assert {path for path in named if not exists(path)} == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_module_that_is_named_exists(name: str) -> None:
    """``spheres.hub`` is a module; of ``control.client.Client`` the module before the last dot has that name."""
    text = re.sub(r"\S*/\S*|spheres\.v1\b\S*", "", text_of(name))  # without paths, and names of protos
    named = set(re.findall(r"\b(?:spheres|control)(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?", text))
    wrong = []
    for dotted in named:
        module, _, attribute = dotted.rpartition(".")
        if is_module(dotted):
            continue
        if not is_module(module) or not hasattr(importlib.import_module(module), attribute):
            wrong.append(dotted)
    assert not wrong


def is_module(dotted: str) -> bool:
    path = ROOT / Path(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def layers(package: str) -> dict[str, int]:
    """Return module -> row of its table in docs/architecture.md, the first row at the top."""
    tables = re.findall(r"(?:^\|.*\n)+", text_of("docs/architecture.md").split("\n## Modules\n", 1)[1], re.MULTILINE)
    found: dict[str, int] = {}
    for number, row in enumerate(tables[("spheres", "control").index(package)].splitlines()[2:]):
        for name in re.findall(r"`([\w.]+)`", row.split("|")[2]):
            if is_module(f"{package}.{name.removeprefix('spheres.')}"):
                found[name.removeprefix("spheres.")] = number
    return found


@pytest.mark.parametrize("package", ["spheres", "control"])
def test_the_architecture_names_every_module_and_imports_go_down(package: str) -> None:
    rows = layers(package)
    modules = {path.name.removesuffix(".py") for path in (ROOT / package).iterdir() if not path.name.startswith("_")}
    modules.discard("py.typed")
    assert modules == rows.keys()
    upward = []
    for path in (ROOT / package).rglob("*.py"):
        importer = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if importer in rows:
            for imported in re.findall(rf"^\s*from {package}\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
                upward += [(importer, imported)] if rows[imported] < rows[importer] else []
    assert not upward


# ---- rules, states, events, errors: the same words as in the code


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    below = text.split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert lines is not None
    cells = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in lines[0].splitlines()]
    return cells[2:]


def test_the_protocol_has_every_rule_and_each_says_what_holds_it() -> None:
    text = text_of("docs/protocol.md")
    found = re.findall(r"^\*\*(N\d+b?)\*\* .*?(?=^\*\*N|^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found == [f"N{n}" for n in range(1, 23)]
    for rule in re.findall(r"^\*\*N\d+\*\* .*?(?=^\*\*N|^#|\Z)", text, re.MULTILINE | re.DOTALL):
        assert re.search(r"\*Held by\* .*`|\*Not yet\*", rule), rule


def test_the_rules_that_code_and_tests_cite_exist() -> None:
    cited = set()
    for folder in ("spheres", "control", "tests", "protos"):
        for path in (ROOT / folder).rglob("*.p[yr]*"):
            if "_pb2" not in path.name:
                cited |= set(re.findall(r"\bN(\d+)b?\b", path.read_text(encoding="utf-8")))
    assert {int(number) for number in cited} <= set(range(1, 23))


def test_states_and_moves_are_those_of_the_code() -> None:
    from control.run_state import MOVES

    rows = rows_of(text_of("docs/architecture.md"), "### States of a run")
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    assert documented == {str(state): {str(to) for to in moves} for state, moves in MOVES.items()}


def test_events_are_those_of_the_code() -> None:
    from control.events import EVENTS

    rows = rows_of(text_of("docs/callbacks.md"), "## Events")
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row[0])] == list(EVENTS)


def test_status_codes_are_those_of_the_table() -> None:
    from spheres import errors
    from spheres.status import code_of

    rows = rows_of(text_of("docs/protocol.md"), "## Status codes")
    for code, names, *_ in rows:
        for name in re.findall(r"`(\w+)`", names):
            cls = getattr(errors, name)
            assert code_of(cls("why"))[0].name == code.strip("`"), name
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    kinds = [*errors.ProtocolError.__subclasses__(), *errors.RefusedError.__subclasses__()]
    assert documented >= {kind.__name__ for kind in kinds}


def test_limits_are_those_of_the_code() -> None:
    from control.config import RunConfig
    from spheres import children, computing, config, grpc_link, parent, status

    text = text_of("docs/protocol.md")
    limits = {row[0].partition(",")[0].replace("`", ""): row[1] for row in rows_of(text, "## Limits")}
    assert limits["any message on Work and Heartbeat"].startswith(f"{config.MAX_MESSAGE_BYTES:,} bytes")
    assert limits["first message of a link"] == f"within {children.HELLO_SECONDS:g} s"
    assert limits["reports on one heartbeat"] == f"{children.MOST_REPORTS}"
    assert limits["sphere_id"].startswith(f"{children._LONGEST_NAME} ")
    assert limits["details of a status"] == f"{status._MOST_DETAILS:,} bytes"
    assert f"give it {parent.WELCOME_SECONDS:g} seconds" in text
    assert f"within\n{children.HELLO_SECONDS:g} seconds" in text or f"within {children.HELLO_SECONDS:g} seconds" in text
    assert f"takes more than {grpc_link.DIAL_SECONDS:g} s has failed" in text
    assert f"compute nothing for {computing.ASIDE_SECONDS:g} s," in text
    assert f"at most for {computing.LONGEST_ASIDE:g} s" in text
    sizes = RunConfig.model_json_schema()["properties"]
    assert limits["chunk_bytes"].startswith(
        f"{sizes['chunk_bytes']['minimum']:,} to {sizes['chunk_bytes']['maximum']:,},"
    )
    assert limits["microbatches_count"] == f"{sizes['microbatches']['maximum']:,}"


def test_phases_are_those_of_the_code() -> None:
    from spheres.phases import PHASES

    text = text_of("docs/protocol.md")
    documented = {name for row in rows_of(text, "### Phases") for name in re.findall(r"`(\w+)`", row[0])}
    assert documented == set(PHASES) - {"optimizer"}
    assert "`optimizer` is control's alone" in text


def test_digits_for_other_languages_is_the_task() -> None:
    """The section's recipe, done here in float64, against what spheres compute."""
    section = text_of("docs/clients.md").split("## The task digits, for other languages\n", 1)[1].split("\n## ", 1)[0]
    task = load_task("digits", {"hidden": "(7, 5)"})
    assert f"digits: `{data_fingerprint(task)}`" in section
    lines = gzip.decompress((ROOT / "spheres/tasks/data/digits.csv.gz").read_bytes()).decode().split()
    rows = np.array([[int(number) for number in line.split(",")] for line in lines])
    order = Sampler(seed=0, size=1797, batch_size=1797, microbatches=1).microbatch(0, 0)
    for row, places in zip(re.findall(r"^\| \w+ 0 to 4 \|.*$", section, re.MULTILINE), (0, 1437), strict=True):
        shown = [[int(number) for number in cell.split()] for cell in row.split("|")[2:4]]
        at = order[places : places + 5]
        assert shown == [at.tolist(), rows[at, 64].tolist()]

    generator = np.random.default_rng(3)
    weights = {name: array + np.float32(0.1) for name, array in task.init_weights(generator).items()}
    assert [(name, array.shape) for name, array in weights.items()] == [
        ("layer0.weight", (64, 7)), ("layer0.bias", (7,)), ("layer1.weight", (7, 5)), ("layer1.bias", (5,)),
        ("layer2.weight", (5, 10)), ("layer2.bias", (10,)),
    ]  # fmt: skip
    samples = np.array([0, 1, 5, 900, 1436])
    out = {name: np.zeros_like(array) for name, array in weights.items()}
    sums = task.gradient(weights, samples, generator, out)
    digits, x = rows[order[samples], 64], [rows[order[samples], :64] / 16]
    for n in range(3):
        z = x[n] @ weights[f"layer{n}.weight"].astype(float) + weights[f"layer{n}.bias"]
        x.append(np.maximum(z, 0))
    z -= z.max(axis=1, keepdims=True)
    losses = np.log(np.exp(z).sum(axis=1)) - z[range(5), digits]
    assert sums.loss == pytest.approx(losses.sum(), rel=1e-5)
    assert (sums.count, sums.metrics) == (5, {"accuracy": float((z.argmax(axis=1) == digits).sum())})
    delta = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - (np.arange(10) == digits[:, None])
    for n in (2, 1, 0):
        np.testing.assert_allclose(out[f"layer{n}.weight"], x[n].T @ delta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(out[f"layer{n}.bias"], delta.sum(axis=0), rtol=1e-4, atol=1e-5)
        delta = np.where(x[n] > 0, delta @ weights[f"layer{n}.weight"].T, 0)

    zeros = {name: np.zeros_like(array) for name, array in weights.items()}
    assert task.gradient(zeros, np.array([0, 1]), generator, out).loss == pytest.approx(4.60517, abs=1e-5)
    assert out["layer2.bias"] == pytest.approx([-0.8 if n in (6, 8) else 0.2 for n in range(10)])


# ---- examples in Python


CODE = [(name, number) for name in NAMES for number, _ in enumerate(fenced(text_of(name), "python"))]


@pytest.mark.parametrize(("name", "number"), CODE)
def test_examples_in_python_compile_and_import_what_exists(name: str, number: int) -> None:
    _, code = list(fenced(text_of(name), "python"))[number]
    # with await at the top level, as in a notebook
    compile(code, f"{name}, block {number + 1}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for module, names in re.findall(r"^from ((?:spheres|control)[\w.]*) import ([\w, ]+)", code, re.MULTILINE):
        imported = importlib.import_module(module)
        for one in names.split(","):
            assert hasattr(imported, one.strip()), f"{module} has no {one.strip()}"


@pytest.mark.parametrize("name", ["README.md", "docs/tasks.md"])
def test_the_task_that_is_shown_learns(name: str) -> None:
    from control.config import RunConfig
    from control.reference import reference

    defined: dict[str, Any] = {}
    exec(next(fenced(text_of(name), "python"))[1], defined)
    config = RunConfig(task="line:Line", steps=40)
    losses = reference(defined["Line"](), config).losses
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("name", ["docs/tasks.md", "docs/callbacks.md", "docs/python.md"])
def test_pages_for_programmers_have_examples(name: str) -> None:
    assert any(page == name for page, _ in CODE)

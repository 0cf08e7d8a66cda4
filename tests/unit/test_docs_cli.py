"""``docs/cli.md`` is held to the code: what the code has is there, and what is there the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from control.cli import app
from control.cli.start import panels
from control.config_sources import allowed, default_text, help_text, load_config
from spheres import errors
from spheres.cli import make_parser
from spheres.errors import ArmillaryError

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
    for line in TEXT.splitlines()
    if line[:1] == "|"
]


def row(first: str) -> list[str]:
    found = [cells for cells in ROWS if cells[0] == first]
    assert len(found) == 1, f"{first} is in {len(found)} rows"
    return found[0]


def commands(group: Any, path: str = "control-cli") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{path} {name}") if hasattr(command, "commands") else {f"{path} {name}": command}
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_every_command_is_there_and_no_other() -> None:
    listed = {cells[0].strip("`") for cells in ROWS if re.match(r"`(control-cli|sphere) ", cells[0])}
    assert listed == {*COMMANDS, "sphere start", "sphere health"}


@pytest.mark.parametrize(("title", "keys"), panels().items())
def test_every_flag_of_start_is_in_its_part_with_default_and_range(title: str, keys: list[str]) -> None:
    part = TEXT.partition(f"\n### {title}\n")[2].partition("\n### ")[0]
    (start,) = [command for name, command in COMMANDS.items() if name == "control-cli start"]
    flags = {parameter.name: parameter for parameter in start.params}
    listed = re.findall(r"^\| `(--[a-z0-9-]+)", part, re.MULTILINE)
    assert listed == [flags[key].opts[0] for key in keys]
    for key in keys:
        flag = " / ".join([flags[key].opts[0], *flags[key].secondary_opts])
        assert row(f"`{flag}`") == [f"`{flag}`", default_text(key) or "-", allowed(key), help_text(key)]


def test_every_other_flag_is_named() -> None:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for flag in parameter.opts:
                assert not flag.startswith("--") or flag in TEXT, (name, flag)
    for command in make_parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            named = any(re.search(rf"[` ]{flag}\b", TEXT) for flag in action.option_strings)
            assert named or action.dest in ("help", "address"), action.dest


def test_every_error_has_its_exit_code() -> None:
    classes = [getattr(errors, name) for name in errors.__all__]
    codes = {cells[0]: cells[2] for cells in ROWS if re.fullmatch(r"\d", cells[0])}
    for cls in classes:
        assert issubclass(cls, ArmillaryError)
        assert f"`{cls.__name__}`" in codes[str(cls.exit_code)]
    named = re.findall(r"`(\w+Error)`", " ".join(codes.values()))
    assert sorted(named) == sorted(errors.__all__)


def test_the_file_that_is_shown_can_be_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "run.toml").write_text(shown)
    config, origins = load_config({}, {}, tmp_path / "run.toml")
    assert (config.optimizer.parameter_groups[0].pattern, config.schedule.kind) == ("*.bias", "cosine")
    assert origins["epochs"].source == "file"


def test_the_command_lines_that_are_shown_are_command_lines() -> None:
    lines = re.findall(r"(?:^|`)(control-cli [a-z-]+(?: [^`#\n]*)?)", TEXT, re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        name, *rest = line.partition(" -- ")[0].split()[1:]
        known = [
            command
            for command in COMMANDS
            if command == f"control-cli {name}" or command.startswith(f"control-cli {name} ")
        ]
        assert known, line
        flags = {flag for command in known for parameter in COMMANDS[command].params for flag in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= flags, line

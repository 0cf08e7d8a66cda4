"""Where configuration comes from: flag > environment (``ARMILLARY_*``) > TOML file > saved run > default.

Every value keeps its origin, and every error names key, value, origin and what is allowed, in one line.
Keys, ranges and defaults themselves are in ``control.config``.
"""

from __future__ import annotations

import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from control.config import SUB_MODELS, RunConfig, flat_paths, flatten
from spheres.errors import ConfigError
from spheres.units import Every, format_duration, format_size

__all__ = ["PREFIX", "Origin", "allowed", "default_text", "help_text", "load_config"]

PREFIX = "ARMILLARY_"

#: read by the commands themselves, by tasks, or by spheres that share the environment
_OTHER_VARIABLES = frozenset(
    {"ADDRESS", "ADVERTISE", "CONFIG", "CONTROL", "DATA", "HOLD", "LOG_FORMAT", "RELAY", "RESUME", "ZONE"}
)
# Kubernetes sets these for each service whose name begins with "armillary"
_SERVICE_VARIABLE = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP)(_.*)?)?)")

#: names that people try first, beyond what spelling alone suggests
_SYNONYMS = {"lr": "learning_rate", "workers": "spheres", "nodes": "spheres", "warmup": "warmup_steps"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: ``where`` is the flag, variable or file, ``text`` the value as it was given."""

    source: Literal["flag", "environment", "file", "saved", "default"]
    where: str
    text: str

    def __str__(self) -> str:
        return self.where


_Layer = dict[str, tuple[Any, Origin]]


def load_config(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    saved: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, dict[str, Origin]]:
    """Return the configuration and, by flat key, where each value came from. Raises ConfigError.

    ``flags`` whose value is None or empty were not given. ``saved`` is the configuration of a run to be resumed, as
    ``flatten`` gave it. ``none`` as a text takes a value from a lower source away where a key can be without one.
    """
    layers = [
        _from_saved(saved or {}),
        _from_file(file) if file is not None else {},
        _from_environment(environ),
        _from_flags(flags),
    ]
    _keep_one_total(layers)
    given: _Layer = {}
    for layer in layers:
        given |= layer
    paths = flat_paths()
    tree: dict[str, Any] = {}
    for key, (value, _) in given.items():
        *parents, leaf = paths[key]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_message(error, given)) from error
    origins = {key: origin for key, (_, origin) in given.items()}
    for key, value in flatten(config).items():
        origins.setdefault(key, Origin("default", "default", _text(value)))
    return config, {key: origins[key] for key in paths}


def help_text(key: str) -> str:
    """Return the line that says what a flat key is for."""
    return (_field(key).description or "").strip()


def default_text(key: str) -> str:
    """Return a flat key's default as one would type it; empty where it has none."""
    field = _field(key)
    value = field.default
    if value in (None, ()) or field.default_factory is not None:
        return ""
    parsers = _parsers(_unwrapped(field)[1])
    if "parse_duration" in parsers:
        return format_duration(value)
    return format_size(value) if "parse_size" in parsers else _text(value)


def allowed(key: str) -> str:
    """Return in words which values a flat key takes."""
    field = _field(key)
    kind, metadata, nullable = _unwrapped(field)
    parsers = _parsers(metadata)
    if get_origin(kind) is Literal:
        *names, last = map(str, get_args(kind))
        text = f"{', '.join(names)} or {last}" if names else last
    elif kind is Every:
        text = "an interval such as 100steps, 1epochs" + ("" if key == "eval_every" else ", 5m")
    elif key in _COMPOUND:
        text = _COMPOUND[key]
    elif "parse_duration" in parsers:
        text = "a duration such as 30s, 5m, 1h,"
    elif "parse_size" in parsers:
        text = "a size such as 64KiB, 1MiB,"
    else:
        text = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}.get(kind, "a text")
    return f"{text}{_bounds(metadata)}" + (", or none" if nullable else "")


_COMPOUND = {
    "task_options": "name=value, several with commas",
    "parameter_groups": "tables with pattern, learning_rate_scale, weight_decay, frozen (outside of a file as JSON)",
}


def _bounds(metadata: list[Any]) -> str:
    limits = {name: getattr(item, name) for item in metadata for name in _LIMITS if hasattr(item, name)}
    if {"ge", "le"} <= limits.keys():
        words = [f"from {limits.pop('ge')} to {limits.pop('le')}"]
    else:
        words = []
    words += [f"{_LIMITS[name]} {value}" for name, value in limits.items()]
    return f" {' and '.join(words)}" if words else ""


_LIMITS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "multiple_of": "a multiple of",
}


# --- the sources ------------------------------------------------------------------------------------------------------


def _from_flags(flags: Mapping[str, Any]) -> _Layer:
    layer: _Layer = {}
    for name, value in flags.items():
        if value is None or (isinstance(value, list | tuple | dict) and not value):
            continue
        where = f"--{name.replace('_', '-')}"
        _add(layer, name, value, Origin("flag", where, _text(value)))
    return layer


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    layer: _Layer = {}
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        if name == variable or not environ[variable] or name in _OTHER_VARIABLES or _SERVICE_VARIABLE.fullmatch(name):
            continue
        _add(layer, name.lower(), environ[variable], Origin("environment", variable, environ[variable]))
    return layer


def _from_file(path: Path) -> _Layer:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path}: no valid TOML: {error}") from error
    layer: _Layer = {}
    for name, value in content.items():
        if name not in SUB_MODELS or not isinstance(value, dict):
            _add(layer, name, value, Origin("file", str(path), _text(value)))
            continue
        model, choice = SUB_MODELS[name]
        for field, inner in value.items():
            if field in model.model_fields:
                key = name if field == choice else field
                _add(layer, key, inner, Origin("file", f"{path} [{name}]", _text(inner)))
            elif field in flat_paths():
                raise ConfigError(f"{field} is no key of [{name}] in {path}; it stands above the first table")
            else:
                raise _unknown(field, f"{path} [{name}]", [*model.model_fields, *flat_paths()])
    return layer


def _from_saved(saved: Mapping[str, Any]) -> _Layer:
    layer: _Layer = {}
    for name, value in saved.items():
        _add(layer, name, value, Origin("saved", "the saved run", _text(value)))
    return layer


def _add(layer: _Layer, name: str, value: Any, origin: Origin) -> None:
    key = name.replace("-", "_")
    if key not in flat_paths():
        raise _unknown(key, str(origin), flat_paths())
    if key in layer:
        raise ConfigError(f"{key} is given twice in {origin}")
    field = _field(key)
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and _unwrapped(field)[2]:
        value = None
    try:
        if key == "task_options":
            value = _options(value)
        elif key == "parameter_groups" and isinstance(value, str):
            value = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{key} = {origin.text} ({origin}): allowed: {allowed(key)}") from error
    layer[key] = (value, origin)


def _options(value: Any) -> dict[str, str]:
    # a text with commas between options has no way to say a value that has one
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, Mapping):
        return {str(name): _text(item) for name, item in value.items()}
    parts: Iterable[str] = value.split(",") if isinstance(value, str) else value
    options: dict[str, str] = {}
    for part in parts:
        name, equals, text = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(part)
        options[name.strip()] = text.strip()
    return options


def _keep_one_total(layers: list[_Layer]) -> None:
    # --steps on the command line replaces epochs of a file, and the other way round: they are one choice
    for index in reversed(range(len(layers))):
        given = {key for key in ("epochs", "steps") if layers[index].get(key, (None,))[0] is not None}
        if given:
            for lower in layers[:index]:
                for key in {"epochs", "steps"} - given:
                    lower.pop(key, None)
            return


# --- errors -----------------------------------------------------------------------------------------------------------


def _unknown(key: str, where: str, known: Iterable[str]) -> ConfigError:
    close = [_SYNONYMS[key]] if key in _SYNONYMS else get_close_matches(key, list(known), 1)
    hint = f"did you mean {close[0]}?" if close else "`control-cli config show` lists all keys"
    return ConfigError(f"unknown key {key} ({where}): {hint}")


def _message(error: ValidationError, given: _Layer) -> str:
    """Return one line for the first thing that is wrong, with a count of the rest."""
    first = error.errors(include_url=False)[0]
    text, loc = first["msg"].removeprefix("Value error, "), tuple(first["loc"])
    paths = flat_paths()
    by_path = {path: key for key, path in paths.items()}
    key = by_path.get(tuple(map(str, loc[:2]))) or by_path.get(tuple(map(str, loc[:1])))
    rest = loc[len(paths[key]) :] if key else ()
    named, colon, explained = text.partition(": ")
    if colon and named in paths and (key is None or not rest):
        # checks over several keys name the one to change
        key, text = named, explained
    elif key is not None and not rest and first["type"] != "value_error":
        text = f"allowed: {allowed(key)}"
    elif rest:
        text = f"{'.'.join(map(str, rest))} = {first['input']!r}: {text}"
    if key is None:
        return f"configuration: {text}"
    value, origin = given.get(key, (None, Origin("default", "default", "")))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    shown = origin.text if key in given else _text(value)
    return f"{key} = {shown} ({origin}): {text}{more}".replace("\n", " ")


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, list | tuple | dict) else str(value)


# --- fields -----------------------------------------------------------------------------------------------------------


def _field(key: str) -> FieldInfo:
    path = flat_paths()[key]
    fields = RunConfig.model_fields if len(path) == 1 else SUB_MODELS[path[0]][0].model_fields
    return fields[path[-1]]


def _parsers(metadata: list[Any]) -> set[str]:
    return {getattr(getattr(item, "func", None), "__name__", "") for item in metadata}


def _unwrapped(field: FieldInfo) -> tuple[Any, list[Any], bool]:
    """Return a field's type without Annotated and None, all its metadata, and whether None was in it."""
    kind: Any = field.annotation
    metadata, nullable = list(field.metadata), False
    if get_origin(kind) in (Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        nullable = len(members) < len(get_args(kind))
        kind = members[0]
    if get_origin(kind) is Annotated:
        kind, *inner = get_args(kind)
        metadata += inner
    return kind, metadata, nullable

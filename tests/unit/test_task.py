from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spheres.errors import ConfigError, DataMissingError, TaskError, TaskLoadError
from spheres.task import Task, data_fingerprint, load_task, split_size, task_fingerprint
from spheres.tasks.digits import Digits

TASK = """
class MyTask:
    def __init__(self, width=3):
        self.width = int(width)
    def init_weights(self, rng): ...
    def size(self, split): return 5
    def gradient(self, weights, samples, rng, out): ...
    def evaluate(self, weights, samples): ...
ready = MyTask(7)
def make(*, width): return MyTask(width)
class Outer:
    Inner = MyTask
class Half:
    def init_weights(self, rng): ...
    def gradient(self, weights, samples, rng, out): ...
number = 3
"""

_names = (f"armillary_task_{n}" for n in itertools.count())

Module = Callable[..., str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Write a module into the working directory and return its name; nothing of it stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str = TASK, name: str = "") -> str:
        name = name or next(_names)
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("armillary_task_")]:
        del sys.modules[name]


# --- what can be named ------------------------------------------------------------------------------------------------


def test_a_task_that_comes_with_the_project() -> None:
    assert isinstance(load_task("digits"), Digits)
    assert load_task("digits", {"hidden": "3"}).init_weights is not None


@pytest.mark.parametrize(
    ("attribute", "options", "width"),
    [
        ("MyTask", {}, 3),
        ("MyTask", {"width": "9"}, 9),
        ("ready", {}, 7),
        ("make", {"width": "4"}, 4),
        ("Outer.Inner", {"width": 2}, 2),
    ],
)
def test_class_function_and_ready_object_of_a_module_in_the_working_directory(
    module: Module, attribute: str, options: dict[str, Any], width: int
) -> None:
    task: Any = load_task(f"{module()}:{attribute}", options)
    assert isinstance(task, Task)
    assert task.width == width


def test_a_ready_object_is_the_same_each_time_and_a_class_makes_a_new_one(module: Module) -> None:
    name = module()
    assert load_task(f"{name}:ready") is load_task(f"{name}:ready")
    assert load_task(f"{name}:MyTask") is not load_task(f"{name}:MyTask")


# --- what cannot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "digit",
            r"unknown task 'digit': did you mean digits\? give one of digits, fashion-mnist, or module:attribute",
        ),
        ("zzz", "unknown task 'zzz': give one of"),
        ("module:", "unknown task 'module:'"),
        (":MyTask", "unknown task ':MyTask'"),
        ("", "unknown task ''"),
        ("no_such_module_at_all:T", "no module named 'no_such_module_at_all'; run from the folder that holds it"),
        ("{}:MyTsk", r"module {} has no 'MyTsk'; did you mean MyTask\?"),
        ("{}:zzz", "module {} has no 'zzz'; name a class, function or object that is in it"),
        ("{}:MyTask.zzz", "MyTask has no 'zzz'"),
        ("{}:number", "is no task: int lacks init_weights, size, gradient, evaluate"),
        ("{}:Half", "is no task: Half lacks size, evaluate"),
    ],
)
def test_what_is_no_task_is_told_in_one_line(module: Module, spec: str, message: str) -> None:
    name = module()
    with pytest.raises(TaskLoadError, match=message.format(name)) as caught:
        load_task(spec.format(name))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f():\n    raise ValueError('boom')\nf()", r"cannot be imported: ValueError: boom \({}\.py, line 2\)"),
        ("import no_such_module_at_all", "no module named 'no_such_module_at_all'; the task needs it: install it"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("def f(:", r"cannot be imported: SyntaxError: .*{}\.py, line 1"),
        ("from spheres.task import Nothing", "cannot be imported: ImportError: cannot import name 'Nothing'"),
        ("def T(): raise KeyError('x')", r"cannot be made: KeyError: 'x' \({}\.py, line 1\)"),
    ],
)
def test_what_the_task_raises_is_named_with_its_place(module: Module, source: str, message: str) -> None:
    name = module(source)
    with pytest.raises(TaskLoadError, match=message.format(name)) as caught:
        load_task(f"{name}:T")
    assert caught.value.__cause__ is not None  # -v shows its traceback


def test_a_tasks_own_error_of_the_project_passes_through(module: Module) -> None:
    name = module(
        "from spheres.errors import DataMissingError\ndef T():\n    raise DataMissingError('get it with fetch.sh')"
    )
    with pytest.raises(DataMissingError, match=r"^get it with fetch\.sh$"):
        load_task(f"{name}:T")


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("MyTask", {"widht": "3"}, r"unexpected keyword argument 'widht'; it takes width \(--task-option"),
        # 3.13 says of which kind the argument is
        ("make", {}, r"missing a required (keyword-only )?argument: 'width'; it takes width"),
        ("Half", {"x": "1"}, "it takes none"),
        ("ready", {"width": "3"}, "is a ready object and takes no options: leave out width"),
    ],
)
def test_options_that_a_task_does_not_take_are_an_error_of_the_configuration(
    module: Module, attribute: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(f"{module()}:{attribute}", options)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def fingerprint(spec: str, options: dict[str, str] | None = None) -> str:
    return task_fingerprint(load_task(spec, options), spec, options)


def test_the_fingerprint_follows_name_options_and_source(module: Module) -> None:
    name = module()
    spec = f"{name}:MyTask"
    first = fingerprint(spec)
    assert first == fingerprint(spec)
    assert fingerprint(spec, {"width": "4"}) not in (first, fingerprint(spec, {"width": "5"}))
    assert fingerprint(f"{name}:ready") != first
    module(TASK + "\n# changed\n", name)
    assert fingerprint(spec) != first


def test_the_order_of_options_does_not_count(module: Module) -> None:
    task = load_task(f"{module()}:ready")
    assert task_fingerprint(task, "x", {"a": "1", "b": "2"}) == task_fingerprint(task, "x", {"b": "2", "a": "1"})


def test_the_fingerprint_covers_the_classes_that_a_task_inherits_from_and_the_module_that_names_it(
    module: Module,
) -> None:
    base = module()
    child = module(f"from {base} import MyTask\nclass T(MyTask): pass")
    naming = module(f"from {child} import T\ndef make(): return T()")
    spec = f"{naming}:make"
    before = fingerprint(spec)
    for name, source in ((base, TASK + "#"), (naming, f"from {child} import T\ndef make(): return T()#")):
        module(source, name)
        for loaded in (child, naming):
            sys.modules.pop(loaded, None)
        after = fingerprint(spec)
        assert after != before, name
        before = after


def test_the_fingerprint_does_not_follow_where_the_module_lies_or_that_it_is_the_main_one(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module()
    task: Any = load_task(f"{name}:MyTask")
    before = task_fingerprint(task, f"{name}:MyTask")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{name}.py").write_text(TASK)
    monkeypatch.setattr(sys.modules[name], "__file__", str(elsewhere / f"{name}.py"))
    assert task_fingerprint(task, f"{name}:MyTask") == before
    # a script that calls train() has its task in __main__, and its spheres import it by name
    monkeypatch.setattr(type(task), "__module__", "__main__")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[name])
    del sys.modules[name]
    assert task_fingerprint(task, f"{name}:MyTask") == before


class Data:
    def __init__(self, value: object = None, train: int = 5) -> None:
        self.value, self.train = value, train

    def size(self, split: str) -> int:
        if self.train < 0:
            raise KeyError(split)
        return self.train


class Named(Data):
    def data_fingerprint(self) -> object:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize("size", [-1, 1.0, "5", None, True])
def test_sizes_that_are_none(size: object) -> None:
    task: Any = SimpleNamespace(size=lambda split: size)
    with pytest.raises(TaskError, match=r"^size\('test'\) is .*: give a whole number, 0 where there is no such split"):
        split_size(task, "test")


def test_the_fingerprint_of_the_data_is_the_tasks_own_or_that_of_its_sizes() -> None:
    assert data_fingerprint(Named("a")) != data_fingerprint(Named("b"))  # type: ignore[arg-type]
    assert data_fingerprint(Named("caf\udce9")) != data_fingerprint(Named("caf\udce8"))  # type: ignore[arg-type]
    assert data_fingerprint(Named("a", 5)) == data_fingerprint(Named("a", 6))  # type: ignore[arg-type]
    assert data_fingerprint(Data(train=5)) != data_fingerprint(Data(train=6))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            Named(ZeroDivisionError("no data")),
            r"data_fingerprint\(\) raised ZeroDivisionError: no data \(test_task\.py",
        ),
        (Data(train=-1), r"size\(\) raised KeyError: 'train' \(test_task\.py, line"),
    ],
)
def test_what_a_fingerprint_raises_is_the_tasks_error(task: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        data_fingerprint(task)
    with pytest.raises(DataMissingError, match=r"^gone$"):
        data_fingerprint(Named(DataMissingError("gone")))  # type: ignore[arg-type]

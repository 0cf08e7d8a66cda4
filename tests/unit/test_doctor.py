"""Each task here that is not Honest breaks one rule of the Task protocol, and is named after it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import threadpoolctl

import control.doctor
from control.config import RunConfig
from control.config_sources import load_config
from control.doctor import (
    Result,
    Trial,
    check_directory,
    check_memory,
    check_other,
    check_shared_memory,
    check_task,
    check_wire,
    read_answer,
)
from spheres.errors import GradientError, SegmentError
from spheres.task import Sums
from spheres.tensors import Manifest, aligned_zeros

Array = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int64]
Weights = Mapping[str, Array]


class Honest:
    """Randomness of its own, from where it may come; 40 samples, 6 to evaluate on."""

    def init_weights(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"bias": np.ones(3, np.float32), "weight": rng.standard_normal((4, 3), dtype=np.float32)}

    def size(self, split: str) -> Any:
        return {"train": 40, "test": 6}.get(split, 0)

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        noise = rng.standard_normal((4, 3), dtype=np.float32)
        out["bias"] += np.float32(len(samples))
        out["weight"] += weights["weight"] * np.float32(samples.sum()) + noise
        return Sums(float(samples.sum()), len(samples), {"accuracy": 1.0})

    def evaluate(self, weights: Weights, samples: Samples) -> Any:
        return Sums(float(weights["weight"].sum()), len(samples), {"accuracy": 1.0})


def examine(task: type[Honest] | str, **settings: Any) -> dict[str, list[Result]]:
    """Return the results by the name of their check."""
    name = task if isinstance(task, str) else task.__qualname__
    results, _ = check_task(config(task=f"{__name__}:{name}", **settings))
    found: dict[str, list[Result]] = {}
    for result in results:
        assert "\n" not in result.message
        found.setdefault(result.check, []).append(result)
    return found


def config(**settings: Any) -> RunConfig:
    return load_config({"batch_size": 20, "microbatches": 4, "window_bytes": "4MiB", **settings}, {})[0]


def only_failure(found: dict[str, list[Result]], check: str) -> Result:
    failed = [result for results in found.values() for result in results if result.state == "failed"]
    assert [result.check for result in failed] == [check], failed
    return failed[0]


# --- a good task ------------------------------------------------------------------------------------------------------


def test_an_honest_task_passes_every_check() -> None:
    results, trial = check_task(config(task=f"{__name__}:Honest"))
    assert [(result.check, result.state) for result in results] == [
        (check, "ok")
        for check in (
            "task", "data", "fingerprints", "init_weights", "gradient", "evaluate", "gradient repeats",
            "new task object", "weights", "threads",
        )
    ]  # fmt: skip
    messages = {result.check: result.message for result in results}
    assert messages["task"].endswith("test_doctor.Honest")
    assert messages["data"] == "40 samples to train on, 6 to test"
    assert messages["init_weights"].startswith("2 tensors, 15 parameters")
    assert messages["gradient"].startswith("of 5 samples")
    assert trial is not None
    assert all(print_ in messages["fingerprints"] for print_ in trial.fingerprints.values())
    assert trial.gradient.any()


def test_the_tasks_of_the_project_pass() -> None:
    results, _ = check_task(config(task="digits"))
    assert {result.state for result in results} == {"ok"}


ready = Honest()


def test_a_ready_object_has_no_second_self_to_be_compared_with() -> None:
    found = examine("ready")
    assert "new task object" not in found
    assert {result.state for results in found.values() for result in results} == {"ok"}


def test_fewer_samples_than_microbatches() -> None:
    found = examine(Honest, batch_size=2, microbatches=7)
    assert found["gradient"][0].message.startswith("of 1 sample:")


# --- hidden randomness and state --------------------------------------------------------------------------------------


class OwnRandomness(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        sums = super().gradient(weights, samples, rng, out)
        out["weight"][1:3] += np.random.standard_normal((2, 3)).astype(np.float32)  # noqa: NPY002 - that is the point
        return sums


class ReadsTheClock(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        sums = super().gradient(weights, samples, rng, out)
        out["weight"] += np.float32(time.perf_counter_ns() % 1_000_003)
        return sums


class CountsCalls(Honest):
    calls = 0

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        self.calls += 1
        sums = super().gradient(weights, samples, rng, out)
        out["weight"] *= np.float32(1 + self.calls)
        return sums


class KeepsWhatItSaw(Honest):
    """Same bits for the same call twice in a row: a running mean of a batch, say, that settles."""

    seen: Samples | None = None

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        sums = super().gradient(weights, samples, rng, out)
        if self.seen is not None and not np.array_equal(self.seen, samples):
            out["weight"] += np.float32(1)
        self.seen = samples
        return sums


class StaysInEvaluationMode(Honest):
    training = True

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        sums = super().gradient(weights, samples, rng, out)
        if not self.training:
            out["weight"] += np.float32(1)
        return sums

    def evaluate(self, weights: Weights, samples: Samples) -> Any:
        self.training = False
        return super().evaluate(weights, samples)


@pytest.mark.parametrize(
    "task", [OwnRandomness, ReadsTheClock, CountsCalls, KeepsWhatItSaw, StaysInEvaluationMode], ids=lambda t: t.__name__
)
def test_a_gradient_that_differs_the_second_time(task: type[Honest]) -> None:
    results, _ = check_task(config(task=f"{__name__}:{task.__name__}"))
    found = next(result for result in results if result.check == "gradient repeats")
    assert (found.state, found.exit_code) == ("failed", 3)
    # the first tensor that differs: "bias" comes before "weight" and has the same bits
    elements = "6" if task is OwnRandomness else "12"
    which = rf"'weight' differs in {elements} of 12 elements, by up to [\d.e+]+"
    hint = "use no randomness but the rng that gradient"
    assert re.match(rf"the second time the gradient has other bits \({which}\): {hint}", found.message)


def test_how_far_the_bits_are_apart() -> None:
    found = examine(StaysInEvaluationMode)["gradient repeats"][0]
    assert "by up to 1)" in found.message


class DiffersByObject(Honest):
    made = itertools.count()

    def __init__(self) -> None:
        self.offset = np.float32(next(self.made))

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        sums = super().gradient(weights, samples, rng, out)
        out["bias"] += self.offset
        return sums


def test_a_gradient_that_differs_between_two_objects() -> None:
    failed = only_failure(examine(DiffersByObject), "new task object")
    assert "from a new task object the gradient has other bits ('bias' differs in 3 of 3 elements" in failed.message


class SumsDiffer(Honest):
    losses = itertools.count()

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        sums = super().gradient(weights, samples, rng, out)
        return Sums(float(next(self.losses)), sums.count, sums.metrics)


def test_sums_that_differ() -> None:
    found = examine(SumsDiffer)["gradient repeats"][0]
    assert "(sums loss 0.0, count 5.0, accuracy 1.0, then loss 2.0" in found.message


# --- gradients that are none ------------------------------------------------------------------------------------------


class ReplacesOut(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] = weights["weight"] * 2
        return Sums(1.0, len(samples))


class ReplacesOutByFloat64(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] = weights["weight"].astype(np.float64)
        return Sums(1.0, len(samples))


class WritesNothing(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out = {name: weight * 2 for name, weight in weights.items()}
        return Sums(float(len(out)), len(samples))


class WrongShape(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] += weights["weight"].T
        return Sums(1.0, len(samples))


class Raises(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        raise ZeroDivisionError("no such luck")


class NoWordsError(Exception):
    def __str__(self) -> str:
        return str(self.args[0])


class RaisesWithoutWords(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        raise NoWordsError


class SaysItOverwrites(Honest):
    overwrites_out = True


class DoesOverwrite(Honest):
    overwrites_out = True

    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        for view in out.values():
            view.fill(0)
        return super().gradient(weights, samples, rng, out)


def test_a_task_that_promises_to_overwrite_is_held_to_it() -> None:
    found = examine(SaysItOverwrites)
    assert [result.state for result in found["gradient"]] == ["ok", "failed"]
    said = found["gradient"][1].message
    assert said.startswith(
        "has other bits where out held something before ('bias' differs in 3 of 3 elements, by up to 1)"
    )
    assert said.endswith("write every element of out, or do not say overwrites_out")
    assert {result.state for results in examine(DoesOverwrite).values() for result in results} == {"ok"}


class SetsDenormals(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        denormals.append("flushed")
        return super().gradient(weights, samples, rng, out)


denormals = ["kept"]


def test_a_task_that_changes_the_mode_of_the_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.doctor, "describe", lambda: {"denormals": denormals[-1]})
    failed = only_failure(examine(SetsDenormals), "environment")
    assert failed.message.startswith("denormals are flushed after the task ran, and were kept before")


class NotANumber(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"][0, 0] = np.nan
        return Sums(1.0, len(samples))


class Overflows(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["bias"][:] = np.inf
        return Sums(1.0, len(samples))


class ReturnsALoss(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        return 0.5


class ReturnsAMean(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] += 1
        return Sums(1.0, 1)


class LossIsNotANumber(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] += 1
        return Sums(float("nan"), len(samples))


class MetricIsNotANumber(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] += 1
        return Sums(1.0, len(samples), {"accuracy": float("nan")})


class ChangesWeights(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        weights["weight"][...] = 0
        return Sums(1.0, len(samples))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (ReplacesOut, r"gradient\(\) replaced out\['weight'\]; write into it"),
        (ReplacesOutByFloat64, r"gradient\(\) replaced out\['weight'\]; write into it"),
        (WritesNothing, r"wrote nothing into out: add to out\[name\] in place"),
        (WrongShape, r"gradient\(\) raised ValueError: .*\(3,4\) .*\(test_doctor\.py, line \d+\)"),
        (Raises, r"gradient\(\) raised ZeroDivisionError: no such luck \(test_doctor\.py, line \d+\)"),
        (RaisesWithoutWords, r"gradient\(\) raised NoWordsError \(test_doctor\.py, line \d+\)"),
        (NotANumber, "the gradient of weight is not finite"),
        (Overflows, "the gradient of bias is not finite"),
        (ReturnsALoss, r"gradient\(\) returned float; return Sums\(loss, count, metrics\)"),
        (ReturnsAMean, r"gradient\(\) returned count 1 for 5 samples: count what it was given"),
        (LossIsNotANumber, r"gradient\(\) returned loss nan over 5 samples"),
        (MetricIsNotANumber, r"gradient\(\) returned accuracy = nan: metrics are finite sums"),
        (ChangesWeights, r"gradient\(\) raised ValueError: .*read-only.*; weights are read-only: copy what you change"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_gradient_that_is_none(task: type[Honest], message: str) -> None:
    results, trial = check_task(config(task=f"{__name__}:{task.__name__}"))
    assert trial is None
    failed = [result for result in results if result.state == "failed"]
    assert [(result.check, result.exit_code) for result in failed] == [("gradient", 3)]
    assert re.match(message, failed[0].message), failed[0].message


def test_what_a_task_raised_comes_with_its_traceback() -> None:
    details = only_failure(examine(Raises), "gradient").details
    assert 'raise ZeroDivisionError("no such luck")' in details
    assert "Traceback" in details


class ForgetsATensor(Honest):
    def gradient(self, weights: Weights, samples: Samples, rng: np.random.Generator, out: dict[str, Any]) -> Any:
        out["weight"] += 1
        return Sums(1.0, len(samples), {"accuracy": 0.0})


def test_a_tensor_without_gradient_is_a_warning() -> None:
    ok, warning = examine(ForgetsATensor)["gradient"]
    assert (ok.state, warning.state) == ("ok", "warning")
    assert warning.message == "is 0 for all of bias: is it written to out?"


class ForcesWeights(Honest):
    def evaluate(self, weights: Weights, samples: Samples) -> Any:
        weights["bias"].flags.writeable = True
        weights["bias"][0] = 7  # type: ignore[index]
        return super().evaluate(weights, samples)


def test_weights_changed_by_force_are_found() -> None:
    failed = only_failure(examine(ForcesWeights), "weights")
    assert failed.message.startswith("were changed by the task")


# --- the other methods ------------------------------------------------------------------------------------------------


class InitWithoutRng(Honest):
    made = itertools.count()

    def init_weights(self, rng: np.random.Generator) -> dict[str, Any]:
        weights = super().init_weights(rng)
        weights["weight"] += np.float32(next(self.made))
        return weights


class InitInFloat64(Honest):
    def init_weights(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"weight": rng.standard_normal((4, 3))}


class InitNotANumber(Honest):
    def init_weights(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"weight": np.full((4, 3), np.nan, np.float32)}


class InitRaises(Honest):
    def init_weights(self, rng: np.random.Generator) -> dict[str, Any]:
        raise KeyError("layer")


class InitEmpty(Honest):
    def init_weights(self, rng: np.random.Generator) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (InitWithoutRng, r"gives other weights each time \('weight' differs in 12 of 12 .*: use the rng"),
        (InitInFloat64, "weights 'weight' are float64; return float32 arrays"),
        (InitNotANumber, "the first weights are not finite"),
        (InitRaises, r"init_weights\(\) raised KeyError: 'layer'"),
        (InitEmpty, "init_weights returned no tensors"),
    ],
)
def test_first_weights_that_will_not_do(task: type[Honest], message: str) -> None:
    failed = examine(task)["init_weights"][0]
    assert (failed.state, failed.exit_code) == ("failed", 3)
    assert re.match(message, failed.message), failed.message


class SizeRaises(Honest):
    def size(self, split: str) -> Any:
        raise OSError("no disk")


class SizeIsNoNumber(Honest):
    def size(self, split: str) -> Any:
        return 1.5


class NothingToTrainOn(Honest):
    def size(self, split: str) -> Any:
        return 0


class DataNeverTheSame(Honest):
    prints = itertools.count()

    def data_fingerprint(self) -> int:
        return next(self.prints)


@pytest.mark.parametrize(
    ("task", "check", "message"),
    [
        (SizeRaises, "data", r"size\(\) raised OSError: no disk \(test_doctor\.py, line \d+\)"),
        (SizeIsNoNumber, "data", r"size\('train'\) is 1\.5: give a whole number, 0 where there is no such split"),
        (NothingToTrainOn, "data", r"size\('train'\) is 0: there is nothing to train on"),
        (DataNeverTheSame, "fingerprints", r"data_fingerprint\(\) gives another value each time"),
    ],
)
def test_data_that_will_not_do(task: type[Honest], check: str, message: str) -> None:
    failed = examine(task)[check][0]
    assert (failed.state, failed.exit_code) == ("failed", 3)
    assert re.match(message, failed.message), failed.message


class EvaluatesAtRandom(Honest):
    losses = itertools.count()

    def evaluate(self, weights: Weights, samples: Samples) -> Any:
        return Sums(float(next(self.losses)), len(samples), {"accuracy": 1.0})


class EvaluateRaises(Honest):
    def evaluate(self, weights: Weights, samples: Samples) -> Any:
        raise TypeError("not today")


class EvaluateCountsWrong(Honest):
    def evaluate(self, weights: Weights, samples: Samples) -> Any:
        return Sums(1.0, 17)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (EvaluatesAtRandom, r"gives other sums each time \(loss 0\.0, .* then loss 1\.0"),
        (EvaluateRaises, r"evaluate\(\) raised TypeError: not today \(test_doctor\.py"),
        (EvaluateCountsWrong, r"evaluate\(\) returned count 17 for 1 sample:"),
    ],
)
def test_an_evaluation_that_will_not_do_is_the_only_failure(task: type[Honest], message: str) -> None:
    failed = only_failure(examine(task), "evaluate")
    assert re.match(message, failed.message), failed.message


class NoTestSplit(Honest):
    def size(self, split: str) -> Any:
        return 40 if split == "train" else 0


def test_warnings_of_an_evaluation() -> None:
    assert examine(NoTestSplit)["evaluate"][0].message.startswith("there is no test split")
    found = examine(Honest, best_metric="f1")["evaluate"][0]
    assert (found.state, found.message) == ("warning", "has no 'f1' for best_metric: choose of loss, accuracy")
    assert examine(Honest, best_metric="loss")["evaluate"][0].state == "ok"


def test_what_stands_in_the_way_of_the_task_itself() -> None:
    for spec, options, check, code in (
        ("nothing", {}, "task", 3),
        ("digits", {"hiddn": "3"}, "task", 2),
        ("digits", {"hidden": "x"}, "task", 2),
    ):
        results, trial = check_task(config(task=spec, task_options=options))
        assert trial is None
        assert [(result.check, result.state, result.exit_code) for result in results] == [(check, "failed", code)]


@pytest.mark.parametrize(("threads", "state"), [([1], "ok"), ([1, 4], "failed"), ([], "warning")])
def test_more_than_one_thread_after_the_task_ran(
    monkeypatch: pytest.MonkeyPatch, threads: list[int], state: str
) -> None:
    libraries = [
        {"user_api": "blas", "internal_api": f"lib{n}", "num_threads": count, "version": "1", "filepath": "x"}
        for n, count in enumerate(threads)
    ]
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: libraries)
    found = examine(Honest)["threads"][0]
    assert found.state == state
    assert state != "failed" or "blas lib1 has 4" in found.message


# --- another object, another process ----------------------------------------------------------------------------------


PRINTS = {"task": "t", "data": "d", "environment": "e"}


def trial(elements: list[float] | None = None, **changes: Any) -> Trial:
    manifest = Manifest.of({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    flat = aligned_zeros(manifest.size)
    flat[16:19] = elements or [1, 2, 3]
    values = {"weights_sha256": "w", "gradient": flat, "sums": "loss 1.0", "fingerprints": PRINTS, "manifest": manifest}
    return Trial(**{**values, **changes})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (trial([1, 2.5, 3]), "in there the gradient has other bits ('b' differs in 1 of 3 elements, by up to 0.5)"),
        (trial(sums="loss 2.0"), "(sums loss 1.0, then loss 2.0)"),
        (trial(weights_sha256="v"), "in there init_weights() gives other weights: use the rng"),
        (trial(fingerprints={**PRINTS, "data": "x"}), "the fingerprint of data is x, not d: derive"),
        (trial(fingerprints={**PRINTS, "environment": "x"}), "the fingerprint of environment is x, not e"),
        (trial(gradient=aligned_zeros(48)), "in there the gradient has other bits (48 elements, not 32)"),
        (GradientError("boom", "traceback"), "in there it failed: boom"),
    ],
)
def test_what_another_process_may_give(other: Trial | Exception, message: str) -> None:
    result = check_other(trial(), other, check="new process", when="in there")
    assert (result.state, result.exit_code) == ("failed", 3)
    assert message in result.message
    assert result.details == ("traceback" if isinstance(other, Exception) else "")


def test_the_same_from_another_process() -> None:
    assert check_other(trial(), trial(), check="new process", when="in there").state == "ok"


def test_a_zero_with_another_sign_is_another_bit() -> None:
    result = check_other(trial([0.0, 1, 1]), trial([-0.0, 1, 1]), check="x", when="then")
    assert "'b' differs in 1 of 3 elements, by up to 0)" in result.message


def test_the_answer_of_a_process() -> None:
    head = {"weights_sha256": "w", "sums": "s", "fingerprints": {"task": "t"}}
    found = read_answer(json.dumps(head).encode() + b"\n" + np.array([1, 2], np.float32).tobytes())
    assert isinstance(found, Trial)
    assert found.gradient.tolist() == [1, 2]
    failed = read_answer(b'{"error": "boom", "details": "where"}\n')
    assert (str(failed), failed.details) == ("boom", "where")  # type: ignore[union-attr]
    for nothing in (b"", b"half", b"[\n"):
        with pytest.raises(ValueError, match=r"."):
            read_answer(nothing)


# --- estimates --------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def sized(parameters: int, resident: int = 0) -> Trial:
    """A trial of a model of so many float32; nothing is allocated."""
    manifest = Manifest.of({"w": np.broadcast_to(np.float32(0), (parameters,))})
    return trial(manifest=manifest, resident_bytes=resident)


@pytest.mark.parametrize(
    ("settings", "control", "leaf", "inner"),
    [
        # model 100 MiB, process 50 for gRPC; control: weights, mean gradient, momentum, and the window of each slot
        ({"spheres": 1, "microbatches": 1}, 50 + 300 + 4 * 2, 50 + 100 + 100, None),
        ({"spheres": 1, "microbatches": 1, "momentum": 0}, 50 + 200 + 4 * 2, 250, None),
        ({"spheres": 1, "microbatches": 1, "optimizer": "adam"}, 50 + 400 + 4 * 2, 250, None),
        # a block of 8: a stack of floor(log2 8) + 1 gradients
        ({"spheres": 1, "microbatches": 8}, 50 + 300 + 4 * 2, 50 + 100 + 400, None),
        # [0, 2) and [2, 3) of 3: while the second is computed the first is held, but the stack of the first is deeper
        ({"spheres": 1, "microbatches": 3}, 50 + 300 + 4 * 2, 50 + 100 + 200, None),
        # the second has [3, 4) and [4, 6): one gradient is held while the stack of the other is two
        ({"spheres": 2, "microbatches": 6}, 50 + 300 + 4 * 5, 50 + 100 + 300, None),
        ({"spheres": 4, "microbatches": 4}, 50 + 300 + 4 * 5, 250, None),
        # two levels: the first has two below it, so it sends up [0, 2) and [2, 3), and the second [3, 4)
        ({"spheres": 4, "microbatches": 4, "fan_out": 2}, 50 + 300 + 4 * 4, 250, 250 + 4 * 4),
        ({"spheres": 4, "microbatches": 4, "fan_out": 2, "window_chunks": 10}, 350 + 10 * 4, 250, 250 + 10 * 4),
    ],
)
def test_memory_is_that_of_the_formulas(settings: dict[str, Any], control: int, leaf: int, inner: int | None) -> None:
    result = check_memory(config(**settings), sized(25 * MIB), 1 << 60)
    more = "" if inner is None else f", an inner sphere {inner} MiB"
    assert result.message.startswith(f"control {control} MiB, a leaf {leaf} MiB{more}; "), result.message


def test_what_the_process_has_already_counts_and_small_windows_end_with_the_model() -> None:
    small = check_memory(config(spheres=1, microbatches=1), sized(MIB // 4, resident=70 * MIB), 1 << 60)
    assert small.message.startswith("control 125 MiB, a leaf 122 MiB")


def test_memory_that_does_not_fit_is_a_warning() -> None:
    settings = {"spheres": 3, "microbatches": 3, "fan_out": 12}
    needed = (366 + 3 * 250) * MIB
    fits = check_memory(config(**settings), sized(25 * MIB), needed)
    assert fits.state == "ok"
    assert "control and 3 local spheres need 1,116 MiB of 1,116 MiB" in fits.message
    tight = check_memory(config(**settings), sized(25 * MIB), needed - 1)
    assert tight.state == "warning"
    assert "does not fit; start fewer local spheres" in tight.message
    elsewhere = check_memory(config(**{**settings, "spheres": 0, "min_spheres": 3}), sized(25 * MIB), needed - 1)
    assert "control alone need 366 MiB" in elsewhere.message
    actors = check_memory(config(**settings, launcher="ray"), sized(25 * MIB), needed - 1)
    assert "control alone need 366 MiB" in actors.message


def test_a_parameter_group_that_fits_no_tensor_is_found_here() -> None:
    groups = [{"pattern": "nothing*", "frozen": True}]
    result = check_memory(config(parameter_groups=groups), sized(100), 1 << 60)
    assert (result.state, result.exit_code) == ("failed", 2)
    assert "pattern 'nothing*' fits no tensor" in result.message


def test_bytes_of_a_step() -> None:
    manifest = sized(25 * MIB).manifest
    flat = check_wire(config(spheres=4, microbatches=16), manifest)
    assert flat.message == (
        "a step sends 400 MiB down and 400 MiB up over 4 edges; control's share is 400 MiB and 400 MiB"
    )
    chain = check_wire(config(spheres=2, microbatches=2, fan_out=1), manifest)
    # the block of the second goes up over both edges; control gets [0, 2) as one, or in two parts
    assert chain.message.startswith("a step sends 200 MiB down and 200 MiB up over 2 edges")
    assert "control's share is 100 MiB and 100 MiB" in chain.message
    assert flat.state == chain.state == "ok"


def test_narrower_types_are_half_the_bytes_and_control_holds_what_spheres_see() -> None:
    narrow = config(spheres=4, microbatches=16, wire_dtype="bfloat16")
    assert check_wire(narrow, sized(25 * MIB).manifest).message.startswith("a step sends 400 MiB down and 200 MiB up")
    both = config(spheres=4, microbatches=16, wire_dtype="bfloat16", weights_wire_dtype="bfloat16")
    assert check_wire(both, sized(25 * MIB).manifest).message.startswith("a step sends 200 MiB down and 200 MiB up")
    plain = check_memory(config(spheres=4, microbatches=4), sized(25 * MIB), 1 << 60)
    seen = check_memory(config(spheres=4, microbatches=4, weights_wire_dtype="bfloat16"), sized(25 * MIB), 1 << 60)
    assert plain.message.startswith("control 370 MiB, a leaf 250 MiB")
    assert seen.message.startswith("control 470 MiB, a leaf 250 MiB")


@pytest.mark.parametrize(("wire", "state", "code"), [("auto", "warning", 0), ("shm", "failed", 2), ("inline", "ok", 0)])
def test_memory_that_cannot_be_shared(wire: str, state: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> None:
        raise SegmentError("no shared memory: a test")

    assert check_shared_memory(config(wire=wire)).state == "ok"
    monkeypatch.setattr("control.doctor.node_memory", none)
    result = check_shared_memory(config(wire=wire))
    assert (result.state, result.exit_code) == (state, code)
    assert ("a test" in result.message) is (wire != "inline")


def test_spheres_without_a_microbatch_are_a_warning() -> None:
    result = check_wire(config(spheres=6, microbatches=4), sized(100).manifest)
    assert result.state == "warning"
    assert "2 of 6 spheres have no microbatch: raise --microbatches" in result.message


# --- the run directory ------------------------------------------------------------------------------------------------


def test_a_run_directory_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    place, disk = check_directory(config(run_dir=path, keep=2), sized(MIB))
    assert (place.state, disk.state) == ("ok", "ok")
    assert list(tmp_path.iterdir()) == []
    # weights and momentum; the two newest, the best, and the one being written
    assert disk.message.startswith("up to 4 checkpoints of 8.00 MiB; ")


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (failed,) = check_directory(config(run_dir=tmp_path / "file" / "run"), sized(MIB))
    assert (failed.state, failed.exit_code) == ("failed", 2)
    assert "give another --run-dir" in failed.message


def test_a_run_directory_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (warning,) = check_directory(config(run_dir=tmp_path), None)
    assert warning.state == "warning"
    assert "holds a run: go on with --resume" in warning.message


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40 * MIB - 1))
    settings = {"run_dir": tmp_path / "run", "keep": 3}
    assert check_directory(config(**settings), sized(MIB))[1].state == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40 * MIB))
    assert check_directory(config(**settings), sized(MIB))[1].state == "ok"

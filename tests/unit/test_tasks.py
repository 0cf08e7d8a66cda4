from __future__ import annotations

import gzip
import hashlib
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spheres.errors import ConfigError, DataMissingError
from spheres.task import Sums, Task, load_task
from spheres.tasks import digits
from spheres.tasks.digits import Digits
from spheres.tasks.fashion_mnist import FashionMnist
from spheres.tasks.mlp import Mlp
from spheres.tensors import Manifest, aligned_zeros

Array = npt.NDArray[np.float32]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def gradient(task: Task, weights: dict[str, Array], samples: npt.ArrayLike) -> tuple[Array, Sums]:
    manifest = Manifest.of(weights)
    out = aligned_zeros(manifest.size)
    views = manifest.views(manifest.pack(weights), writeable=False)
    return out, task.gradient(views, np.asarray(samples, np.int64), generator(), manifest.views(out))


# --- multilayer perceptron --------------------------------------------------------------------------------------------

ROWS = 5


@pytest.fixture(params=[(3, 4), (3, 5, 4), (4, 6, 5, 3)], ids=["linear", "one hidden", "two hidden"])
def net(request: pytest.FixtureRequest) -> tuple[Mlp, dict[str, Array], Array, npt.NDArray[np.int64]]:
    layers = request.param
    rng = generator(3)
    model = Mlp(layers, input_scale=0.5)
    weights = model.init(rng)
    for name in weights:  # biases too, so that nothing is tested at 0
        weights[name] += rng.standard_normal(weights[name].shape, dtype=np.float32) * np.float32(0.1)
    x = rng.standard_normal((ROWS, layers[0]), dtype=np.float32)
    return model, weights, x, rng.integers(0, layers[-1], ROWS)


def loss64(layers: tuple[int, ...], weights: dict[str, npt.NDArray[Any]], x: Array, y: npt.NDArray[np.int64]) -> float:
    """The same loss written down once more, plainly and in float64."""
    below = x.astype(np.float64) * 0.5
    for n in range(len(layers) - 1):
        if n:
            below = np.maximum(below, 0)
        below = below @ weights[f"layer{n}.weight"].astype(np.float64) + weights[f"layer{n}.bias"].astype(np.float64)
    shifted = below - below.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]).sum())


def test_every_element_of_the_gradient_is_the_central_difference_of_the_loss(net: Any) -> None:
    model, weights, x, y = net
    out = {name: np.zeros_like(value) for name, value in weights.items()}
    sums = model.gradient(weights, x, y, out)
    assert sums.loss == pytest.approx(loss64(model.layers, weights, x, y), rel=1e-6)
    step = 1e-6
    for name, value in weights.items():
        wide = {key: array.astype(np.float64) for key, array in weights.items()}
        for index in np.ndindex(value.shape):
            around = []
            for sign in (1, -1):
                wide[name] = value.astype(np.float64)
                wide[name][index] += sign * step
                around.append(loss64(model.layers, wide, x, y))
            expected = (around[0] - around[1]) / (2 * step)
            assert out[name][index] == pytest.approx(expected, rel=2e-5, abs=2e-6), (name, index)


def test_it_writes_every_element_of_out_and_no_minus_zero(net: Any) -> None:
    model, weights, x, y = net
    if len(model.layers) > 2:
        weights["layer0.bias"][...] = -100  # dead units: what comes back through them is -0.0 where it was negative
    for rows in (ROWS, 1, 0):
        zeroed = {name: np.zeros_like(value) for name, value in weights.items()}
        stale = {name: np.full_like(value, np.nan) for name, value in weights.items()}
        x[:, 0] = 0  # a pixel that is always dark: products of it with what is negative are -0.0
        model.gradient(weights, x[:rows], y[:rows], zeroed)
        model.gradient(weights, x[:rows], y[:rows], stale)
        for name in weights:
            assert stale[name].tobytes() == zeroed[name].tobytes()
            assert not np.signbit(stale[name][stale[name] == 0]).any()


def test_accuracy_counts_the_right_answers_and_evaluate_says_the_same(net: Any) -> None:
    model, weights, x, y = net
    out = {name: np.zeros_like(value) for name, value in weights.items()}
    trained, evaluated = model.gradient(weights, x, y, out), model.evaluate(weights, x, y)
    below = x * np.float32(0.5)
    for n in range(len(model.layers) - 1):
        below = np.maximum(below, 0) if n else below
        below = below @ weights[f"layer{n}.weight"] + weights[f"layer{n}.bias"]
    assert trained.metrics == evaluated.metrics == {"accuracy": float((below.argmax(axis=1) == y).sum())}
    assert (trained.loss, trained.count) == (evaluated.loss, evaluated.count) == (trained.loss, ROWS)


def test_no_samples_are_no_loss(net: Any) -> None:
    model, weights, x, y = net
    out = {name: np.zeros_like(value) for name, value in weights.items()}
    assert model.gradient(weights, x[:0], y[:0], out) == Sums(0.0, 0, {"accuracy": 0.0})
    assert model.evaluate(weights, x[:0], y[:0]) == Sums(0.0, 0, {"accuracy": 0.0})
    assert not any(value.any() for value in out.values())


def test_a_long_evaluation_is_that_of_its_parts() -> None:
    rng = generator()
    model = Mlp((3, 4, 2))
    weights = model.init(rng)
    x, y = rng.standard_normal((2500, 3), dtype=np.float32), rng.integers(0, 2, 2500)
    parts = [model.evaluate(weights, x[at : at + 1024], y[at : at + 1024]) for at in (0, 1024, 2048)]
    whole = model.evaluate(weights, x, y)
    assert whole == Sums(sum(p.loss for p in parts), 2500, {"accuracy": sum(p.metrics["accuracy"] for p in parts)})


def test_a_diverged_net_gives_no_warning_and_no_finite_loss() -> None:
    model = Mlp((2, 3, 2))
    weights = {name: np.full_like(value, 1e38) for name, value in model.init(generator()).items()}
    out = {name: np.zeros_like(value) for name, value in weights.items()}
    sums = model.gradient(weights, np.full((4, 2), 10, np.float32), np.zeros(4, np.int64), out)
    assert not np.isfinite(sums.loss)


def test_scratch_of_other_sizes_in_between_changes_no_bit() -> None:
    rng = generator()
    model = Mlp((6, 5, 3))
    weights = model.init(rng)
    x, y = rng.standard_normal((40, 6), dtype=np.float32), rng.integers(0, 3, 40)

    def bits(rows: int) -> bytes:
        out = {name: np.zeros_like(value) for name, value in weights.items()}
        model.gradient(weights, x[:rows], y[:rows], out)
        return b"".join(value.tobytes() for value in out.values())

    first = {rows: bits(rows) for rows in (3, 4)}
    for rows in range(5, 40, 3):  # more sizes than are kept
        bits(rows)
    assert {rows: bits(rows) for rows in (3, 4)} == first


@pytest.mark.parametrize("layers", [(), (3,), (3, 0, 2), (-1, 2)])
def test_layers_that_are_no_net(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="give the widths of the inputs, hidden layers and classes"):
        Mlp(layers)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_has_the_data_that_it_says() -> None:
    task = Digits()
    assert [task.size(split) for split in ("train", "test", "other")] == [1437, 360, 0]
    weights = task.init_weights(generator())
    assert {name: value.shape for name, value in weights.items()} == {
        "layer0.weight": (64, 64), "layer0.bias": (64,), "layer1.weight": (64, 10), "layer1.bias": (10,),
    }  # fmt: skip
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}


def test_the_split_of_digits_is_fixed() -> None:
    """Another split would be another benchmark, and its accuracies could not be compared."""
    task = Digits()
    digest = hashlib.sha256()
    for split in ("train", "test"):
        digest.update(task._images[split].tobytes() + task._labels[split].astype("<i8").tobytes())
    assert digest.hexdigest() == "54077c22831020a44c72db492a0ff23731d9b44bd385464710940ce9d33668c1"
    counts = np.bincount(task._labels["train"]) + np.bincount(task._labels["test"])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as the data's own description has it
    assert task._images["train"].max() == 16


def test_digits_gives_the_same_bits_from_call_to_call_and_object_to_object() -> None:
    samples = [5, 900, 3, 1436, 0, 77, 12]
    weights = Digits().init_weights(generator())
    task = Digits()
    (first, one), (again, two), (other, three) = (gradient(t, weights, samples) for t in (task, task, Digits()))
    assert first.any()
    assert first.tobytes() == again.tobytes() == other.tobytes()
    assert one == two == three
    assert one.count == len(samples)
    assert gradient(task, weights, samples[::-1])[0].tobytes() != first.tobytes()  # the order of the sums counts


def test_digits_evaluates_the_test_split() -> None:
    task = Digits()
    weights = task.init_weights(generator())
    sums = task.evaluate(weights, np.arange(360))
    assert sums.count == 360
    assert 0 <= sums.metrics["accuracy"] < 120  # of a net that has learned nothing
    with pytest.raises(IndexError):
        task.evaluate(weights, np.array([360]))


@pytest.mark.parametrize(
    ("hidden", "shapes"),
    [("32", [(64, 32), (32, 10)]), ("8,4", [(64, 8), (8, 4), (4, 10)]), ("", [(64, 10)])],
)
def test_hidden_layers_of_digits(hidden: str, shapes: list[tuple[int, int]]) -> None:
    weights = load_task("digits", {"hidden": hidden}).init_weights(generator())
    assert [value.shape for name, value in weights.items() if "weight" in name] == shapes


@pytest.mark.parametrize("hidden", ["0", "-3", "many", "3,,x", "2.5"])
def test_hidden_layers_that_are_none(hidden: str) -> None:
    with pytest.raises(ConfigError, match="task option hidden="):
        Digits(hidden=hidden)


def test_a_package_without_its_data_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "_FILE", tmp_path / "digits.csv.gz")
    with pytest.raises(DataMissingError, match=r"digits\.csv\.gz is missing: install the package again"):
        Digits()


# --- fashion-mnist ----------------------------------------------------------------------------------------------------

SIZES = {"train": 7, "t10k": 3}


def idx(array: npt.NDArray[np.uint8], *, magic: bytes | None = None) -> bytes:
    head = magic or bytes((0, 0, 8, array.ndim))
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(stem: str, rows: int | None = None) -> npt.NDArray[np.uint8]:
    count = SIZES[stem] if rows is None else rows
    return generator(count).integers(0, 256, (count, 28, 28), np.uint8)


def labels(stem: str, rows: int | None = None) -> npt.NDArray[np.uint8]:
    count = SIZES[stem] if rows is None else rows
    return generator(count + 50).integers(0, 10, count, np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ARMILLARY_DATA", raising=False)
    path = tmp_path / "fashion-mnist"
    path.mkdir()
    for stem in SIZES:
        (path / f"{stem}-images-idx3-ubyte").write_bytes(idx(images(stem)))
        (path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels(stem)))
    return path


def zip_all(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_plain_and_zipped(folder: Path, zipped: bool) -> None:
    if zipped:
        zip_all(folder)
    task = FashionMnist(str(folder), hidden=4)
    assert [task.size(split) for split in ("train", "test", "other")] == [7, 3, 0]
    x, y = task._gather("train", np.array([6, 2]))
    np.testing.assert_array_equal(x, images("train")[[6, 2]].reshape(2, 784))
    np.testing.assert_array_equal(y, labels("train")[[6, 2]])
    weights = task.init_weights(generator())
    (first, one), (again, two) = (gradient(t, weights, [6, 2, 5]) for t in (task, FashionMnist(str(folder), hidden=4)))
    assert first.any()
    assert first.tobytes() == again.tobytes()
    assert one == two
    assert one.count == 3
    assert task.evaluate(weights, np.arange(3)).count == 3


def test_the_model_of_fashion_mnist(folder: Path) -> None:
    weights = FashionMnist(str(folder)).init_weights(generator())
    shapes = [value.shape for value in weights.values()]
    assert shapes == [(784, 256), (256,), (256, 128), (128,), (128, 10), (10,)]


@pytest.mark.parametrize("below", [True, False])
def test_the_folder_comes_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch, below: bool) -> None:
    monkeypatch.setenv("ARMILLARY_DATA", str(folder.parent if below else folder))
    assert load_task("fashion-mnist").size("train") == 7


def test_the_option_goes_before_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARMILLARY_DATA", str(tmp_path / "nowhere"))
    assert load_task("fashion-mnist", {"data": str(folder)}).size("train") == 7
    with pytest.raises(DataMissingError, match="nowhere; install"):
        load_task("fashion-mnist")


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        DataMissingError, match=r"package dataset-fashion-mnist, or name the folder .* data=FOLDER or ARM"
    ):
        FashionMnist(str(tmp_path))


def broken(change: str, name: str) -> tuple[bytes, str]:
    """Return a file that is wrong in one way, and what is said of it."""
    stem = name.partition("-")[0]
    is_images = "images" in name
    good = idx(images(stem) if is_images else labels(stem))
    return {
        "empty": (b"", "is not an idx file"),
        "cut header": (good[:7], "is not an idx file of bytes"),
        "cut": (good[:-1], f"{name} has .* bytes of .*: it is not whole; get it again"),
        "too long": (good + b"x", f"{name} has .* bytes of .*: it is not whole"),
        "magic": (b"\x00\x00\x0d" + good[3:], f"is not an idx file of bytes with {3 if is_images else 1} axes"),
        "axes": (idx(images(stem)[0]), "is not an idx file of bytes with"),
        "count": (idx(images(stem, 9) if is_images else labels(stem, 9)), "labels: not one set"),
        "side": (idx(np.zeros((SIZES[stem], 5, 5), np.uint8)), "not an idx file|not one set"),
        "label": (idx(np.full(SIZES[stem], 10, np.uint8)), "has a label above 9|not an idx file"),
    }[change]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "change", ["empty", "cut header", "cut", "too long", "magic", "axes", "count", "side", "label"]
)
def test_a_wrong_file_is_found_when_the_task_is_made(folder: Path, name: str, change: str) -> None:
    content, message = broken(change, name)
    (folder / name).write_bytes(content)
    with pytest.raises(DataMissingError, match=message) as caught:
        FashionMnist(str(folder))
    assert re.search(r"[\w-]+-ubyte", str(caught.value))
    assert caught.value.exit_code == 3


def damage(path: Path, *, cut: bool) -> None:
    data = bytearray(path.read_bytes())
    if cut:
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
    path.write_bytes(data)


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_zipped_labels_are_found_when_the_task_is_made(folder: Path, cut: bool) -> None:
    many = {stem: generator().integers(0, 10, 20_000, np.uint8) for stem in SIZES}
    for stem, array in many.items():
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(array))
    zip_all(folder)
    damage(folder / "train-labels-idx1-ubyte.gz", cut=cut)
    with pytest.raises(DataMissingError, match=r"train-labels-idx1-ubyte\.gz cannot be read: .*; get it again"):
        FashionMnist(str(folder))


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_zipped_images_are_found_when_they_are_used(folder: Path, cut: bool) -> None:
    zip_all(folder)
    damage(folder / "train-images-idx3-ubyte.gz", cut=cut)
    task = FashionMnist(str(folder))
    with pytest.raises(DataMissingError, match=r"train-images-idx3-ubyte\.gz cannot be read: .*; get it again"):
        gradient(task, task.init_weights(generator()), [1])


def test_the_fingerprint_of_fashion_mnist_follows_labels_and_their_order(folder: Path) -> None:
    first = FashionMnist(str(folder)).data_fingerprint()
    assert FashionMnist(str(folder), hidden=3).data_fingerprint() == first
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels("train")[::-1].copy()))
    assert FashionMnist(str(folder)).data_fingerprint() != first

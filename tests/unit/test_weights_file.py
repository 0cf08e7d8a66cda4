from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from control.weights_file import read_safetensors, write_safetensors
from spheres.errors import ConfigError
from spheres.tensors import Manifest

ARRAYS = {
    "layer1/weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "empty": np.zeros((0, 5), np.float32),
    "a scalar": np.array(np.pi, np.float32),
    "ümlaut <&>": np.array([-0.0, np.finfo(np.float32).tiny, 1e-45, 3e38], np.float32),
}


def written(path: Path) -> Path:
    manifest = Manifest.of(ARRAYS)
    write_safetensors(path, manifest, manifest.pack(ARRAYS), {"step": "3", "run_id": "r-1"})
    return path


def test_what_is_written_is_read_back_bit_for_bit_by_the_library_and_by_init_from(tmp_path: Path) -> None:
    path = written(tmp_path / "weights.safetensors")
    for arrays in (read_safetensors(path), load_file(path)):
        assert arrays.keys() == ARRAYS.keys()
        for name, array in arrays.items():
            assert array.dtype == np.float32
            assert array.shape == ARRAYS[name].shape
            assert array.tobytes() == ARRAYS[name].tobytes()
    with safe_open(path, "np") as file:
        assert file.metadata() == {"step": "3", "run_id": "r-1"}


def test_the_data_is_aligned_and_has_no_padding(tmp_path: Path) -> None:
    data = written(tmp_path / "weights.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert data[8 + length :] == b"".join(array.tobytes() for array in ARRAYS.values())
    assert list(json.loads(data[8 : 8 + length])) == ["__metadata__", *ARRAYS]


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    mode = (tmp_path / "other").stat().st_mode
    assert written(tmp_path / "weights.safetensors").stat().st_mode == mode


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_text("older")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*weights.safetensors: No space left on device"):
        written(path)
    assert path.read_text() == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]
    with pytest.raises(ConfigError, match=r"cannot write .*: No such file"):
        written(tmp_path / "missing" / "weights.safetensors")


def file_with(path: Path, dtype: str, data: bytes) -> Path:
    header = json.dumps({"w": {"dtype": dtype, "shape": [1], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 2), ("F16", 2), ("F64", 8), ("F8_E4M3", 1), ("I32", 4)])
def test_another_dtype_is_named(tmp_path: Path, dtype: str, size: int) -> None:
    path = file_with(tmp_path / "x.safetensors", dtype, bytes(size))
    with pytest.raises(ConfigError, match=f"tensor 'w' is {dtype}; float32 is needed"):
        read_safetensors(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole").read_bytes()
    path = tmp_path / "x.safetensors"
    for data in (b"", b"abc", b"\xff" * 64, whole[:-1], whole[: len(whole) // 2], whole + b"x"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"cannot read weights from .*x.safetensors"):
            read_safetensors(path)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="cannot read weights from"):
            read_safetensors(missing)


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    save_file({name: np.asarray(array) for name, array in ARRAYS.items()}, tmp_path / "x")
    assert {name: array.tobytes() for name, array in read_safetensors(tmp_path / "x").items()} == {
        name: array.tobytes() for name, array in ARRAYS.items()
    }

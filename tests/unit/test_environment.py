from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import spheres.environment
from spheres.environment import describe, environment_fingerprint, machine_bytes, resident_bytes


def libraries(*more: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    own = {
        "user_api": "blas", "internal_api": "openblas", "version": "0.3.30", "architecture": "Haswell",
        "num_threads": 1, "filepath": str(Path(np.__file__).parents[1] / "numpy.libs" / "libopenblas.so"),
    }  # fmt: skip
    return [{**own, **changes}, *more]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what libraries the process seems to have loaded."""

    def load(*more: dict[str, Any], **changes: Any) -> str:
        monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: libraries(*more, **changes))
        return environment_fingerprint()

    return load


def test_the_number_of_threads_is_no_part_of_it(loaded: Any) -> None:
    # every sphere pins one thread; a control in somebody's own process may have more
    assert loaded(num_threads=1) == loaded(num_threads=8)
    assert "thread" not in str(describe())


def test_a_real_limit_of_threads_changes_nothing() -> None:
    before = environment_fingerprint()
    with threadpoolctl.threadpool_limits(limits=2):
        assert 2 in [library["num_threads"] for library in threadpoolctl.threadpool_info()]
        assert environment_fingerprint() == before


def test_libraries_that_others_loaded_are_no_part_of_it(loaded: Any) -> None:
    others = [
        {"user_api": "blas", "internal_api": "openblas", "version": "0.2", "num_threads": 2,
         "filepath": "/elsewhere/scipy.libs/libopenblas.so"},
        {"user_api": "openmp", "internal_api": "openmp", "version": None, "num_threads": 2,
         "filepath": "/elsewhere/libgomp.so"},
    ]  # fmt: skip
    assert loaded(*others) == loaded()


@pytest.mark.parametrize("changes", [{"version": "0.3.31"}, {"architecture": "SkylakeX"}, {"internal_api": "mkl"}])
def test_numpys_blas_and_its_kernel_are_part_of_it(loaded: Any, changes: dict[str, str]) -> None:
    assert loaded(**changes) != loaded()


def test_where_numpy_uses_the_systems_blas_that_counts(loaded: Any) -> None:
    system = {"filepath": "/usr/lib/libopenblas.so"}
    assert loaded(**system) != loaded(**system, version="0.3.31")


def test_numpys_version_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment_fingerprint()
    monkeypatch.setattr(np, "__version__", "0.0")
    assert environment_fingerprint() != before


def test_rounding_to_bfloat16_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment_fingerprint()

    def truncated(array: Any, dtype: str) -> None:
        array.view(np.uint32)[...] &= 0xFFFF0000

    monkeypatch.setattr(spheres.environment, "round_in_place", truncated)
    assert environment_fingerprint() != before


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="sets MXCSR by glibc")
def test_denormals_are_those_of_the_thread_and_of_those_that_it_starts() -> None:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    saved = ctypes.create_string_buffer(32)  # fenv_t: the x87's state, then MXCSR
    assert libm.fegetenv(saved) == 0
    flushing = bytearray(saved.raw)
    flushing[28:32] = (int.from_bytes(flushing[28:32], "little") | 0x8040).to_bytes(4, "little")
    before, seen = environment_fingerprint(), []
    libm.fesetenv(ctypes.create_string_buffer(bytes(flushing), 32))
    try:
        here = environment_fingerprint()
        thread = threading.Thread(target=lambda: seen.append(describe()["denormals"]))
        thread.start()
        thread.join()
    finally:
        libm.fesetenv(saved)
    assert here != before == environment_fingerprint()
    assert seen == ["flushed"]


def test_resident_memory_follows_what_is_allocated() -> None:
    now, peak = resident_bytes()
    assert 10 << 20 < now <= peak
    block = np.ones(128 << 20, np.uint8)  # far more than an allocator may have kept
    more, _ = resident_bytes()
    assert more - now > 64 << 20
    del block
    assert resident_bytes()[1] >= more - (4 << 20)  # the kernel counts in batches


def test_a_container_may_have_less_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "1048576\n")
    assert machine_bytes() == 1 << 20
    monkeypatch.setattr(Path, "read_text", lambda self: "max\n")
    assert machine_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    script = """
        import resource
        from spheres.environment import allow_many_files
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=30)

"""What equal bits rest on: this process's numeric environment as a fingerprint, its memory, and malloc's settings."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

from spheres.narrow import round_in_place
from spheres.numerics import crc32c

__all__ = ["allow_many_files", "describe", "environment_fingerprint", "machine_bytes", "resident_bytes", "tune_malloc"]


def describe() -> dict[str, str]:
    """Return what may change the bits of a gradient: CPU features, NumPy's BLAS and its kernel, versions, denormals.

    Denormals are those of the calling thread, which the threads that it starts inherit; and how a few values are
    rounded to bfloat16 stands there too (N21).

    Two things are left out, or control would differ from its own spheres: the number of BLAS threads, since every
    sphere pins one, whatever the process that it came from; and libraries other than NumPy's, since which of them are
    loaded depends on when one looks. A task that computes with another library names its version in its own
    ``data_fingerprint``.
    """
    numpy_config: Any = np.show_config(mode="dicts")
    smallest = np.float32(np.finfo(np.float32).tiny)
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "byteorder": sys.byteorder,
        "numpy": np.__version__,
        "simd": " ".join(numpy_config["SIMD Extensions"].get("found", [])),
        "blas": "; ".join(_blas()),
        "denormals": "kept" if smallest / np.float32(2) else "flushed",
        "bfloat16": _bfloat16(),
    }


def _bfloat16() -> str:
    """Return the CRC-32C of a vector after rounding: ties both ways, carries, denormals, the largest, infinity, NaN."""
    halves = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7FC0]
    words = [sign | half << 16 | low for sign in (0, 1 << 31) for half in halves for low in (0, 0x7FFF, 0x8000, 0x8001)]
    values = np.array(words, np.uint32).view(np.float32)
    round_in_place(values, "bfloat16")
    # only that a NaN is one: its other bits are compared nowhere
    return f"{crc32c(np.nan_to_num(values, nan=0.5, posinf=np.inf, neginf=-np.inf)):08x}"


def _blas() -> list[str]:
    from threadpoolctl import threadpool_info

    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    # a wheel of NumPy brings its BLAS along; where NumPy uses the system's, all count
    site = str(Path(np.__file__).parents[1] / "numpy")
    own = [library for library in libraries if str(library["filepath"]).startswith(site)] or libraries
    return sorted(f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}".rstrip() for lib in own)


def environment_fingerprint() -> str:
    """Return 16 hex digits; gradients are the same bits among equal ones."""
    text = "\n".join(f"{key}={value}" for key, value in describe().items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resident_bytes() -> tuple[int, int]:
    """Return resident memory of this process now and at its peak."""
    try:
        # not ru_maxrss: a new process begins there with the peak of the one that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        return int(found["VmRSS"].split()[0]) * 1024, int(found["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        return peak_bytes, peak_bytes


def machine_bytes() -> int:
    """Return the memory of this machine, or of the container where that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number, and elsewhere there is no such file
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may be: links and shared memory take some per neighbour."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def tune_malloc() -> None:
    """Keep buffers of chunk size out of mmap: page faults cost more than copies. Nothing where this is not glibc."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(m_mmap_threshold, 32 << 20):
            mallopt(m_trim_threshold, 512 << 20)

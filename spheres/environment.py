"""What equal bits rest on: this process's numeric environment as a fingerprint, its memory, and malloc's settings."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["describe", "environment_fingerprint", "resident_bytes", "tune_malloc"]


def describe() -> dict[str, str]:
    """Return what may change the bits of a gradient: CPU features, BLAS and its kernel, versions, denormals."""
    from threadpoolctl import threadpool_info

    numpy_config: Any = np.show_config(mode="dicts")
    blas = [
        f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')} threads={lib['num_threads']}"
        for lib in threadpool_info()
    ]
    smallest = np.float32(np.finfo(np.float32).tiny)
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "byteorder": sys.byteorder,
        "numpy": np.__version__,
        "simd": " ".join(numpy_config["SIMD Extensions"].get("found", [])),
        "blas": "; ".join(sorted(blas)),
        "denormals": "kept" if smallest / np.float32(2) else "flushed",
    }


def environment_fingerprint() -> str:
    """Return 16 hex digits; gradients are the same bits among equal ones."""
    text = "\n".join(f"{key}={value}" for key, value in describe().items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resident_bytes() -> tuple[int, int]:
    """Return resident memory of this process now and at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    try:
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[1]) * resource.getpagesize(), peak_bytes
    except OSError:
        return peak_bytes, peak_bytes


def tune_malloc() -> bool:
    """Keep buffers of chunk size out of mmap: page faults cost more than copies. False where this is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(mallopt(m_mmap_threshold, 32 << 20)) and bool(mallopt(m_trim_threshold, 64 << 20))

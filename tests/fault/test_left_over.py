"""A test run that is killed leaves no process behind, not even a stopped one (``tests/reaper.py``)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found by their mark on Linux only"),
]

ROOT = Path(__file__).parents[2]
#: as pytest does: what it starts is in a session of its own, one stopped, one a child of a shell that has ended
TEST_RUN = """
import os, signal, subprocess, sys
from tests import reaper

reaper.watch()
stopped = subprocess.Popen(["sleep", "600"], start_new_session=True)
os.kill(stopped.pid, signal.SIGSTOP)
orphan = subprocess.run(["sh", "-c", "sleep 600 > /dev/null & echo $!"], stdout=subprocess.PIPE, text=True)
print(stopped.pid, orphan.stdout.strip(), flush=True)
if sys.stdin.read():
    os._exit(0)
"""


@pytest.mark.parametrize("end", ["killed", "over"])
def test_nothing_that_a_test_run_has_started_outlives_it(end: str) -> None:
    command = [sys.executable, "-c", TEST_RUN]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as test_run:
        assert test_run.stdout is not None
        pids = [int(word) for word in test_run.stdout.readline().split()]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        try:
            assert len(pids) == 2
            assert not select.select(descriptors, [], [], 0)[0]
            if end == "killed":
                test_run.kill()
            test_run.communicate("over")
            assert test_run.returncode == (-signal.SIGKILL if end == "killed" else 0)
            for pid, descriptor in zip(pids, descriptors, strict=True):
                assert select.select([descriptor], [], [], 20.0)[0], f"{pid} lives"
        finally:
            for descriptor in descriptors:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                os.close(descriptor)

"""A process is started from one that has gRPC's threads, which its copy before exec has not."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]

SCRIPT = """
import asyncio, gc, os, sys
import uvloop
from control.starting import start_process

class Waits:
    '''As gRPC's queue does where it goes: for a thread of its own.'''

    def __init__(self):
        self.itself, self.owner = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.owner:
            os.write(1, b"collected in the child\\n")

async def main():
    gc.collect()
    os.register_at_fork(before=Waits, after_in_child=lambda: [[] for _ in range(10_000)])
    process = await start_process(sys.executable, "-c", "print('started')")
    print("code", await process.wait(), "collecting", gc.isenabled(), flush=True)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def test_nothing_is_collected_between_fork_and_exec():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.splitlines() == ["started", "code 0 collecting True"]

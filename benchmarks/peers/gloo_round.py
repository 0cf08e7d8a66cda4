"""all_reduce of torch's gloo, float32: ROUNDS times over N processes of this machine, or of several hosts.

    python gloo_round.py N MEGABYTES ROUNDS                    starts N processes here
    python gloo_round.py N MEGABYTES ROUNDS RANK ADDRESS PORT  is one of them

Prints the seconds of each round as JSON, from rank 0: from a barrier until the last process has the sum. A round
before them warms up. Needs torch; nothing of the project.
"""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta


def member(n: int, megabytes: float, rounds: int, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=n, timeout=timedelta(seconds=300))
    gradient = torch.ones(int(megabytes * 250_000), dtype=torch.float32)
    seconds = []
    for _ in range(rounds + 1):
        gradient.fill_(1.0)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradient)
        seconds.append(time.perf_counter() - began)
        assert gradient[0] == gradient[-1] == n
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(slowest[1:].tolist()))
    dist.destroy_process_group()


def main() -> None:
    n, megabytes, rounds, *place = sys.argv[1:]
    if place:
        rank, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place
        member(int(n), float(megabytes), int(rounds), int(rank))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, __file__, n, megabytes, rounds]
    others = [subprocess.Popen([*words, str(rank), "127.0.0.1", port]) for rank in range(1, int(n))]
    try:
        first = subprocess.run([*words, "0", "127.0.0.1", port], check=False)
        codes = [first.returncode, *(other.wait(60) for other in others)]
    finally:
        for other in others:
            other.kill()
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()

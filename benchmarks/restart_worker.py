"""One worker of the run that ``restart.py`` has torchrun restart: a step is a wait and an all-reduce over gloo.

It runs under torch's interpreter, not the project's. Each event is a line of JSON in the file ``--events``, with
CLOCK_MONOTONIC in seconds, which all processes of a machine share. It goes on until torchrun ends it.
"""

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--every", type=int, required=True, help="steps from one checkpoint to the next")
    parser.add_argument("--seconds", type=float, required=True, help="what a step computes")
    parser.add_argument("--parameters", type=int, required=True)
    options = parser.parse_args()
    rank, parent = int(os.environ["RANK"]), os.getppid()

    def say(event: str, step: int = -1) -> None:
        line = json.dumps({"time": time.monotonic(), "event": event, "step": step, "rank": rank, "pid": os.getpid()})
        with options.events.open("a") as file:  # one write of a short line: appended whole
            file.write(line + "\n")

    say("start")
    import torch
    import torch.distributed as dist

    say("imported")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    say("grouped")
    step, weights = 0, torch.zeros(options.parameters)
    if options.checkpoint.exists():
        held = torch.load(options.checkpoint)
        step, weights = held["step"], held["weights"]
    while os.getppid() == parent:
        time.sleep(options.seconds)
        gradient = torch.full((options.parameters,), 1e-3 * (rank + 1))
        dist.all_reduce(gradient)
        weights -= gradient
        step += 1
        if rank == 0:
            say("step", step)
            if step % options.every == 0:
                new = options.checkpoint.with_suffix(".new")
                torch.save({"step": step, "weights": weights}, new)
                new.replace(options.checkpoint)


if __name__ == "__main__":
    main()

"""A perceptron trained by torch's DistributedDataParallel over gloo, one thread per process; prints samples/s as JSON.

    python ddp.py DATA.npz N BATCH STEPS WARM_UP     DATA: arrays x (bytes or float32), y, widths, input_scale

N processes on this machine, each BATCH / N samples a step of an order drawn anew each epoch; SGD with momentum.
"""

import json
import socket
import sys
import time
from datetime import timedelta
from itertools import pairwise


def member(rank: int, n: int, port: int, path: str, batch: int, steps: int, warm_up: int, results) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=timedelta(seconds=120))
    data = np.load(path)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"].astype(np.int64))
    scale, widths = float(data["input_scale"]), data["widths"].tolist()
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for number, (i, o) in enumerate(pairwise(widths)):
        layers += [torch.nn.ReLU()] * (number > 0) + [torch.nn.Linear(i, o)]
    plain = torch.nn.Sequential(*layers)
    model = torch.nn.parallel.DistributedDataParallel(plain) if n > 1 else plain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order, share = torch.empty(0, dtype=torch.int64), batch // n
    generator, at = torch.Generator().manual_seed(0), 0
    for step in range(warm_up + steps):
        if step == warm_up:
            dist.barrier()
            began = time.perf_counter()
        if at + batch > len(order):
            order, at = torch.randperm(len(y), generator=generator), 0
        mine = order[at + rank * share : at + (rank + 1) * share]
        at += batch
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[mine].float() * scale), y[mine])
        loss.backward()
        optimizer.step()
    dist.barrier()
    if rank == 0:
        results.put(steps * share * n / (time.perf_counter() - began))
    dist.destroy_process_group()


def main() -> None:
    import multiprocessing

    path, *numbers = sys.argv[1:]
    n, batch, steps, warm_up = map(int, numbers)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = [(rank, n, port, path, batch, steps, warm_up, results) for rank in range(n)]
    members = [context.Process(target=member, args=each) for each in arguments]
    for process in members:
        process.start()
    for process in members:
        process.join()
    if any(process.exitcode for process in members):
        sys.exit(1)
    print(json.dumps(results.get()))


if __name__ == "__main__":
    main()

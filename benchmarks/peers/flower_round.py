"""A round of Flower over its gRPC bidi streams: ROUNDS times FedAvg over N clients whose fit() costs nothing.

    python flower_round.py N MEGABYTES ROUNDS

Prints the seconds of each round as JSON: from the choice of clients to that of the next round, so that weights go down,
gradients up, and their mean is taken. The first warms up. Needs flwr; nothing of the project.
"""

import json
import logging
import socket
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np


def client(address: str, megabytes: float) -> None:
    import flwr.client

    gradient = np.ones(int(megabytes * 250_000), np.float32)

    class Standing(flwr.client.NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            assert parameters[0].size == gradient.size
            return [gradient], 1, {}

    flwr.client.start_client(server_address=address, client=Standing().to_client(), insecure=True)


def server(address: str, n: int, megabytes: float, rounds: int) -> list[float]:
    import flwr.server
    from flwr.common import ndarrays_to_parameters
    from flwr.server.strategy import FedAvg

    times: list[float] = []

    class Timed(FedAvg):
        def configure_fit(self, *arguments: Any, **named: Any) -> Any:
            chosen = super().configure_fit(*arguments, **named)
            times.append(time.perf_counter())
            return chosen

    first = ndarrays_to_parameters([np.zeros(int(megabytes * 250_000), np.float32)])
    strategy = Timed(fraction_evaluate=0.0, min_fit_clients=n, min_available_clients=n, initial_parameters=first)
    config = flwr.server.ServerConfig(num_rounds=rounds + 2)
    flwr.server.start_server(server_address=address, config=config, strategy=strategy)
    return [after - before for before, after in pairwise(times[1:])]


def main() -> None:
    n, megabytes, rounds, *address = sys.argv[1:]
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    if address:
        client(address[0], float(megabytes))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [sys.executable, __file__, n, megabytes, rounds, where]
    clients = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(int(n))]
    try:
        print(json.dumps(server(where, int(n), float(megabytes), int(rounds))))
    finally:
        for process in clients:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

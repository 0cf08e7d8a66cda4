"""``grpc.health.v1.Health`` and reflection on the ports of control and of spheres; and ``sphere health``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from control.config import RunConfig
from control.starting import start_process
from control.testing import local_tree
from control.training import Training
from spheres.grpc_link import GrpcTransport
from spheres.grpc_listener import GrpcListener
from spheres.server import Health, add_services
from spheres.sphere import Sphere, SphereOptions
from spheres.testing.synthetic import Synthetic
from spheres.transport import Handlers

TASK = Synthetic(parameters=2_500, samples=100)
SERVING, NOT_SERVING, UNKNOWN = (
    pb.HealthCheckResponse.SERVING,
    pb.HealthCheckResponse.NOT_SERVING,
    pb.HealthCheckResponse.SERVICE_UNKNOWN,
)


def config(**changes: Any) -> RunConfig:
    settings = {"task": "synthetic", "microbatches": 4, "batch_size": 20, "spheres": 1, "checkpoint_every": None}
    return RunConfig(**{**settings, "eval_every": None, "steps": 4, **changes})


@contextlib.asynccontextmanager
async def asked(address: str) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def check(address: str, service: str) -> int:
    async with asked(address) as stub:
        return int((await stub.Check(pb.HealthCheckRequest(service=service), timeout=5)).status)


class Announcing(GrpcTransport):
    """Says where it listens."""

    def __init__(self, health: Health) -> None:
        super().__init__(lambda server: add_services(server, health))
        self.address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def listen(self, address: str, handlers: Handlers) -> GrpcListener:
        listener = await super().listen(address, handlers)
        self.address.set_result(listener.address)
        return listener


@contextlib.asynccontextmanager
async def sphere_of(control: str) -> AsyncIterator[tuple[str, Sphere]]:
    """A sphere as the command makes it, and its address."""
    health = Health()
    transport = Announcing(health)
    options = SphereOptions(control=control, host="localhost", orphan_timeout=30.0)
    sphere = Sphere(options, transport, task=TASK, link_changed=health.set_ready)
    running = asyncio.create_task(sphere.run())
    try:
        yield await transport.address, sphere
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_a_sphere_is_ready_exactly_while_its_link_is_up(run, tmp_path):
    """It looks for control, finds it, loses it: a watch sees every change, and the process lives all the time."""

    async def main() -> None:
        async with sphere_of("127.0.0.1:1") as (alone, _):
            assert await check(alone, "") == SERVING
            assert await check(alone, "ready") == NOT_SERVING
        async with local_tree(config(spheres=0), TASK, lambda _: GrpcTransport(), directory=tmp_path) as first:
            waiting = asyncio.create_task(first.controller.run())
            async with sphere_of(first.tree.address) as (address, sphere), asked(address) as stub:
                watch = stub.Watch(pb.HealthCheckRequest(service="ready"))
                states = []

                async def until(status: int) -> None:
                    while not states or states[-1] != status:
                        answer = await watch.read()
                        states.append(answer.status)

                await until(SERVING)
                assert sphere.parent is not None
                assert sphere.parent.linked
                await first.tree.aclose()
                await until(NOT_SERVING)
                assert not sphere.parent.linked
                assert await check(address, "ready") == NOT_SERVING
                assert await check(address, "") == SERVING
                watch.cancel()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert states in ([SERVING, NOT_SERVING], [NOT_SERVING, SERVING, NOT_SERVING])

    run(main())


def test_another_service_is_not_found_and_a_watch_of_it_says_unknown(run):
    async def main() -> None:
        async with sphere_of("127.0.0.1:1") as (address, _), asked(address) as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="is liveness") as caught:
                await stub.Check(pb.HealthCheckRequest(service="nix"), timeout=5)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            watch = stub.Watch(pb.HealthCheckRequest(service="nix"))
            assert (await watch.read()).status == UNKNOWN
            watch.cancel()

    run(main())


def test_a_watch_is_told_of_changes_only():
    """Without a port: what a slow reader gets is the latest, and nothing twice."""

    async def main() -> None:
        health = Health()
        watch = health.Watch(pb.HealthCheckRequest(service="ready"), None)
        assert (await anext(watch)).status == NOT_SERVING
        health.set_ready(False)
        following = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        assert not following.done()
        health.set_ready(True)
        assert (await following).status == SERVING
        health.set_ready(False)
        health.set_ready(True)
        following = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not following.done()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(main())


def test_reflection_names_what_a_sphere_serves(run):
    async def main() -> None:
        async with sphere_of("127.0.0.1:1") as (address, _), grpc.aio.insecure_channel(address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await call.read()
            names = {service.name for service in answer.list_services_response.service}
            assert {"spheres.v1.SphereService", "grpc.health.v1.Health"} <= names
            assert "spheres.v1.ControlService" not in names
            await call.done_writing()
            call.cancel()

    run(main())


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_control_is_ready_once_the_run_has_opened_and_says_so_to_the_command(run, tmp_path):
    async def main() -> None:
        training = Training(RunConfig(task="digits", steps=3, spheres=1, run_dir=tmp_path / "run"))
        early: list[int] = []
        listen = training._listen

        async def listen_and_look(last: str) -> None:
            await listen(last)
            early.extend([await check(training._tree.address, name) for name in ("", "ready")])

        training._listen = listen_and_look  # type: ignore[method-assign]
        async with training:
            address = training._tree.address
            assert early == [SERVING, NOT_SERVING]
            for words in ((), ("--service", "ready")):
                code, said = await ask(address, *words)
                assert (code, said) == (0, f"{address}{' ready' if words else ''}: SERVING\n")
        code, said = await ask(address)
        assert code == 1
        assert re.fullmatch(rf"{address}: nobody answers \(.+\)\n", said)

    run(main(), timeout=50)


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_the_command_says_that_a_sphere_is_not_ready_and_what_hangs_is_waited_for_in_vain(run):
    """A sphere that looks for control lives and is not ready; one that is stopped answers nothing."""
    command = [sys.executable, "-m", "spheres", "start", "--control", "127.0.0.1:1"]
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with subprocess.Popen([*command, "--listen", address], stdout=subprocess.PIPE, text=True) as sphere:
        try:
            assert sphere.stdout is not None
            sphere.stdout.readline()

            async def main() -> None:
                while (await ask(address))[0]:
                    pass
                assert await ask(address, "--service", "ready") == (1, f"{address} ready: NOT_SERVING\n")
                assert await ask(address, "--service", "nix") == (
                    1, f"{address} nix: no service 'nix' here: \"\" is liveness, \"ready\" readiness\n"
                )  # fmt: skip
                os.kill(sphere.pid, signal.SIGSTOP)
                code, said = await ask(address, "--timeout", "300ms")
                assert (code, "nobody answers (Deadline Exceeded)" in said) == (1, True)

            run(main(), timeout=50)
        finally:
            os.kill(sphere.pid, signal.SIGCONT)
            sphere.terminate()
            assert sphere.wait(timeout=10) == 0


async def ask(address: str, *words: str) -> tuple[int, str]:
    """Run ``sphere health``."""
    process = await start_process(
        *(sys.executable, "-m", "spheres", "health", address, *words), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()

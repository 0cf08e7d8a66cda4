"""One suite for Link and Transport: what their docstrings say, in memory (with delays too) and over gRPC."""

import asyncio
import logging
import random
import re
import socket
import struct
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from spheres import errors, grpc_link, grpc_listener
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import (
    ArmillaryError,
    ChecksumError,
    ConfigError,
    LinkClosedError,
    MessageTooLargeError,
    RefusedError,
    StaleError,
    UnreachableError,
    VersionMismatchError,
)
from spheres.grpc_link import GrpcTransport
from spheres.server import Health, add_services
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.network import FaultyNetwork
from spheres.transport import Handlers, Rpc

ANY_PORT = "127.0.0.1:0"
ERRORS = [getattr(errors, name) for name in errors.__all__]

over_grpc_only = pytest.mark.parametrize("transport", ["grpc"], indirect=True)


@pytest.fixture(params=["memory", "delayed", "grpc"])
def transport(request):
    if request.param == "grpc":
        return GrpcTransport()
    return MemoryTransport(MemoryNetwork() if request.param == "memory" else FaultyNetwork(random.Random(0)))


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The reason of a write that failed is waited for, however busy this machine is."""
    monkeypatch.setattr(grpc_link, "_WHY_SECONDS", 20.0)


@pytest.fixture
def sees_who_goes(monkeypatch):
    """That a client has gone, and not only ended its side, is waited for too."""
    monkeypatch.setattr(grpc_listener, "_GONE_SECONDS", 20.0)


class Ends:
    """Both ends of one link. The handler waits until the link ends, and notes whether it was cancelled."""

    def __init__(self):
        self.listening_end = asyncio.get_running_loop().create_future()
        self.handler_cancelled = asyncio.Event()

    async def handler(self, link):
        self.listening_end.set_result(link)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.handler_cancelled.set()
            raise


@asynccontextmanager
async def listening(transport, handler, enroll=None):
    listener = await transport.listen(ANY_PORT, Handlers(handler, handler, enroll))
    try:
        yield listener
    finally:
        await listener.aclose()


@asynccontextmanager
async def link_to(transport, handler):
    """A link to a handler."""
    async with listening(transport, handler) as listener:
        link = await transport.dial(listener.address, Rpc.WORK)
        try:
            yield link
        finally:
            await link.aclose()


@asynccontextmanager
async def both_ends(transport):
    ends = Ends()
    async with link_to(transport, ends.handler) as dialled:
        yield dialled, await ends.listening_end, ends


async def echo(link):
    while (message := await link.receive()) is not None:
        await link.send(message)


async def ends_with(awaitable, error):
    """Wait for an error; its class exactly, and its sentence."""
    with pytest.raises(ArmillaryError) as caught:
        await awaitable
    assert (type(caught.value), str(caught.value)) == (type(error), str(error))


async def smuggle(link, message):
    """Send what this end would refuse to send."""
    for name in ("_call", "_context"):
        if hasattr(link, name):
            await getattr(link, name).write(message)
            return
    await link._out.put(message)


# ---- messages


def test_messages_arrive_whole_and_in_order_both_ways(transport, run):
    messages = [bytes([i % 251]) * size for i, size in enumerate([0, 1, 5, 0, 100_000, MAX_MESSAGE_BYTES, 3, 0])]

    async def send(link):
        for message in messages:
            await link.send(message)

    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            for sender, receiver in ((dialled, listening), (listening, dialled)):
                sending = asyncio.create_task(send(sender))
                assert [await receiver.receive() for _ in messages] == messages
                await sending

    run(main())


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_reader_that_does_not_read_holds_the_sender_up(transport, run, way):
    size, count = 256 * 1024, 400
    sent = 0

    async def send(link):
        nonlocal sent
        for _ in range(count):
            await link.send(bytes(size))
            sent += 1

    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            sender, receiver = (dialled, listening) if way == "up" else (listening, dialled)
            sending = asyncio.create_task(send(sender))
            held = -1
            while not sent or held != sent:  # as long as it comes on: a busy machine may not have begun yet
                held = sent
                done, _ = await asyncio.wait({sending}, timeout=0.3)
                assert not done
            assert held * size <= 16 << 20
            for _ in range(count):
                assert len(await receiver.receive()) == size
            await sending
            assert sent == count

    run(main())


@pytest.mark.parametrize("sender", ["dialled", "listening"])
def test_a_message_over_the_limit_is_refused_where_it_is_sent_and_the_link_goes_on(transport, run, sender):
    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            one, other = (dialled, listening) if sender == "dialled" else (listening, dialled)
            with pytest.raises(MessageTooLargeError, match=f"{MAX_MESSAGE_BYTES + 1} bytes; the limit is"):
                await one.send(bytes(MAX_MESSAGE_BYTES + 1))
            await one.send(b"next")
            assert await other.receive() == b"next"

    run(main())


@pytest.mark.parametrize("sender", ["dialled", "listening"])
def test_a_message_over_the_limit_is_refused_where_it_arrives(transport, run, sender):
    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            one, other = (dialled, listening) if sender == "dialled" else (listening, dialled)
            await smuggle(one, bytes(MAX_MESSAGE_BYTES + 1))
            with pytest.raises(MessageTooLargeError, match=f"{MAX_MESSAGE_BYTES + 1} bytes; the limit is"):
                await other.receive()

    run(main())


def test_links_do_not_hold_each_other_up(transport, run):
    async def talk(address, number):
        link = await transport.dial(address, Rpc.HEARTBEAT if number % 2 else Rpc.WORK)
        try:
            for i in range(20):
                await link.send(b"%d %d" % (number, i))
                assert await link.receive() == b"%d %d" % (number, i)
        finally:
            await link.aclose()

    async def main():
        async with listening(transport, echo) as listener:
            stuck = await transport.dial(listener.address, Rpc.WORK)
            flood = asyncio.create_task(_flood(stuck))  # its answers are never read
            await asyncio.gather(*(talk(listener.address, number) for number in range(12)))
            assert not flood.done()
            flood.cancel()
            await asyncio.wait({flood})
            await stuck.aclose()

    run(main())


async def _flood(link):
    while True:
        await link.send(bytes(100_000))


def test_work_and_heartbeat_go_to_their_own_handlers(transport, run):
    async def main():
        def named(name):
            async def handler(link):
                await link.send(name)

            return handler

        listener = await transport.listen(ANY_PORT, Handlers(named(b"work"), named(b"heartbeat")))
        for rpc, name in ((Rpc.WORK, b"work"), (Rpc.HEARTBEAT, b"heartbeat")):
            link = await transport.dial(listener.address, rpc)
            assert await link.receive() == name
            await link.aclose()
        await listener.aclose()

    run(main())


# ---- the listening end ends the link


def test_an_end_in_order_comes_after_what_was_sent(transport, run):
    handlers = asyncio.Queue()

    async def three_messages(link):
        handlers.put_nowait(asyncio.current_task())
        for i in range(3):
            await link.send(b"%d" % i)

    async def main():
        async with listening(transport, three_messages) as listener:
            link = await transport.dial(listener.address, Rpc.WORK)
            await asyncio.wait({await handlers.get()})
            await listener.aclose()  # so the link has long ended when it is read
            assert [await link.receive() for _ in range(5)] == [b"0", b"1", b"2", None, None]
            with pytest.raises(LinkClosedError):
                await link.send(b"too late")
            await link.aclose()

    run(main())


@pytest.mark.parametrize("error", ERRORS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("how", ["raised", "closed"])
def test_the_dialling_end_sees_the_error_of_the_listening_end(transport, run, error, how):
    reason = error("100 % wrong: über the limit\nof [2,4)")

    async def handler(link):
        await link.send(b"before")
        if how == "raised":
            raise reason
        await link.aclose(reason)
        await link.aclose(StaleError("a second word does not count"))
        await asyncio.Event().wait()

    async def main():
        async with link_to(transport, handler) as link:
            assert await link.receive() == b"before"
            await ends_with(link.receive(), reason)
            await ends_with(link.receive(), reason)
            await ends_with(link.send(b"after"), reason)

    run(main())


def test_a_sender_that_is_held_up_sees_why_the_link_ends(transport, run):
    """Over gRPC the failed write would hide the status, from the reader too."""
    reason = ChecksumError("chunk 3 does not fit its checksum")

    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            sending = asyncio.create_task(_flood(dialled))
            receiving = asyncio.create_task(dialled.receive())
            await asyncio.wait({sending, receiving}, timeout=0.1)
            assert not sending.done()
            await listening.aclose(reason)
            await ends_with(sending, reason)
            await ends_with(receiving, reason)

    run(main())


class _FailedWrite:
    """A call as the library has it after a write that failed: a status of its own makes."""

    async def code(self):
        return grpc.StatusCode.INTERNAL

    async def details(self):
        return "Internal error from Core"


@over_grpc_only
@pytest.mark.parametrize("first", ["the write", "the status"])
def test_a_write_that_fails_does_not_hide_why_the_link_ends(transport, run, first):
    """In whichever order the library tells of the two, which depends on its version and on chance."""
    reason = RefusedError("another run")

    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            if first == "the write":
                dialled._ended(_FailedWrite())
                receiving = asyncio.create_task(dialled.receive())
                await listening.aclose(reason)
                await ends_with(receiving, reason)
            else:
                await listening.aclose(reason)
                await ends_with(dialled.receive(), reason)
                dialled._ended(_FailedWrite())
            await ends_with(dialled.receive(), reason)
            await ends_with(dialled.send(b"x"), reason)

    run(main())


@over_grpc_only
def test_a_write_that_fails_waits_a_moment_for_the_reason(transport, run):
    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            dialled._ended(_FailedWrite())
            why = asyncio.create_task(dialled._why())
            await listening.aclose(RefusedError("another run"))
            assert isinstance(await why, RefusedError)

    run(main())


def test_a_handler_that_fails_ends_its_link_with_a_reason_and_a_log(transport, run, caplog):
    async def handler(link):
        raise ZeroDivisionError("in the handler")

    async def main():
        async with link_to(transport, handler) as link:
            await ends_with(
                link.receive(), ArmillaryError("the other side failed with ZeroDivisionError: in the handler")
            )

    run(main())
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def test_a_reason_too_long_for_a_header_arrives_cut(run):
    """gRPC would drop the whole status."""

    async def handler(link):
        raise StaleError("€" * 50_000)

    async def main():
        async with link_to(GrpcTransport(), handler) as link:
            with pytest.raises(StaleError, match=r"^€{600,} \.\.\.$"):
                await link.receive()

    run(main())


# ---- either end closes, vanishes or is cancelled


@pytest.mark.parametrize("end", ["dialled", "listening"])
def test_a_closed_end_says_so_and_may_be_closed_again(transport, run, end):
    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            link = dialled if end == "dialled" else listening
            await link.aclose()
            await link.aclose()
            await link.aclose(StaleError("again"))
            with pytest.raises(LinkClosedError):
                await link.send(b"x")
            with pytest.raises(LinkClosedError):
                await link.receive()

    run(main())


def test_closing_ends_a_receive_and_a_send_under_way_at_the_dialling_end(transport, run):
    async def main():
        async with both_ends(transport) as (dialled, _, _):
            sending, receiving = asyncio.create_task(_flood(dialled)), asyncio.create_task(dialled.receive())
            await asyncio.wait({sending, receiving}, timeout=0.1)
            await dialled.aclose()
            for task in (sending, receiving):
                with pytest.raises(LinkClosedError):  # and not CancelledError: nobody cancelled the task
                    await task

    run(main())


@pytest.mark.usefixtures("sees_who_goes")
def test_when_the_dialling_end_goes_the_handler_is_cancelled_and_its_link_broken(transport, run):
    async def main():
        async with both_ends(transport) as (dialled, listening, ends):
            receiving, sending = asyncio.create_task(listening.receive()), asyncio.create_task(_flood(listening))
            await asyncio.wait({receiving, sending}, timeout=0.05)
            await dialled.aclose(StaleError("the dialling end cannot say why"))
            for task in (receiving, sending):
                with pytest.raises(LinkClosedError):
                    await task
            await ends.handler_cancelled.wait()
            with pytest.raises(LinkClosedError):
                await listening.send(b"x")
            with pytest.raises(LinkClosedError):
                await listening.receive()

    run(main())


@over_grpc_only
@pytest.mark.usefixtures("sees_who_goes")
def test_a_connection_that_is_cut_breaks_both_ends(transport, run):
    async def main():
        ends = Ends()
        async with listening(transport, ends.handler) as listener, cut_off(listener.address) as (address, cut):
            dialled = await transport.dial(address, Rpc.WORK)
            listening_end = await ends.listening_end
            receiving = [asyncio.create_task(end.receive()) for end in (dialled, listening_end)]
            await asyncio.wait(receiving, timeout=0.05)
            cut()
            for task in receiving:
                with pytest.raises(LinkClosedError):
                    await task
            await ends.handler_cancelled.wait()
            await dialled.aclose()

    run(main())


@asynccontextmanager
async def cut_off(target):
    """A way to an address that can be cut like a cable."""
    host, _, port = target.rpartition(":")
    writers, pumps = [], []

    async def pump(reader, writer):
        while data := await reader.read(65_536):
            writer.write(data)

    async def accept(reader, writer):
        there, back = await asyncio.open_connection(host, int(port))
        writers.extend((writer, back))
        pumps.extend((asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))))

    def cut():
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname()), cut
    finally:
        server.close()
        cut()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@pytest.mark.parametrize("end", ["dialled", "listening"])
@pytest.mark.parametrize("what", ["receive", "send"])
def test_cancelling_spoils_an_end_but_leaves_it_to_be_closed(transport, run, end, what):
    async def main():
        async with both_ends(transport) as (dialled, listening, _):
            link = dialled if end == "dialled" else listening
            task = asyncio.create_task(link.receive() if what == "receive" else _flood(link))
            await asyncio.wait({task}, timeout=0.05)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(LinkClosedError):
                await link.receive()
            with pytest.raises(LinkClosedError):
                await link.send(b"x")
            await link.aclose()

    run(main())


# ---- listening and dialling


def test_port_0_chooses_a_free_port_and_a_used_one_is_refused(transport, run):
    async def main():
        async with listening(transport, echo) as one, listening(transport, echo) as two:
            ports = {int(listener.address.rpartition(":")[2]) for listener in (one, two)}
            assert len(ports) == 2
            assert 0 not in ports
            with pytest.raises(ConfigError, match=f"cannot listen on {one.address}: the port is in use"):
                await transport.listen(one.address, Handlers(echo, echo))

    run(main())


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1", "127.0.0.1:", ":0", "127.0.0.1:99999", "127.0.0.1:x"])
def test_an_address_that_is_none_is_refused(transport, run, address):
    async def main():
        with pytest.raises(ConfigError, match="HOST:PORT"):
            await transport.listen(address, Handlers(echo, echo))

    run(main())


@over_grpc_only
def test_an_address_of_another_machine_is_refused(transport, run):
    async def main():
        with pytest.raises(ConfigError, match=r"192\.0\.2\.1:0.*not of this machine"):
            await transport.listen("192.0.2.1:0", Handlers(echo, echo))

    run(main())


def test_a_listener_that_closes_ends_its_links_and_waits_for_their_handlers(transport, run, monkeypatch):
    monkeypatch.setattr(grpc_listener, "_LAST_WORDS_SECONDS", 0.05)
    began, ended = asyncio.Queue(), []

    async def handler(link):
        began.put_nowait(link)
        try:
            await link.receive()
        finally:
            await asyncio.sleep(0.15)  # longer than gRPC waits
            ended.append(link)

    async def main():
        async with listening(transport, handler) as listener:
            links = [await transport.dial(listener.address, rpc) for rpc in Rpc for _ in range(3)]
            receiving = [asyncio.create_task(link.receive()) for link in links]
            for _ in links:  # one that has not come when the listener closes has no handler to wait for
                await began.get()
            await listener.aclose()
            assert len(ended) == len(links)
            for task in receiving:
                with pytest.raises(LinkClosedError):
                    await task
            with pytest.raises(UnreachableError):
                await transport.dial(listener.address, Rpc.WORK)
            with pytest.raises(UnreachableError):
                await transport.enroll(listener.address, b"", 5.0)
            for link in links:
                await link.aclose()

    run(main())


def test_a_listener_that_closes_says_so(transport, run):
    async def main():
        async with listening(transport, echo) as listener:
            link = await transport.dial(listener.address, Rpc.WORK)
            await link.send(b"x")
            await link.receive()
            await listener.aclose()
            await ends_with(link.receive(), LinkClosedError("the listener has closed"))
            await link.aclose()

    run(main())


def test_a_link_that_ends_while_its_first_message_leaves_says_why(transport, run):
    """Headers that the library sends with a first message would go out once more with the status, and undo it."""
    reason = RefusedError("another time")

    async def handler(link):
        sending = asyncio.create_task(link.send(b"first"))
        await asyncio.sleep(0)
        sending.cancel()
        raise reason

    async def main():
        async with link_to(transport, handler) as link:
            await ends_with(_read_on(link), reason)

    run(main())


async def _read_on(link):
    while await link.receive():
        pass


def test_a_listener_is_closed_although_whoever_closes_it_is_cancelled(transport, run):
    async def main():
        listener = await transport.listen(ANY_PORT, Handlers(echo, echo))
        link = await transport.dial(listener.address, Rpc.WORK)
        closing = asyncio.create_task(listener.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(LinkClosedError):
            await link.receive()
        await link.aclose()
        async with asyncio.timeout(10):
            await _free(transport, listener.address)

    run(main())


async def _free(transport, address):
    """Wait until an address can be listened on again."""
    while True:
        try:
            listener = await transport.listen(address, Handlers(echo, echo))
        except ConfigError:
            await asyncio.sleep(0.01)
        else:
            return await listener.aclose()


def test_a_listener_closes_although_a_peer_does_not_read(transport, run):
    async def main():
        async with listening(transport, _flood) as listener:
            link = await transport.dial(listener.address, Rpc.WORK)
            await link.receive()
            async with asyncio.timeout(5):
                await listener.aclose()
            await link.aclose()

    run(main())


def test_an_address_can_be_used_again_after_its_listener_has_closed(transport, run):
    async def main():
        async with listening(transport, echo) as first:
            address = first.address
        listener = await transport.listen(address, Handlers(echo, echo))
        link = await transport.dial(address, Rpc.WORK)
        await link.send(b"again")
        assert await link.receive() == b"again"
        await link.aclose()
        await listener.aclose()

    run(main())


# ---- a request that ends what gRPC's server takes calls with

where_it_does = pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 84), reason="this grpcio answers such a request"
)


def _frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _header(name, value):
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


async def call_a_path_that_is_no_utf8(address):
    """Return when the server behind the address takes no calls any more, and has said so."""
    loop = asyncio.get_running_loop()
    report = loop.get_exception_handler()
    # the library tells the loop too
    loop.set_exception_handler(
        lambda loop, context: isinstance(context.get("exception"), UnicodeDecodeError) or report(loop, context)
    )
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    headers = {b":method": b"POST", b":scheme": b"http", b":path": b"/\xff", b":authority": b"x", b"te": b"trailers"}
    headers[b"content-type"] = b"application/grpc"
    block = b"".join(_header(name, value) for name, value in headers.items())
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 5, 1, block))
    kind = None
    while kind != 7:  # GOAWAY
        head = await reader.readexactly(9)
        kind = head[3]
        await reader.readexactly(int.from_bytes(head[:3], "big"))
    writer.close()
    await writer.wait_closed()


async def dial_until_it_is_taken(transport, address):
    """A server that is failing may still connect, and then ends the link: whoever dialled in between dials again."""
    while True:
        try:
            link = await transport.dial(address, Rpc.WORK)
            await link.send(b"taken?")
            if await link.receive() == b"taken?":
                return link
        except LinkClosedError:
            await link.aclose()
        except UnreachableError:
            await asyncio.sleep(0.02)


async def dial_until_nobody_answers(transport, address):
    """A server that has failed may still connect for a moment. Raises UnreachableError."""
    while True:
        await (await transport.dial(address, Rpc.WORK)).aclose()


def _warnings(caplog):
    warnings = (r for r in caplog.records if r.name == "spheres.grpc_listener" and r.levelno == logging.WARNING)
    return [record.getMessage() for record in warnings]


@where_it_does
def test_after_a_request_that_ends_the_server_links_live_on_and_others_get_in(run, caplog):
    transport = GrpcTransport(lambda server: add_services(server, Health()))

    async def enroll(request):
        return request * 2

    async def health(address):
        async with grpc.aio.insecure_channel(address) as channel:
            return (await HealthStub(channel).Check(HealthCheckRequest(), timeout=5)).status

    async def main():
        async with listening(transport, echo, enroll) as listener:
            links = [await dial_until_it_is_taken(transport, listener.address)]
            for number in range(1, 4):
                await call_a_path_that_is_no_utf8(listener.address)
                links.append(await dial_until_it_is_taken(transport, listener.address))
                assert await transport.enroll(listener.address, b"me", 5.0) == b"meme"
                assert await health(listener.address) == HealthCheckResponse.SERVING
                for link in links:
                    await link.send(b"still here")
                    assert await link.receive() == b"still here"
                assert len(_warnings(caplog)) == number
            freed = list(listener._failed.values())[:2]  # the third has a link yet
            await links[0].aclose()
            await links[1].aclose()
            await asyncio.gather(*freed)
            assert len(listener._failed) == 1
        await ends_with(links[2].receive(), LinkClosedError("the listener has closed"))
        await ends_with(links[3].receive(), LinkClosedError("the listener has closed"))
        for link in links:
            await link.aclose()

    run(main())
    assert all("links that are open live on" in warning for warning in _warnings(caplog))


@where_it_does
@over_grpc_only
def test_a_listener_waits_for_its_port_where_another_has_taken_it(transport, run, monkeypatch):
    bind, tries = grpc_listener._bind, []

    def taken_twice(server, address):
        tries.append(address)
        return 0 if len(tries) in (2, 3) else bind(server, address)

    async def main():
        async with listening(transport, echo) as listener:
            await call_a_path_that_is_no_utf8(listener.address)
            link = await dial_until_it_is_taken(transport, listener.address)
            assert tries[1:] == [listener.address] * 3
            await link.aclose()

    monkeypatch.setattr(grpc_listener, "_bind", taken_twice)
    monkeypatch.setattr(grpc_listener, "_LOOK_SECONDS", 0.05)
    run(main())


@where_it_does
@over_grpc_only
def test_a_listener_that_cannot_have_its_port_again_says_so_and_keeps_its_links(transport, run, monkeypatch, caplog):
    monkeypatch.setattr(grpc_listener, "_REBIND_SECONDS", 0.0)

    async def main():
        async with listening(transport, echo) as listener:
            link = await transport.dial(listener.address, Rpc.WORK)
            monkeypatch.setattr(grpc_listener, "_bind", lambda server, address: 0)
            await call_a_path_that_is_no_utf8(listener.address)
            await asyncio.wait({listener._watching})
            await link.send(b"still here")
            assert await link.receive() == b"still here"
            await link.aclose()
            with pytest.raises(UnreachableError):
                await dial_until_nobody_answers(transport, listener.address)

    run(main())
    assert any("cannot be had again" in record.getMessage() for record in caplog.records)


@where_it_does
@over_grpc_only
@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_listener_closes_also_while_its_server_has_failed(transport, run, monkeypatch, seconds):
    tried = asyncio.Event()

    def taken(server, address):
        tried.set()
        return 0

    async def main():
        async with listening(transport, echo) as listener:
            monkeypatch.setattr(grpc_listener, "_bind", taken)
            link = await dial_until_it_is_taken(transport, listener.address)
            await call_a_path_that_is_no_utf8(listener.address)
            await tried.wait()
        await ends_with(link.receive(), LinkClosedError("the listener has closed"))
        await link.aclose()

    monkeypatch.setattr(grpc_listener, "_REBIND_SECONDS", seconds)
    run(main())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "", "not an address"])
def test_dialling_where_nobody_listens_fails_at_once(transport, run, address):
    async def main():
        async with asyncio.timeout(grpc_link.DIAL_SECONDS - 1):
            with pytest.raises(UnreachableError, match="nobody answers at"):
                await transport.dial(address, Rpc.WORK)

    run(main())


@over_grpc_only
@pytest.mark.parametrize("how", ["times out", "is cancelled"])
def test_dialling_a_port_that_says_nothing_is_bounded(transport, run, monkeypatch, how):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes the connection, nobody speaks
            dialling = asyncio.create_task(transport.dial("{}:{}".format(*silent.getsockname()), Rpc.WORK))
            if how == "is cancelled":
                await asyncio.wait({dialling}, timeout=0.1)
                dialling.cancel()
            async with asyncio.timeout(10):
                with pytest.raises(UnreachableError if how == "times out" else asyncio.CancelledError):
                    await dialling

    monkeypatch.setattr(grpc_link, "DIAL_SECONDS", 0.3 if how == "times out" else 60.0)
    run(main())


@over_grpc_only
def test_a_proxy_of_the_environment_is_not_asked(transport, run, monkeypatch):
    async def enroll(request):
        return request * 2

    async def main():
        async with listening(transport, echo, enroll) as listener:
            link = await transport.dial(listener.address, Rpc.WORK)
            await link.send(b"x")
            assert await link.receive() == b"x"
            assert await transport.enroll(listener.address, b"me", 5.0) == b"meme"
            await link.aclose()

    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    run(main())


# ---- enrolling


@pytest.mark.parametrize("address", ["127.0.0.1:7", "[::1]:7", f"[fe80::1%{socket.if_nameindex()[0][1]}]:7"])
def test_an_address_that_has_a_number_is_looked_up_as_it_is(transport, run, address):
    async def main():
        assert await transport.look_up(address) == address

    run(main())


def test_a_name_is_looked_up_to_a_number(run):
    async def main():
        assert await GrpcTransport().look_up("localhost:7") in ("127.0.0.1:7", "[::1]:7")

    run(main())


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("localhost:no-port", "Servname not supported.*"),  # asks nobody, as a name that is not known would
        (f"{'x' * 64}:7", "that is no name of a host"),
        ("a..b:7", "that is no name of a host"),
    ],
)
def test_what_cannot_be_looked_up_is_said(run, address, why):
    async def main():
        with pytest.raises(UnreachableError, match=rf"^no way to {re.escape(address)}: {why}; is the name right\?$"):
            await GrpcTransport().look_up(address)

    run(main())


def test_enrolling_brings_the_answer_or_the_refusal(transport, run):
    async def enroll(request):
        if request == b"no":
            raise VersionMismatchError("install the same release on both")
        if request == b"bug":
            raise ZeroDivisionError("in the handler")
        return request * 2

    async def main():
        async with listening(transport, echo, enroll) as listener:
            assert await transport.enroll(listener.address, b"me", 5.0) == b"meme"
            assert await transport.enroll(listener.address, b"", 5.0) == b""
            await ends_with(
                transport.enroll(listener.address, b"no", 5.0), VersionMismatchError("install the same release on both")
            )
            await ends_with(
                transport.enroll(listener.address, b"bug", 5.0),
                ArmillaryError("the other side failed with ZeroDivisionError: in the handler"),
            )
            assert await transport.enroll(listener.address, b"x", 5.0) == b"xx"

    run(main())


def test_enrolling_where_control_does_not_answer_says_what_to_look_at(transport, run):
    async def never(request):
        await asyncio.Event().wait()

    async def main():
        async with listening(transport, echo, never) as slow, listening(transport, echo) as sphere:
            with pytest.raises(UnreachableError, match=r"control at 127\.0\.0\.1:1 does not answer; is it running"):
                await transport.enroll("127.0.0.1:1", b"me", 5.0)
            with pytest.raises(UnreachableError, match="does not answer; is it running"):
                async with asyncio.timeout(10):
                    await transport.enroll(slow.address, b"me", 0.1)
            with pytest.raises(RefusedError, match="is it control"):
                await transport.enroll(sphere.address, b"me", 5.0)

    run(main())

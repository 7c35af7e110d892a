"""A voice agent's WebSocket: what it may do, who may use it, and what is refused."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest
from stream_parts import FPS, has_ipv6, running, timeline, wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection

from flashtalk_cli.config import PcmFormat
from flashtalk_cli.errors import UsageError
from flashtalk_cli.live import listen
from flashtalk_cli.live.address import Address, parse_address
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.inputs import parse_listen
from flashtalk_cli.live.listen import BUSY, MESSAGE_BYTES, UNFIT, ListenSource
from flashtalk_cli.live.timeline import RATE_HZ, Timeline


@contextmanager
def listening(
    token: str | None = None, backlog_s: float = 30.0
) -> Iterator[tuple[ListenSource, str, Timeline]]:
    store = timeline(backlog_s)
    source = ListenSource(Address("127.0.0.1", 0), PcmFormat(), token, store, Clock(), lambda text: None)
    with running(source):
        yield source, f"ws://127.0.0.1:{source.address.port}/", store


def test_an_agent_speaks_interrupts_leaves_and_comes_back() -> None:
    with listening() as (source, url, store):
        source.on_interrupt = store.interrupt
        with connect(url) as agent:
            assert json.loads(agent.recv(timeout=5)) == {"type": "ready", "pcm": "s16le:16000:1"}
            agent.send(np.full(16_000, 8000, "<i2").tobytes())
            wait_until(lambda: store.unspoken_s > 0.9)
            agent.send(json.dumps({"type": "interrupt"}))
            told = json.loads(agent.recv(timeout=5))
            assert told["type"] == "interrupted"
            assert told["dropped_s"] > 0.9
            assert store.unspoken_s == 0
        wait_until(lambda: not source._busy.locked())
        with connect(url) as agent:
            agent.recv(timeout=5)
            agent.send(np.zeros(1600, "<i2").tobytes())
            agent.send(json.dumps({"type": "end"}))
            wait_until(lambda: store.ended)


def test_after_an_interrupt_sound_begins_with_a_whole_sample() -> None:
    """A message of an odd length was dropped: half a sample of it would make loud noise of all that follows."""
    with listening() as (source, url, store), connect(url) as agent:
        source.on_interrupt = store.interrupt
        agent.recv(timeout=5)
        agent.send(bytes(9001))
        agent.send(json.dumps({"type": "interrupt"}))
        agent.recv(timeout=5)
        agent.send(np.full(16_000, 3, "<i2").tobytes())
        wait_until(lambda: store.unspoken_s > 0.9)
        assert np.abs(store.take(FPS // 2).samples).max() < 100 / 32_768


def test_only_who_shows_the_token_may_speak() -> None:
    with listening("s3cret") as (_, url, _store):
        for attempt in (url, url + "?token=wrong"):
            with pytest.raises(InvalidStatus) as refused:
                connect(attempt).close()
            assert refused.value.response.status_code == 401
        connect(url + "?token=s3cret").close()
    with listening("s3cret") as (_, url, _store):
        connect(url, additional_headers={"Authorization": "Bearer s3cret"}).close()


def test_a_web_page_without_the_token_is_turned_away() -> None:
    with listening() as (_, url, _store), pytest.raises(InvalidStatus) as refused:
        connect(url, origin="https://evil.example").close()
    assert refused.value.response.status_code == 403


def code_after(agent: ClientConnection, message: str | bytes) -> int | None:
    """The code with which the connection is closed after a message."""
    with suppress(ConnectionClosed):
        agent.send(message)
        agent.recv(timeout=5)
    return agent.close_code


def test_a_second_client_nonsense_and_giant_messages_are_refused() -> None:
    with listening() as (source, url, _store):
        with connect(url) as first:
            first.recv(timeout=5)
            with connect(url) as second, pytest.raises(ConnectionClosed) as busy:
                second.recv(timeout=5)
            assert busy.value.rcvd.code == BUSY
        nested = "[" * 1000
        for message, code in (
            *((text, UNFIT) for text in ("{}", "[1]", nested)),
            (b"\0" * (MESSAGE_BYTES + 2), 1009),
        ):
            wait_until(lambda: not source._busy.locked())
            with connect(url) as agent:
                agent.recv(timeout=5)
                assert code_after(agent, message) == code


def test_an_agent_faster_than_speech_is_slowed_down_and_loses_nothing() -> None:
    with listening(backlog_s=5.0) as (_, url, store), connect(url) as agent:
        agent.recv(timeout=5)
        sender = threading.Thread(
            target=lambda: [agent.send(np.full(16_000, 500, "<i2").tobytes()) for _ in range(60)], daemon=True
        )
        sender.start()
        wait_until(lambda: store.unspoken_s > 4.5)
        time.sleep(0.3)
        assert store.unspoken_s <= 5.0
        taken = 0
        while taken < 60 * RATE_HZ * 0.99:
            got = store.take(FPS)
            taken += len(got.samples) - got.silent_samples
            time.sleep(0.005)
        assert store.dropped_samples == 0


def test_an_agent_far_ahead_interrupts_at_once_and_all_of_its_sound_is_dropped() -> None:
    """An answer of 90 s in one burst, where 30 s have room and nothing is spoken."""
    with listening(backlog_s=30.0) as (source, url, store), connect(url) as agent:
        source.on_interrupt = store.interrupt
        agent.recv(timeout=5)
        for _ in range(90):
            agent.send(np.full(16_000, 8000, "<i2").tobytes())
        wait_until(lambda: store.unspoken_s > 29.5)
        agent.send(json.dumps({"type": "interrupt"}))
        assert json.loads(agent.recv(timeout=5))["dropped_s"] == pytest.approx(90, abs=0.1)
        time.sleep(0.3)
        assert store.unspoken_s == 0
        agent.send(np.full(16_000, 8000, "<i2").tobytes())
        wait_until(lambda: store.unspoken_s > 0.9)


def test_the_sound_of_an_agent_that_left_is_spoken_and_the_next_is_heard_behind_it() -> None:
    with listening(backlog_s=5.0) as (source, url, store):
        for n_seconds in (20, 2):
            wait_until(lambda: not source._busy.locked())
            with connect(url) as agent:
                agent.recv(timeout=5)
                agent.send(np.full(16_000 * n_seconds, 500, "<i2").tobytes())
                if n_seconds == 2:
                    agent.send(json.dumps({"type": "end"}))
        taken = 0
        while not (store.ended and not store.unspoken_s):
            got = store.take(FPS)
            taken += len(got.samples) - got.silent_samples
            time.sleep(0.005)
    assert taken / RATE_HZ == pytest.approx(22, abs=0.05)


def test_an_agent_beyond_what_is_kept_is_slowed_down_and_not_thrown_out(monkeypatch) -> None:
    """Its answers to pings would lie unread: nobody waits for them, the system finds out who is gone."""
    monkeypatch.setattr(listen, "AHEAD_BYTES", 4 * RATE_HZ)
    connections, listen_to = [], ListenSource._listen_to

    def note(source: ListenSource, connection: ServerConnection) -> None:
        connections.append(connection)
        listen_to(source, connection)

    monkeypatch.setattr(ListenSource, "_listen_to", note)
    with listening(backlog_s=1.0) as (source, url, store), connect(url) as agent:
        agent.recv(timeout=5)
        sender = threading.Thread(
            target=lambda: [agent.send(np.full(16_000, 500, "<i2").tobytes()) for _ in range(100)],
            daemon=True,
        )
        sender.start()
        wait_until(lambda: store.unspoken_s > 0.7)
        assert getattr(connections[0], "keepalive_thread", None) is None
        assert connections[0].socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        taken = 0
        while taken < 100 * RATE_HZ * 0.99:
            assert len(source._ahead._sound) <= 4 * 1.01 * RATE_HZ
            got = store.take(FPS)
            taken += len(got.samples) - got.silent_samples
            time.sleep(0.002)
        sender.join(5)


def test_what_strangers_and_dying_agents_do_is_no_news(caplog) -> None:
    """No traceback of it: an agent that dies, names of tokens and paths that are none, and no HTTP at all."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with listening("s3cr\u00e9t") as (source, url, store):
        for line, status in (
            (b"GET / HTTP/1.1\r\nAuthorization: Bearer caf\xe9\r\n", b" 401 "),
            (b"GET / HTTP/1.1\r\nAuthorization: Bearer \xc3\xa9\r\nAuthorization: Bearer x\r\n", b" 401 "),
            (b"GET //[ HTTP/1.1\r\n", b" 401 "),
            (b"GET //[?token=%ff HTTP/1.1\r\n", b" 401 "),
            (b"GET / HTTP/1.1\r\nAuthorization: Bearer s3cr\xc3\xa9t\r\n", b" 101 "),
        ):
            with socket.create_connection(("127.0.0.1", source.address.port), 5) as stranger:
                stranger.sendall(line + b"Host: x\r\n" + upgrade + key)
                assert status in stranger.recv(1000).partition(b"\r\n")[0]
        with socket.create_connection(("127.0.0.1", source.address.port), 5) as stranger:
            stranger.sendall(b"\x16\x03\x01\x00\r\n\r\n")
            with suppress(OSError):
                stranger.recv(1000)
        wait_until(lambda: not source._busy.locked())
        agent = connect(url + "?token=s3cr%C3%A9t")
        agent.recv(timeout=5)
        agent.send(np.zeros(16_000, "<i2").tobytes())
        agent.socket.shutdown(socket.SHUT_RDWR)  # no close frame
        wait_until(lambda: not source._busy.locked() and store.arrived_samples > 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_of_strangers_only_so_many_are_listened_to_at_once(monkeypatch) -> None:
    monkeypatch.setattr(listen, "MOST_CONNECTIONS", 3)
    with listening() as (source, url, _store):
        place = ("127.0.0.1", source.address.port)
        strangers = [socket.create_connection(place, 5) for _ in range(3)]
        time.sleep(0.3)
        with socket.create_connection(place, 5) as one_more:
            assert one_more.recv(10) == b""
        for stranger in strangers:
            stranger.close()
        wait_until(lambda: comes_in(url))


@pytest.mark.parametrize("stranger", ["silent", "nonsense", "busy", "the agent itself"])
def test_nobody_who_stays_delays_the_end(stranger) -> None:
    """Connected and waiting, with no HTTP, or turned away and not leaving; an agent that does not close gets a second."""
    with listening() as (source, url, store), ExitStack() as stack:
        place = ("127.0.0.1", source.address.port)

        def call(words: bytes = b"") -> socket.socket:
            line = stack.enter_context(socket.create_connection(place, 5))
            line.sendall(words)
            return line

        upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        upgrade += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        end = b'{"type": "end"}'
        if stranger == "the agent itself":
            agent = call(upgrade)
            agent.recv(1000)
            agent.sendall(bytes([0x81, 0x80 | len(end), 0, 0, 0, 0]) + end)
        else:
            with connect(url) as polite:
                polite.recv(timeout=5)
                call({"silent": b"", "nonsense": b"\x16\x03\x01\r\n", "busy": upgrade}[stranger])
                time.sleep(0.2)
                polite.send(end.decode())
        began_s = time.monotonic()
        wait_until(lambda: store.ended, 5)
        assert time.monotonic() - began_s < (listen.CLOSING_S + 1 if stranger == "the agent itself" else 0.8)


def comes_in(url: str) -> bool:
    with suppress(OSError, WebSocketException, EOFError):
        connect(url, open_timeout=5).close()
        return True
    return False


def test_an_agent_comes_in_over_ipv6_too() -> None:
    if not has_ipv6():
        pytest.skip("this machine has no ::1")
    source = ListenSource(Address("::1", 0), PcmFormat(), None, timeline(), Clock(), pytest.fail)
    with running(source), connect(f"ws://{source.address}/") as agent:
        assert json.loads(agent.recv(timeout=5))["type"] == "ready"


def test_beyond_this_machine_a_token_is_needed() -> None:
    with pytest.raises(UsageError, match="token"):
        parse_listen("0.0.0.0:9000")
    assert parse_listen("0.0.0.0:9000", token="x").where == "0.0.0.0:9000"
    assert parse_listen("9000").where == "127.0.0.1:9000"


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000", ":-1"])
def test_an_address_that_is_none_is_explained(text) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_address("--metrics", text)


def test_no_thread_of_a_source_lives_on() -> None:
    """Every server of this file has ended with their tests."""
    assert not [thread for thread in threading.enumerate() if thread.name in ("source", "listen")]

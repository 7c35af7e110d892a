"""A voice agent's WebSocket: what it may do, who may use it, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from stream_parts import FPS, running, timeline, wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from flashtalk_cli.config import PcmFormat
from flashtalk_cli.errors import UsageError
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
        wait_until(lambda: source.state == "waiting")
        with connect(url) as agent:
            agent.recv(timeout=5)
            agent.send(np.zeros(1600, "<i2").tobytes())
            agent.send(json.dumps({"type": "end"}))
            wait_until(lambda: store.ended)


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
        wait_until(lambda: source.state == "waiting")
        for message, code in (("{}", UNFIT), ("[1]", UNFIT), (b"\0" * (MESSAGE_BYTES + 2), 1009)):
            time.sleep(0.05)
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

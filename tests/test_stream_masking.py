"""The secrets in the address of a sound: not in what is shown, logged or warned of, and in no process list."""

from __future__ import annotations

import logging
import socket
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_parts import running, timeline, wait_until

from flashtalk_cli.config import SoundSource
from flashtalk_cli.live import sources
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.masking import HIDDEN, masked, shown_address
from flashtalk_cli.live.reading import reads_lists
from flashtalk_cli.live.sources import FfmpegSource


@settings(max_examples=100)
@given(*[st.from_regex(r"[A-Za-z0-9]{8,20}", fullmatch=True) for _ in range(5)])
def test_an_address_is_shown_without_its_secrets(user, password, folder, key, token) -> None:
    url = f"rtmp://{user}:{password}@media.example:1935/app/{folder}/{key}?token={token}"
    text = masked(
        url, f"{url}: failed; stream {key} of {user} ({password}, {token}) in app/{folder}, '{folder}'"
    )
    for secret in (user, password, folder, key, token):
        assert secret not in text.replace("media.example", "")
    assert "media.example:1935" in text


def test_addresses_to_which_one_leads_are_shown_without_their_secrets_too() -> None:
    """Where a server sends one on, what a cut line leaves of an address; words that are in every text stay."""
    url = "https://host.example/audio/sk-SECRET/list.m3u8"
    assert (
        masked(url, "GET https://cdn.example:99/x?sig=ALSO: gone") == "GET https://cdn.example:99/***: gone"
    )
    assert masked(url, f"Impossible to open '{url[:36]}") == "Impossible to open 'https://host.example/***"
    assert masked(url, "no audiofile; audio/sk-SECRET") == f"no audiofile; {HIDDEN}/{HIDDEN}"
    assert masked("rtmp://[", "rtmp://[ is none") == f"{HIDDEN} is none"
    assert shown_address("rtmp://[") == HIDDEN


def test_what_ffmpeg_says_of_a_source_is_logged_without_its_secrets(caplog) -> None:
    caplog.set_level(logging.DEBUG, "flashtalk_cli")
    store, warnings = timeline(), []
    where = "rtmp://user:PASSWORD@127.0.0.1:9/live/sk-SECRET/name?token=ALSO"
    source = FfmpegSource(SoundSource(kind="url", where=where), False, store, Clock(), warnings.append)
    with running(source):
        wait_until(lambda: bool(warnings))
    assert "ffmpeg: " in caplog.text
    for text in (caplog.text, *warnings):
        assert not any(secret in text for secret in ("PASSWORD", "SECRET", "ALSO"))


@pytest.mark.parametrize(("where", "warned"), [("tcp://127.0.0.1:9/", 0), ("tcp://127.0.0.1:9/KEY", 1)])
def test_a_key_that_ps_shows_is_warned_of(monkeypatch, where, warned) -> None:
    """An ffmpeg that reads no lists gets the address on its command line."""
    monkeypatch.setattr(sources, "reads_lists", lambda: False)
    warnings = []
    source = FfmpegSource(SoundSource(kind="url", where=where), False, timeline(), Clock(), warnings.append)
    with running(source):
        wait_until(lambda: source.state == "waiting")
    assert sum("other users of this machine can see it" in text for text in warnings) == warned
    assert not any("KEY" in text for text in warnings)


def test_the_address_of_a_source_that_fails_is_warned_of_without_its_key() -> None:
    store, warnings = timeline(), []
    where = "rtmp://127.0.0.1:9/live/sk-SECRET?token=ALSO"
    source = FfmpegSource(SoundSource(kind="url", where=where), False, store, Clock(), warnings.append)
    with running(source):
        wait_until(lambda: bool(warnings))
    assert "127.0.0.1:9" in warnings[0]
    assert "SECRET" not in warnings[0]
    assert "ALSO" not in warnings[0]


def test_the_address_of_a_source_is_on_no_command_line(tmp_path) -> None:
    """ffmpeg reads it, with its options, from a pipe; `ps` shows neither key nor password."""
    if not reads_lists():
        pytest.skip("this ffmpeg takes an address on its command line only")
    store = timeline()
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"tcp://user:PASSWORD@127.0.0.1:{server.getsockname()[1]}/sk'SECRET?token=ALSO"
        with running(
            FfmpegSource(SoundSource(kind="url", where=where), False, store, Clock(), pytest.fail)
        ) as source:
            server.settimeout(10)
            line, _ = server.accept()
            assert source._reading
            arguments = Path(f"/proc/{source._reading._process.pid}/cmdline").read_bytes()
            with wave.open(str(tmp_path / "a.wav"), "wb") as file:
                file.setparams((1, 2, 48_000, 0, "NONE", ""))
                file.writeframes(np.full(48_000, 3000, "<i2").tobytes())
            line.sendall((tmp_path / "a.wav").read_bytes())
            line.close()
            wait_until(lambda: store.ended)
    assert b"ffmpeg" in arguments
    assert not any(secret in arguments for secret in (b"SECRET", b"PASSWORD", b"ALSO"))
    assert store.unspoken_s == pytest.approx(1.0, abs=0.05)

"""Targets: what is accepted, what is shown, and that a secret is in nothing that anybody may read."""

from __future__ import annotations

import os
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import OutputError, UsageError
from flashtalk_cli.media.ffmpeg import candidates, find_ffmpeg
from flashtalk_cli.media.live import commands
from flashtalk_cli.media.live.commands import Coding, encoder_command, live_codec, reads_presets, sending
from flashtalk_cli.media.live.targets import Kind, Target, parse_target, resolve_secret

# Capitals, so that no secret is a part of what may be shown.
SECRETS = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~", max_size=20).map(lambda text: f"ZQ{text}ZQ")
ODD_SECRETS = st.text("ABCXYZ019 &=#%+/:@?é'\"", min_size=1, max_size=12).map(lambda text: f"Q{text}Q")
HOSTS = st.sampled_from(["live.example.org", "127.0.0.1", "[::1]"])
PORTS = st.integers(1, 65535)


def everything_shown(target: Target) -> str:
    """All that may reach a log, an error or a metric, ffmpeg's own words with the address in them included."""
    words = [f"{secret}: Connection refused" for secret in (target.url, *target.secrets)]
    return " ".join([target.shown, repr(target), *map(target.masked, words)])


def visible(target: Target) -> str:
    return "\0".join(sending(target, 25, "").command)


@settings(max_examples=150)
@given(HOSTS, PORTS, st.lists(SECRETS, min_size=1, max_size=3), st.sampled_from(["rtmp", "rtmps"]))
def test_a_stream_key_is_never_shown(host, port, words, scheme):
    """The key, its query, and a name and password before the host."""
    key = f"{words[0]}?token={words[-1]}&sign={words[0]}"
    for user in ("", f"{words[-1]}:{words[0]}@"):
        target = parse_target("rtmp", f"{scheme}://{user}{host}:{port}/live/{key}")
        assert target.shown == f"{scheme}://{'***@' if user else ''}{host}:{port}/live/***"
        assert not [word for word in words if word in everything_shown(target)]
        if reads_presets(find_ffmpeg()) and not user:
            assert not [word for word in words if word in visible(target)]


@settings(max_examples=150)
@given(HOSTS, PORTS, ODD_SECRETS, SECRETS)
def test_srt_passphrases_and_stream_ids_are_never_shown(host, port, odd, plain):
    """Percent-encoded or not, in parameters known and unknown."""
    assume(odd not in plain and plain not in odd)
    query = f"mode=caller&latency=120&passphrase={quote(odd, safe='')}&streamid={plain}&token={plain}"
    target = parse_target("srt", f"srt://{host}:{port}?{query}")
    assert (
        target.shown == f"srt://{host}:{port}?mode=caller&latency=120&passphrase=***&streamid=***&token=***"
    )
    for secret in (odd, quote(odd, safe=""), plain):
        assert secret not in everything_shown(target)
    if reads_presets(find_ffmpeg()):
        without = parse_target("srt", target.url.replace(f"&token={plain}", ""))
        assert quote(odd, safe="") not in visible(without)
        assert plain not in visible(without)
        assert f"passphrase={odd}\n" in sending(without, 25, "").preset.decode()


@settings(max_examples=100)
@given(HOSTS, st.lists(SECRETS, min_size=1, max_size=3), SECRETS)
def test_a_whip_address_is_shown_as_its_host(host, path, token):
    target = parse_target("whip", f"https://{host}/{'/'.join(path)}?key={token}")
    assert target.shown == f"https://{host}/***"
    assert not [word for word in (*path, token) if word in everything_shown(target)]


@settings(max_examples=300)
@given(st.sampled_from(["rtmp", "srt", "whip", "udp"]), st.text(max_size=40))
def test_any_text_is_a_target_or_one_line_that_does_not_repeat_it(kind: Kind, text):
    secret = "TOPSECRET" + text
    place = "host/live" if kind == "rtmp" else "host"  # the application, before a key, is no secret
    for given_text in (
        secret,
        f"{kind}://{secret}",
        f"{kind}://{place}/{secret}",
        f"{kind}://u:{secret}@h:1/a/b",
    ):
        said, host = everything_said(kind, given_text)
        assert "\n" not in said
        assert "TOPSECRET" not in said or "topsecret" in host


def test_the_only_word_behind_an_rtmp_host_may_be_the_key():
    target = parse_target("rtmp", "rtmp://host/TOPSECRET?0")
    assert "TOPSECRET" not in everything_shown(target)


def everything_said(kind: Kind, text: str) -> tuple[str, str]:
    """What is shown of a text, whether it is a target or refused, and the host in it: that is no secret."""
    try:
        target = parse_target(kind, text)
    except UsageError as error:
        return str(error), ""
    return everything_shown(target), target.shown.partition("://")[2].partition("/")[0].lower()


def test_a_whip_token_is_sent_as_such_and_not_in_the_address():
    target = parse_target("whip", "https://:TOP%20SECRET@host/PATH")
    assert target.shown == "https://***@host/***"
    command = sending(target, 25, "").command
    assert command[-1] == "https://host/PATH"
    assert "SECRET" not in everything_shown(target)
    assert "TOP SECRET" in command or reads_presets(command[0])


def test_an_address_is_read_from_a_file_or_a_variable(tmp_path, monkeypatch):
    url = "rtmp://live.example.org/app/KEY"
    (tmp_path / "url").write_text(url + "\n")
    monkeypatch.setenv("STREAM_URL", url)
    plain = parse_target("rtmp", url)
    assert parse_target("rtmp", f"@{tmp_path}/url") == parse_target("rtmp", "env:STREAM_URL") == plain
    assert resolve_secret("--token", "word") == "word"


@pytest.mark.parametrize(
    ("kind", "text", "word"),
    [
        ("rtmp", "", "empty"),
        ("rtmp", "env:NOT_SET_ANYWHERE", "no environment variable"),
        ("rtmp", "@/no/such/file", "No such file"),
        ("rtmp", "http://host/app/KEY", "rtmp:// or rtmps://"),
        ("rtmp", "rtmp:///app/KEY", "no host"),
        ("rtmp", "rtmp://host/app", "no stream key"),
        ("rtmp", "rtmp://host:99999/app/KEY", "cannot be understood"),
        ("rtmp", "rtmp://host/app/KEY AND MORE", "spaces"),
        ("srt", "srt://host", "no port"),
        ("srt", "srt://:1234?mode=listener", "no host"),
        ("srt", "srt://host:1?mode=listener", "that listens"),
        ("udp", "udp://host", "no port"),
        ("whip", "whip://host/KEY", "http:// or https://"),
        ("file", "video.webm", r"\.mp4, \.mov, \.mkv"),
        ("file", "", "no name"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(kind, text, word):
    with pytest.raises(UsageError, match=word) as raised:
        parse_target(kind, text)
    assert "\n" not in str(raised.value)
    assert "KEY" not in str(raised.value).replace("APP/KEY", "")


def test_a_long_application_keeps_ffmpegs_cut():
    """host/a/b/c: application a/b, stream c; what is secret of it is asked for in the preset."""
    target = parse_target("rtmp", "rtmp://host/app/INSTANCE/KEY?x=1")
    if reads_presets(find_ffmpeg()):
        assert sending(target, 25, "").preset == b"rtmp_app=app/INSTANCE\nrtmp_playpath=KEY?x=1\n"


def test_a_key_too_long_for_a_preset_goes_on_the_command_line_and_that_is_known():
    how = sending(parse_target("rtmp", "rtmp://host/app/" + "K" * 1200), 25, "")
    assert how.exposed
    assert how.preset == b""
    assert how.command[-1].endswith("K" * 1200)


@pytest.mark.parametrize(
    ("kind", "text", "allowed"),
    [
        ("rtmp", "rtmp://host/app/KEY", "rtmp,tcp"),
        ("rtmp", "rtmps://host/app/KEY", "rtmps,tls,tcp"),
        ("srt", "srt://host:1", "srt"),
        ("udp", "udp://host:1", "udp"),
        ("hls", "folder", "file"),
        ("stdout", "-", "pipe"),
    ],
)
def test_each_ffmpeg_is_given_the_protocols_it_needs_and_no_other(kind, text, allowed):
    words = sending(parse_target(kind, text), 25, "").command
    given_ = [words[at + 1] for at, word in enumerate(words) if word == "-protocol_whitelist"]
    assert given_ == ["pipe", allowed]
    coding = Coding(live_codec(Encoding(), 64, 64), 18, 6000, 64, 64, 25, 1, False)
    words = tuple(encoder_command(coding, 9))
    assert [words[at + 1] for at, word in enumerate(words) if word == "-protocol_whitelist"] == [
        "pipe",
        "pipe",
    ]


def test_an_ffmpeg_that_cannot_send_is_told_in_one_line_before_anything_else(monkeypatch):
    """And another one of this machine is taken where it can."""
    monkeypatch.setattr(commands, "listed", lambda program, what: frozenset())
    for kind, text in (("whip", "https://host/KEY"), ("srt", "srt://host:1"), ("hls", "folder")):
        with pytest.raises(OutputError, match="cannot send") as raised:
            sending(parse_target(kind, text), 25, "")
        assert "\n" not in str(raised.value)
        assert "KEY" not in str(raised.value)
    monkeypatch.setattr(
        commands, "listed", lambda program, what: {"whip", "https"} if program == "b" else set()
    )
    monkeypatch.setattr(commands, "candidates", lambda: iter(["a", "b"]))
    assert sending(parse_target("whip", "https://host/KEY"), 25, "").command[0] == "b"


def test_an_ffmpeg_that_keeps_the_key_unseen_is_taken_before_one_that_shows_it(monkeypatch):
    """Of those that can send; where there is no secret, or none keeps it, the usual one."""
    monkeypatch.setattr(commands, "listed", lambda program, what: frozenset({"flv", "rtmp", "mpegts", "udp"}))
    monkeypatch.setattr(commands, "find_ffmpeg", lambda: "usual")
    monkeypatch.setattr(commands, "candidates", lambda: iter(["usual", "other"]))
    monkeypatch.setattr(commands, "reads_presets", lambda program: program == "other")
    with_key, without = parse_target("rtmp", "rtmp://h/app/KEY"), parse_target("udp", "udp://h:1")
    assert sending(with_key, 25, "").command[0] == "other"
    assert not sending(with_key, 25, "").exposed
    assert sending(without, 25, "").command[0] == "usual"
    monkeypatch.setattr(commands, "reads_presets", lambda program: False)
    assert sending(with_key, 25, "").command[0] == "usual"
    assert sending(with_key, 25, "").exposed


@pytest.mark.parametrize("program", sorted(set(candidates())))
def test_asking_whether_presets_are_followed_leaves_no_descriptor_open(program):
    reads_presets.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    assert reads_presets(program) in (True, False)
    assert len(os.listdir("/proc/self/fd")) == before

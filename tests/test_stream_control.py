"""How a stream is steered and watched: the control socket, the figures for Prometheus, and the small web server."""

from __future__ import annotations

import json
import stat
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from stream_parts import STATUS

from flashtalk_cli.errors import UsageError
from flashtalk_cli.live import control
from flashtalk_cli.live.address import Address, check_free
from flashtalk_cli.live.control import Control, ask
from flashtalk_cli.live.status import prometheus
from flashtalk_cli.live.web import Web


@pytest.fixture
def socket_path(tmp_path) -> Path:
    return tmp_path / "control.sock"


def refuse(request: dict) -> dict:
    if request.get("command") == "crash":
        raise RuntimeError("boom")
    if request.get("command") != "status":
        raise UsageError("commands are: status")
    return {"state": "idle"}


def test_the_control_socket_is_its_owners_alone_and_gone_afterwards(socket_path) -> None:
    with Control(socket_path, refuse):
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        assert ask(socket_path, {"command": "status"}) == {"state": "idle"}
        with pytest.raises(UsageError, match="commands are"):
            ask(socket_path, {"command": "dance"})
        with pytest.raises(UsageError, match="internal error RuntimeError"):
            ask(socket_path, {"command": "crash"})
    assert not socket_path.exists()
    with pytest.raises(UsageError, match="no stream listens"):
        ask(socket_path, {"command": "status"})


def test_a_socket_left_by_a_killed_stream_is_taken_over_and_a_living_one_is_not(socket_path) -> None:
    import socket

    left = socket.socket(socket.AF_UNIX)
    left.bind(str(socket_path))
    left.close()
    with Control(socket_path, refuse):
        with pytest.raises(UsageError, match="--control"):
            Control(socket_path, refuse)
        assert ask(socket_path, {"command": "status"}) == {"state": "idle"}


def test_nonsense_on_the_control_socket_is_answered(socket_path) -> None:
    import socket

    with Control(socket_path, refuse), socket.socket(socket.AF_UNIX) as line:
        line.settimeout(5)
        line.connect(str(socket_path))
        answers = line.makefile("rb")
        for nonsense in (b"\xff\xfe\n", b"[]\n", b"7\n", b"{}\n", b'{"command": ["status"]}\n'):
            line.sendall(nonsense)
            assert json.loads(answers.readline())["ok"] is False
        line.sendall(b'{"command": "status"}\n')
        assert json.loads(answers.readline())["ok"] is True


def test_the_one_stream_that_runs_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="no stream"):
        control.find_socket()
    path = control.default_socket()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with Control(path, refuse):
        assert control.find_socket() == path
        with Control(path.with_name("other.sock"), refuse), pytest.raises(UsageError, match="2 streams"):
            control.find_socket()
    path.parent.chmod(0o755)
    with pytest.raises(UsageError, match="yours alone"):
        control.default_socket()


def test_every_line_for_prometheus_is_well_formed() -> None:
    import re

    text = prometheus(STATUS)
    sample = re.compile(
        r'^flashtalk_[a-z_]+(\{[a-z_]+="(\\.|[^"\\])*"(,[a-z_]+="(\\.|[^"\\])*")*\})? (-?[0-9.e+-]+|NaN)$'
    )
    families = set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            families.add(line.split()[2])
        elif not line.startswith("# HELP"):
            assert sample.match(line), line
            assert re.match(r"[a-z_]+", line)[0] in families
    assert text.endswith("\n")
    assert 'quantile="0.95"} NaN' in text


def get(url: str, host: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def free_port() -> int:
    import socket

    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def test_the_web_server_serves_what_it_should_and_nothing_else(tmp_path) -> None:
    (tmp_path / "hls").mkdir()
    (tmp_path / "hls/index.m3u8").write_text("#EXTM3U\n")
    (tmp_path / "hls/key.txt").write_text("secret")
    (tmp_path / "other.ts").write_text("secret")
    port = free_port()
    with Web(f"127.0.0.1:{port}", lambda: STATUS, tmp_path / "hls"):
        base = f"http://127.0.0.1:{port}"
        assert get(base + "/metrics")[1].startswith(b"# HELP")
        assert b"<video" in get(base + "/")[1]
        assert json.loads(get(base + "/status")[1])["state"] == "idle"
        assert get(base + "/hls/index.m3u8") == (200, b"#EXTM3U\n")
        for path in (
            "/hls/key.txt",
            "/hls/../other.ts",
            "/hls/%2e%2e/other.ts",
            "/hls/.ts",
            "/nothing",
            "/hls/a.ts",
        ):
            assert get(base + path)[0] == 404, path
        assert get(base + "/status", host="evil.example")[0] == 403
        with pytest.raises(UsageError, match="cannot listen"):
            check_free("--metrics", Address("127.0.0.1", port))
    with Web(f"127.0.0.1:{(second := free_port())}", lambda: STATUS, None):
        assert get(f"http://127.0.0.1:{second}/metrics")[0] == 200
        assert get(f"http://127.0.0.1:{second}/")[0] == 404

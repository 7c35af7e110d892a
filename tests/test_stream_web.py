"""The small web server: what it serves and to whom, and what clients may do to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest
from stream_parts import STATUS, has_ipv6, wait_until

from flashtalk_cli.errors import UsageError
from flashtalk_cli.live import web
from flashtalk_cli.live.address import Address, check_free
from flashtalk_cli.live.web import Web


def get(url: str, host: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def free_port() -> int:
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


def test_clients_that_leave_or_ask_for_nonsense_are_no_news(tmp_path, caplog, capfd) -> None:
    """No traceback of a browser that leaves in the middle of a segment, nor of a host that is none."""
    (tmp_path / "big.ts").write_bytes(bytes(32 << 20))
    port = free_port()
    with Web(f"127.0.0.1:{port}", lambda: STATUS, tmp_path):
        with socket.create_connection(("127.0.0.1", port), 5) as browser:
            browser.sendall(f"GET /hls/big.ts HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            browser.recv(1000)
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for request in (
            "GET / HTTP/1.1\r\nHost: [\r\n\r\n",
            f"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
            f"GET /hls/a\0.ts HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), 5) as stranger:
                stranger.sendall(request.encode())
                assert stranger.recv(1000).split()[1] in (b"400", b"404")
        wait_until(lambda: not [t for t in threading.enumerate() if "process_request" in t.name])
    assert capfd.readouterr().err == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_fault_of_ours_while_answering_is_told(caplog) -> None:
    port = free_port()
    with Web(f"127.0.0.1:{port}", lambda: {}, None), contextlib.suppress(OSError, http.client.HTTPException):
        get(f"http://127.0.0.1:{port}/metrics")
    assert "a request failed" in caplog.text


def test_only_so_many_are_answered_at_once(monkeypatch) -> None:
    monkeypatch.setattr(web, "MOST_CONNECTIONS", 3)
    port = free_port()
    with Web(f"127.0.0.1:{port}", lambda: STATUS, None):
        strangers = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(3)]
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port), 5) as one_more:
            assert one_more.recv(10) == b""
        for stranger in strangers:
            stranger.close()
        wait_until(lambda: not [t for t in threading.enumerate() if "process_request" in t.name])
        assert get(f"http://127.0.0.1:{port}/metrics")[0] == 200


def test_the_web_server_listens_over_ipv6_too() -> None:
    if not has_ipv6():
        pytest.skip("this machine has no ::1")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as line:
        port = line.getsockname()[1]
    check_free("--metrics", Address("::1", port))
    with Web(f"[::1]:{port}", lambda: STATUS, None):
        assert get(f"http://[::1]:{port}/metrics")[0] == 200

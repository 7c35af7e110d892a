"""How a stream is steered and watched: the control socket, the figures for Prometheus, and the small web server."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
from pathlib import Path

import pytest
from stream_parts import STATUS

from flashtalk_cli.errors import FlashtalkError, InputError, UsageError
from flashtalk_cli.live import control
from flashtalk_cli.live.control import Control, ask, check_control
from flashtalk_cli.live.status import prometheus


@pytest.fixture
def socket_path(tmp_path) -> Path:
    return tmp_path / "control.sock"


def refuse(request: dict) -> dict:
    if request.get("command") == "crash":
        raise RuntimeError("boom")
    if request.get("command") == "picture":
        raise InputError("no.png: there is no such file")
    if request.get("command") != "status":
        raise UsageError("commands are: status")
    return {"state": "idle"}


def test_the_control_socket_is_its_owners_alone_and_gone_afterwards(socket_path) -> None:
    with Control(socket_path, refuse):
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        assert ask(socket_path, {"command": "status"}) == {"state": "idle"}
        with pytest.raises(UsageError, match="commands are"):
            ask(socket_path, {"command": "dance"})
        with pytest.raises(FlashtalkError, match="internal error RuntimeError") as crashed:
            ask(socket_path, {"command": "crash"})
        assert crashed.value.exit_code == 1
        with pytest.raises(InputError, match=r"^no\.png: there is no such file$"):
            ask(socket_path, {"command": "picture"})
    assert not socket_path.exists()
    with pytest.raises(UsageError, match="no stream listens"):
        ask(socket_path, {"command": "status"})


def test_a_socket_left_by_a_killed_stream_is_taken_over_and_a_living_one_is_not(socket_path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(socket_path))
    left.close()
    check_control(socket_path)
    with Control(socket_path, refuse):
        with pytest.raises(UsageError, match="--control"):
            Control(socket_path, refuse)
        assert ask(socket_path, {"command": "status"}) == {"state": "idle"}


def test_what_is_no_socket_is_not_taken_for_one(socket_path) -> None:
    """A file, a folder, a link: none is deleted, and it is said before anything slow."""
    target = socket_path.with_name("target")
    target.write_text("mine")
    for make in (
        lambda: socket_path.write_text("mine"),
        socket_path.mkdir,
        lambda: socket_path.symlink_to(target),
    ):
        make()
        for attempt in (check_control, lambda path: Control(path, refuse)):
            with pytest.raises(UsageError, match=r"no socket.*--control"):
                attempt(socket_path)
        assert socket_path.lstat()
        socket_path.rmdir() if socket_path.is_dir() else socket_path.unlink()
    assert target.read_text() == "mine"


def test_the_place_of_a_control_socket_is_looked_at_beforehand(socket_path) -> None:
    check_control(socket_path)
    assert not socket_path.exists()
    with Control(socket_path, refuse), pytest.raises(UsageError, match=r"another stream.*--control"):
        check_control(socket_path)
    for path in (socket_path.with_name("x" * 200), socket_path / "no" / "folder"):
        with pytest.raises(UsageError, match=r"\(.*(too long|No such).*\); name another with --control"):
            check_control(path)


def test_a_socket_of_a_busy_stream_is_not_taken_for_a_dead_ones(socket_path) -> None:
    """It cannot answer at once, as so many wait already."""
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
        busy.bind(str(socket_path))
        busy.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(socket_path))
        with pytest.raises(UsageError, match="--control"):
            Control(socket_path, refuse)
        assert socket_path.exists()


def test_nonsense_on_the_control_socket_is_answered(socket_path) -> None:
    with Control(socket_path, refuse), socket.socket(socket.AF_UNIX) as line:
        line.settimeout(5)
        line.connect(str(socket_path))
        answers = line.makefile("rb")
        for nonsense in (
            b"\xff\xfe\n",
            b"[" * 5000 + b"\n",
            b"[]\n",
            b"7\n",
            b"{}\n",
            b'{"command": ["status"]}\n',
        ):
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

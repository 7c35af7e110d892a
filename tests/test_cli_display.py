"""What a run shows on a terminal and in a pipe, and what the log says of which rank."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from cli_parts import ROOT, RUN
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtalk_cli import events
from flashtalk_cli.cli import display


def test_plain_lines_are_few_and_say_speed_and_time_left(capsys):
    shown = display.PlainLines()
    for happened in RUN:
        shown.show(happened)
    assert capsys.readouterr().err.splitlines() == [
        "weights: mini on cpu",
        "weights: 5 of 10 MB",
        "chunk 3/3: 84/84 frames, 27.1 fps, 1.08x real time, 1:02 left",  # the first two came too soon
        "warning: the avatar is untrained",
        "done: /tmp/x.mp4, 84 frames, 3.36 s of video in 3.1 s, 1.08 times real time",
    ]


def test_bars_leave_stages_warnings_and_the_result_on_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with display.choose(json=False, video_on_stdout=False) as shown:
        assert isinstance(shown, display.Bars)
        for happened in RUN[:-1]:
            shown.show(happened)
        shown.log("[not markup] line of a log")
        shown.show(RUN[-1])
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    for text in (
        "28/84",
        "27.1 fps",
        "weights    mini on cpu",
        "[not markup] line",
        "done: /tmp/x.mp4",
        "1.08 times",
    ):
        assert text in plain, text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3661, "1:01:01"), (None, "?")])
def test_clock(seconds, text):
    assert display.clock(seconds) == text


@settings(max_examples=100)
@given(st.text())
def test_any_message_becomes_one_printable_line(text):
    line = display.one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.isprintable()


def test_an_interrupted_run_says_what_is_kept():
    kept = events.event("interrupted", path="/tmp/x.mp4.part", frames=56)
    assert display.describe(kept) == "interrupted: 56 frames are kept in /tmp/x.mp4.part"
    nothing, gone = (events.event("interrupted", path=None, frames=n) for n in (0, 28))
    assert display.describe(nothing) == "interrupted: nothing was rendered"
    assert display.describe(gone) == "interrupted: after 28 frames", "to standard output"


def test_a_stream_ends_without_a_speed_and_without_an_output_that_it_did_not_have():
    """A render's speed is its own; a stream takes as long as it lasts, and standard output is only named for one."""
    stream = {"frames": 303, "duration_s": 12.12, "elapsed_s": None}
    for fields, text in (
        ({"path": None, **stream}, "done: 303 frames, 12.12 s of video"),
        ({"path": "a.mp4", **stream}, "done: a.mp4, 303 frames, 12.12 s of video"),
        (
            {"path": None, **stream, "elapsed_s": 6.0},
            "done: standard output, 303 frames, 12.12 s of video in 6.0 s, 2.02 times real time",
        ),
    ):
        assert display.describe(events.event("done", **fields)) == text


def test_every_event_can_be_described():
    assert set(events.KINDS) - {"error"} == {e["event"] for e in RUN} | {"interrupted", "clip", "live"}
    assert display.describe(events.error(ValueError("x"))) == ""


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"state": "done", "frames": 25, "duration_s": 1.0, "elapsed_s": 2.0},
            "line 3: a.mp4: 25 frames, 1.00 s of video in 2.0 s, 0.50 times real time",
        ),
        ({"state": "failed", "type": "InputError", "message": "no"}, "line 3: a.mp4: InputError: no"),
        ({"state": "skipped"}, "line 3: a.mp4: skipped"),
    ],
)
def test_what_became_of_a_clip(fields, text):
    assert display.describe(events.event("clip", line=3, output="a.mp4", **fields)) == text


# Logging


def test_only_rank_0_says_more_than_warnings_and_others_say_who_they_are(capfd):
    code = (
        "import logging, warnings; from flashtalk_cli import log\n"
        "for rank in (0, 2):\n"
        "    log.setup(debug=True, rank=rank); ours = logging.getLogger('flashtalk_cli.x')\n"
        "    ours.debug('d%s', rank); ours.warning('w%s', rank); logging.getLogger('other').info('o')\n"
        "log.setup(); ours.info('quiet'); ours.error('loud'); warnings.warn('noise')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(" ", 2)[2] for line in ended.stderr.splitlines()[:3]]
    assert lines == [
        "DEBUG flashtalk_cli.x: d0",
        "WARNING flashtalk_cli.x: w0",
        "rank 2 WARNING flashtalk_cli.x: w2",
    ]
    assert ended.stderr.splitlines()[3:] == ["ERROR: loud"]
    assert ended.stdout == ""


def test_a_ranks_own_file_has_all_that_it_says():
    """Where others read together (here stdout) there are its warnings only."""
    code = (
        "import logging, sys; from flashtalk_cli import log; log.setup(debug=True, rank=1, console=sys.stdout)\n"
        "ours = logging.getLogger('flashtalk_cli.x'); ours.debug('d'); ours.warning('w')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own, together = (
        [line.split(" ", 2)[2] for line in text.splitlines()] for text in (ended.stderr, ended.stdout)
    )
    assert own == ["rank 1 DEBUG flashtalk_cli.x: d", "rank 1 WARNING flashtalk_cli.x: w"]
    assert together == own[1:]


def test_a_module_that_is_run_by_itself_is_one_of_ours(capfd):
    """Contract: under `python -m` a module is called __main__, and what it does is to be seen all the same."""
    code = "import logging; from flashtalk_cli import log; log.setup(debug=True); logging.getLogger(__name__).info('i')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr.rstrip().endswith("INFO __main__: i")

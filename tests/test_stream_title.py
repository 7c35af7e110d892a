"""What others on the machine can read in the process list of a stream: nothing secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashtalk_cli.cli.title import shown_command

ROOT = Path(__file__).resolve().parent.parent
SHOW = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from flashtalk_cli.cli.title import hide
hide([("rtmp", sys.argv[3])], None, None)
print(Path("/proc/self/cmdline").read_bytes().decode())
"""
KEY = "sk-7f3a-SECRET"


@pytest.mark.parametrize(
    ("words", "targets", "sound", "token", "seen"),
    [
        (["--rtmp", f"rtmp://h/app/{KEY}"], [("rtmp", f"rtmp://h/app/{KEY}")], None, None, "rtmp://h/app/"),
        ([f"--rtmp=rtmp://h/app/{KEY}"], [("rtmp", f"rtmp://h/app/{KEY}")], None, None, "--rtmp=rtmp://h/"),
        (
            ["--srt", f"srt://h:1?passphrase={KEY}"],
            [("srt", f"srt://h:1?passphrase={KEY}")],
            None,
            None,
            "srt",
        ),
        (["--whip", f"https://h/{KEY}"], [("whip", f"https://h/{KEY}")], None, None, "https://h/"),
        (["--audio", f"rtmp://u:{KEY}@h/a/{KEY}"], [], f"rtmp://u:{KEY}@h/a/{KEY}", None, "rtmp://h"),
        (["--listen", "9000", "--token", KEY], [], None, KEY, "--listen 9000"),
        ([f"--token={KEY}"], [], None, KEY, "--token="),
        (["--rtmp", "@key.txt", "--token", "env:T"], [("rtmp", "@key.txt")], None, "env:T", "@key.txt"),
    ],
)
def test_no_secret_is_in_the_title_and_all_else_is(words, targets, sound, token, seen) -> None:
    text = shown_command(["stream", "portrait of mine.png", *words, "-o", "x.mp4"], targets, sound, token)
    assert KEY not in text
    assert seen in text
    assert text.startswith("flashtalk stream 'portrait of mine.png' ")
    assert text.endswith(" -o x.mp4")


def test_an_address_that_is_none_is_left_to_the_command_line(tmp_path) -> None:
    assert shown_command(["--rtmp", "http://h"], [("rtmp", "http://h")], None, None)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_process_list_shows_the_masked_line() -> None:
    pytest.importorskip("setproctitle")
    words = [sys.executable, "-c", SHOW, "stream", "--rtmp", f"rtmp://h/app/{KEY}?token=ALSOSECRET"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "flashtalk stream --rtmp" in shown
    assert "SECRET" not in shown

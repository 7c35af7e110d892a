"""Where a sink of this machine writes: a recording that appears only when whole, or a folder of segments."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path

from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.files import shown
from flashtalk_cli.media.live.commands import PLAYLIST
from flashtalk_cli.media.part_file import PartFile, check_writable, part_path

OURS = re.compile(rf"segment-\d{{6,}}\.ts(\.tmp)?|{re.escape(PLAYLIST)}(\.tmp)?")


class Recording:
    """A part file that becomes the output. Written fragmented and left so: it plays however the run ends.

    A copy with the index in front, which a rendered video gets, would take minutes after hours on air.
    """

    def __init__(self, output: Path, overwrite: bool) -> None:
        self._output = output
        self._part = PartFile(output, overwrite)
        self.path = self._part.path
        self.descriptor = self._part.descriptor  # the lock, for the writing process to hold too

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written, or nothing is left to us."""
        return not self._part.held or self._part.is_empty()

    def publish(self) -> Path:
        """It is whole: give it its name, which is returned. Raises `OutputError`; the part then stays."""
        self._part.publish(self._part.path)
        return self._output

    def leave(self) -> Path | None:
        """It stays as the part file, which plays; None when nothing was written and nothing is left."""
        if not self._part.held:
            return None
        if self._part.is_empty():
            self._part.discard()
            return None
        self._part.release()
        return self._part.path


def next_name(recording: Path) -> Path:
    """The free name of the recording that follows one that was cut off: talk.mp4, talk-2.mp4, talk-3.mp4."""
    stem, _, number = recording.stem.rpartition("-")
    if not (stem and number.isdecimal() and recording.with_stem(stem).exists()):
        stem = recording.stem
    names = (recording.with_stem(f"{stem}-{n}") for n in count(2))
    return next(path for path in names if not path.exists() and not part_path(path).exists())


def check_folder(folder: Path, overwrite: bool = True) -> None:
    """`OutputError` when segments cannot be written there, or would replace what is there. Creates nothing."""
    if not folder.exists():
        check_writable(folder, overwrite=False)
        return
    check_writable(folder / PLAYLIST, overwrite=True)
    if overwrite:
        return
    try:
        found = sorted(filter(OURS.fullmatch, os.listdir(folder)))
    except OSError as error:
        raise _unfit(folder, error) from None
    if found:
        raise OutputError(
            f"{shown(folder)}: holds a stream already ({len(found)} files, such as {found[0]}); "
            "choose another folder or give --overwrite"
        )


def clear_folder(folder: Path, but_ours: bool = False) -> None:
    """The folder, made if need be, without the playlist and segments of an earlier run; other files stay.

    `but_ours`: what is there was written by this very run, and stays too.
    """
    try:
        folder.mkdir(exist_ok=True)
        for found in folder.iterdir():
            if not but_ours and OURS.fullmatch(found.name):
                found.unlink()
    except OSError as error:
        raise _unfit(folder, error) from None


def _unfit(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{shown(folder)}: cannot hold the stream ({error.strerror}); choose another folder")

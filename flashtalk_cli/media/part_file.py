"""`NAME.part`: where an output lies until it is whole, locked against a second run, published in one step."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from itertools import count
from pathlib import Path

from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.files import is_text, shown

log = logging.getLogger(__name__)

LOCK_S = 5.0  # for whoever holds the part file to let it go
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def part_path(output: Path) -> Path:
    """Where the output lies while it is being written."""
    return output.with_name(output.name + ".part")


def check_writable(output: Path, overwrite: bool) -> None:
    """`OutputError` when the name is taken (and may not be replaced) or the folder takes no file.

    Creates nothing.
    """
    if not is_text(output):
        raise OutputError(f"{shown(output)}: the name is not valid UTF-8; choose another")
    _check_free(output, overwrite)
    folder = output.parent
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        raise OutputError(
            f"{shown(output)}: folder {shown(folder)} does not exist; create it first"
        ) from None
    except OSError as error:
        raise OutputError(f"{shown(output)}: {error.strerror}; choose another folder") from None
    if not is_folder:
        raise OutputError(f"{shown(output)}: {shown(folder)} is not a folder; choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{shown(output)}: {shown(folder)} cannot be written to; choose another folder")


class PartFile:
    """The empty part file of an output, held by us; a living run's is never taken.

    What a dead run left in its part file is moved aside, to the first free of NAME.part.1, NAME.part.2, …, until
    the output is whole; with `keep` it stays, and is held. `descriptor` holds the lock: a child that inherits it
    keeps the lock as long as it lives.
    """

    def __init__(self, output: Path, overwrite: bool, *, keep: bool = False) -> None:
        check_writable(output, overwrite)
        self.output = output
        self.path = part_path(output)
        self._overwrite = overwrite
        self._aside: Path | None = None  # what a dead run left
        self.descriptor = _held(self.path)
        if not keep and not self.is_empty():
            self._aside = _move_aside(self.path)
            self.release()
            self.descriptor = _held(self.path)

    @property
    def held(self) -> bool:
        """Whether it is still ours: neither published nor released."""
        return self.descriptor >= 0

    def is_empty(self) -> bool:
        """Whether nothing has been written."""
        return os.fstat(self.descriptor).st_size == 0

    def publish(self, whole: Path) -> None:
        """Give `whole`, which is the part file or was made from it, the output's name; let the part go.

        Raises `OutputError` when the name was taken meanwhile or the folder refuses; the part then stays.
        """
        try:
            _sync(whole)
            if self._overwrite:
                os.replace(whole, self.output)
            else:
                _rename_to_free(whole, self.output)
        except FileExistsError:
            raise OutputError(
                f"{shown(self.output)}: appeared while it was being rendered and is left alone; "
                f"the video is in {shown(self.path)}"
            ) from None
        except OSError as error:
            raise OutputError(
                f"{shown(self.output)}: {error.strerror}; the video is in {shown(self.path)}"
            ) from None
        self.discard()
        if self._aside is not None:
            self._aside.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the part file and let go of it."""
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let go of the part file and leave it where it is."""
        if self.held:
            os.close(self.descriptor)
            self.descriptor = -1


def _held(path: Path) -> int:
    """A descriptor of the part file at `path`, which is made if need be, with its lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"{shown(path)}: another run is writing it; wait for it or choose another name"
        ) from None
    except OSError:
        log.debug("this file system has no locks: %s", path)
    return descriptor


def _move_aside(path: Path) -> Path:
    """Give what a dead run left a free name, which is returned, and say so."""
    for number in count(1):
        kept = path.with_name(f"{path.name}.{number}")
        try:
            _rename_to_free(path, kept)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from None
        log.warning(
            "%s of a run that was cut off is kept as %s until the new one is whole", shown(path), shown(kept)
        )
        return kept
    raise AssertionError("there is no end of names")


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{shown(path)}: cannot be written ({error.strerror}); choose another folder or name")


def _lock(descriptor: int) -> None:
    """Take the lock; the encoder of a run that was just killed holds it until it has written its last.

    Raises BlockingIOError when somebody keeps it, or has published and removed the file meanwhile.
    """
    give_up = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
        else:
            if os.fstat(descriptor).st_nlink == 0:
                raise BlockingIOError
            return


def _check_free(output: Path, overwrite: bool) -> None:
    try:
        found = output.lstat()
    except OSError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{shown(output)}: is a folder; give a file name")
    if not overwrite:
        raise OutputError(f"{shown(output)}: exists; choose another name or give --overwrite")


def _sync(path: Path) -> None:
    """Have the contents on the disk before the name says that they are there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_free(source: Path, target: Path) -> None:
    """Rename; `FileExistsError` when the name is taken. A link, unlike a rename, notices that by itself."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)
    else:
        os.unlink(source)

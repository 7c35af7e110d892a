"""Every error a user can meet, and the exit code of each.

    FlashtalkError               1   anything below that has no code of its own
    |- UsageError                2   a command line that makes no sense (Typer's own code too)
    |- ConfigError               3   a preset or --set: unknown key, wrong value
    |- InputError                4   a picture, a sound or a prompt that cannot be used
    |- ModelError                5   a model folder: missing, incomplete, wrong tensors
    |- OutputError               6   nowhere to write, the disk is full, ffmpeg failed
    |- DeviceError               7   no such device, out of memory, a kernel is missing
    |- WorkerError               8   a worker died or hung
    |  `- PeerLost               8   a worker lost another, whose own error is the one to show
    |- ClipsError                9   some clips of a manifest failed; all others are done
    `- SlowerError              10   a bench is slower than the report it was compared with, beyond noise
    (Ctrl-C or SIGTERM)        130   ended on request; what was rendered is kept

A message is one line: what is wrong, with the numbers, and the mend. `assert` is for
invariants of the program; these are for the world outside it.
"""

from __future__ import annotations


class FlashtalkError(Exception):
    """Base of all errors that end a command with one line and no traceback."""

    exit_code = 1


class UsageError(FlashtalkError):
    """The command line contradicts itself."""

    exit_code = 2


class ConfigError(FlashtalkError):
    """A preset or an override has an unknown key or a wrong value."""

    exit_code = 3


class InputError(FlashtalkError):
    """A picture, a sound or a prompt cannot be used."""

    exit_code = 4


class ModelError(FlashtalkError):
    """A model folder is missing, incomplete, or does not fit the program."""

    exit_code = 5


class OutputError(FlashtalkError):
    """The result cannot be written."""

    exit_code = 6


class DeviceError(FlashtalkError):
    """A device is absent, out of memory, or lacks what was asked of it."""

    exit_code = 7


class WorkerError(FlashtalkError):
    """A worker process died or hung."""

    exit_code = 8


class PeerLost(WorkerError):
    """A worker lost another one: an effect, whose cause is that one's error."""


class ClipsError(FlashtalkError):
    """Some clips of a manifest failed; all others are done."""

    exit_code = 9


class SlowerError(FlashtalkError):
    """A bench is slower than the report that it was compared with, beyond noise."""

    exit_code = 10


INTERRUPTED_EXIT_CODE = 130


def by_name(name: str) -> type[FlashtalkError]:
    """The error class of that name; `FlashtalkError` for a name that is none (a crash)."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, FlashtalkError) else FlashtalkError

"""How the tools that `python -m` runs end: as the program's own commands do."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, FlashtalkError


def told_in_a_line(command: Callable[[], object]) -> None:
    """Run a tool's command: an error of ours ends it with its line on stderr and its exit code."""
    try:
        command()
    except FlashtalkError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)

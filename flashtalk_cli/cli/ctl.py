"""`flashtalk ctl`: steer a stream that is on air."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

COMMANDS = {
    "status": None,
    "interrupt": None,
    "mute": None,
    "unmute": None,
    "prompt": "text",
    "picture": "path",
    "stop": None,
}


def ctl(
    command: Annotated[
        str,
        typer.Argument(metavar="COMMAND", help="status, interrupt, mute, unmute, prompt, picture or stop."),
    ],
    argument: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT|FILE]", show_default=False, help="Of prompt and picture."),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket", metavar="SOCKET", show_default=False, help="Which stream, when several are on air."
        ),
    ] = None,
) -> None:
    """Steer a stream: the answer is a line of JSON.

    interrupt drops what is not yet spoken; prompt and picture are taken over at the next chunk.
    """
    import json

    from flashtalk_cli.errors import UsageError
    from flashtalk_cli.live.control import ask, find_socket

    if command not in COMMANDS:
        raise UsageError(f"no command {command!r}; there are {', '.join(COMMANDS)}")
    wanted = COMMANDS[command]
    if (argument is not None) != (wanted is not None):
        raise UsageError(f"{command} takes {'a ' + wanted if wanted else 'nothing more'}")
    request: dict[str, str] = {"command": command}
    if wanted and argument is not None:
        request[wanted] = str(Path(argument).absolute()) if wanted == "path" else argument
    typer.echo(json.dumps(ask(socket or find_socket(), request)))

"""The command line: gathers the commands, and turns every way to end into a line and an exit code.

Nothing here or in the commands' modules imports torch, nor anything else that is slow, before
a command runs: `--help` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from flashtalk_cli.cli import bench, ctl, demo, doctor, models, presets, render, stream, train
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, FlashtalkError, UsageError

EPILOG = (
    "A first try: [bold]flashtalk demo[/bold]\n\n"
    "Exit codes: 0 done, 1 internal error, 2 command line, 3 preset or --set, 4 picture or sound, 5 model, "
    "6 output, 7 device, 8 worker, 9 some clips of a manifest, 10 slower than before, 130 interrupted."
)

app = typer.Typer(
    name="flashtalk",
    help="Give it a portrait and a voice, get a talking person.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_help_option=False,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("render", epilog=render.EXAMPLES)(render.render)
app.command("stream", epilog=stream.EXAMPLES)(stream.stream)
app.command("ctl")(ctl.ctl)
app.command("demo")(demo.demo)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.add_typer(presets.app, name="presets")
app.add_typer(models.app, name="models")
app.add_typer(train.app, name="train")
app.command("doctor")(doctor.doctor)

# Typer has carried its own click since 0.2x, and used the package before: this is the one in use.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def _version(wanted: bool) -> None:
    if wanted:
        from flashtalk_cli import __version__

        typer.echo(f"flashtalk {__version__}")
        raise typer.Exit


def _help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(context.get_help())
        raise typer.Exit


@app.callback()
def _flashtalk(
    # Typer's own option of this name makes every command import pydantic before it shows its help.
    help: Annotated[
        bool, typer.Option("--help", "-h", callback=_help, is_eager=True, help="Show this message and exit.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run a command line; its exit code. What went wrong is one line on stderr, and with --debug a traceback."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    command = typer.main.get_command(app)
    try:
        ended = command.main(list(arguments) or ["--help"], prog_name="flashtalk", standalone_mode=False)
        sys.stdout.flush()
        return ended if isinstance(ended, int) else 0
    except FlashtalkError as error:
        return _report(error, str(error), error.exit_code, debug)
    except _CommandLineError as error:
        return _report(error, _usage(error), UsageError.exit_code, debug=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FlashtalkError.exit_code
    except Exception as error:
        text = f"internal error {type(error).__name__}: {error}"
        return _report(error, text, FlashtalkError.exit_code, debug)


def _report(error: BaseException, text: str, exit_code: int, debug: bool) -> int:
    from flashtalk_cli.cli.display import one_line

    if debug:
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)
    elif exit_code == FlashtalkError.exit_code:  # of an internal error
        text += "; run again with --debug"
    typer.echo(typer.style("error:", fg="red", bold=True) + " " + one_line(text), err=True)
    return exit_code


def _usage(error: Exception) -> str:
    """A complaint about the command line, and where to read how it should look."""
    text = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "flashtalk"
    return f"{text[:1].lower()}{text[1:]}; see {path} --help"

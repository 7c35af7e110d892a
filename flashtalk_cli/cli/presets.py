"""`flashtalk presets`: what there is, and what is in it."""

from __future__ import annotations

from typing import Annotated

import typer

from flashtalk_cli.cli.options import Debug, Sets

app = typer.Typer(help="List presets, and show what is in one.")


@app.callback(invoke_without_command=True)
def _presets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show_list()


@app.command("list")
def show_list(debug: Debug = False) -> None:
    """List the presets that come with the program."""
    from flashtalk_cli import presets

    names = presets.names()
    width = max(map(len, names))
    for name in names:
        typer.echo(f"{name:<{width}}  {presets.load(name).description}")


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name, or a .yaml file.")],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """Print a preset with every value, as YAML: a start for one of your own."""
    from flashtalk_cli import presets

    typer.echo(presets.dump(presets.load(name, [presets.parse_set(text) for text in sets or ()])), nl=False)

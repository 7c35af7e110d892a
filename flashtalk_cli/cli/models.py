"""`flashtalk models`: which are here, fetching one, checking one."""

from __future__ import annotations

from typing import Annotated

import typer

from flashtalk_cli.cli.options import Debug
from flashtalk_cli.errors import ModelError

app = typer.Typer(help="List, fetch and check models.")

MAX_NAMES = 3  # tensors named in a line of `verify`


@app.callback(invoke_without_command=True)
def _models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show_list()


@app.command("list")
def show_list(debug: Debug = False) -> None:
    """List the models that are known or in FLASHTALK_HOME, and whether they are complete."""
    from flashtalk_cli.models.folder import list_models

    entries = list_models()
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        missing = f"missing {', '.join(entry.missing[:MAX_NAMES])}" if entry.missing else ""
        size = _size(entry.size_bytes)
        typer.echo(f"{entry.name:<{width}}  {entry.state:<10}  {size:>7}  {entry.path}  {missing}".rstrip())


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB" if n_bytes else ""


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known model, such as soulx-14b.")],
    debug: Debug = False,
) -> None:
    """Fetch a model and its speech encoder; an interrupted download goes on where it ended."""
    from flashtalk_cli.models import folder

    found = folder.pull(name)
    typer.echo(f"{found.name} is complete in {found.path}")


@app.command("verify")
def verify(
    name: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A model's name, or its folder.")],
    debug: Debug = False,
) -> None:
    """Check that a model has every file and tensor, of the right shapes. Loads nothing."""
    from flashtalk_cli.models.folder import find
    from flashtalk_cli.models.verify import verify_folder

    found = find(name)
    absent = found.missing()
    reports = verify_folder(found)
    for report in reports:
        said = report.problem or f"{report.n_tensors} tensors, as expected"
        typer.echo(f"{report.component:<7} {', '.join(report.files) or '-'}: {said}")
    bad = [report.component for report in reports if report.problem]
    if absent or bad:
        parts = [f"missing files: {', '.join(absent)}"] * bool(absent) + [f"wrong: {', '.join(bad)}"] * bool(
            bad
        )
        raise ModelError(f"{found.path} cannot be used; {'; '.join(parts)}")
    typer.echo(f"{found.path} is complete")

"""`flashtalk demo`: a portrait and a voice that come with the program, rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashtalk_cli.cli.options import PERSON, Debug, Json, Overwrite, PresetName, Sets, output_option
from flashtalk_cli.errors import InputError

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def _packaged(folder: str, suffix: str) -> dict[str, Path]:
    """Files of a folder of assets by stem, sorted."""
    return {path.stem: path for path in sorted((_ASSETS / folder).glob(f"*{suffix}"))}


_portraits = _packaged("portraits", ".png")
_speeches = _packaged("speech", ".wav")


def demo(
    portrait: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=PERSON, help=f"One of: {', '.join(_portraits)}.")
    ] = "maya",
    speech: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=PERSON, help=f"One of: {', '.join(_speeches)}.")
    ] = "welcome",
    output: Annotated[str, output_option("demo.mp4 here")] = "demo.mp4",
    overwrite: Overwrite = False,
    preset: PresetName = "mini",
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Render a portrait and a voice that come with the program."""
    from flashtalk_cli.cli.request import Request, fulfil

    request = Request(
        picture=_choose("portrait", portrait, _portraits),
        speech=_choose("speech", speech, _speeches),
        output=output,
        preset=preset,
        sets=sets or (),
        options={},
        size=None,
        overwrite=overwrite,
    )
    return fulfil(request, json=json, debug=debug)


def _choose(kind: str, name: str, known: dict[str, Path]) -> Path:
    """The asset of that name."""
    if not known:
        raise InputError(f"no packaged {kind}: the installation is incomplete, install flashtalk again")
    if name not in known:
        raise InputError(f"no {kind} named {name!r}; there are {', '.join(known)}")
    return known[name]

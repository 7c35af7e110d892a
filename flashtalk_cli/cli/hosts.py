"""Options of a run over several hosts, and whether a run's GPUs can share its video at all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flashtalk_cli.config import Preset
    from flashtalk_cli.launch import Hosts
    from flashtalk_cli.parallel.split import Split

PANEL = "Several hosts, the same command on each"


def _option(name: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=PANEL, show_default=False, help=help)


Nnodes = Annotated[
    int | None, _option("--nnodes", "N", "Hosts that make the video together, --gpus on each.")
]
NodeRank = Annotated[
    int | None, _option("--node-rank", "N", "Which of them this is, from 0; host 0 writes the video.")
]
RdzvEndpoint = Annotated[
    str | None, _option("--rdzv-endpoint", "HOST:PORT", "Where they meet: host 0's name and a free port.")
]


def hosts_of(nnodes: int | None, node_rank: int | None, endpoint: str | None) -> Hosts:
    """The `launch.Hosts` that the three options say. Raises UsageError when they contradict each other."""
    from flashtalk_cli.errors import UsageError
    from flashtalk_cli.launch import Hosts

    if nnodes is None or nnodes == 1:
        for option, given in (("--node-rank", node_rank), ("--rdzv-endpoint", endpoint)):
            if given is not None and given != 0:
                raise UsageError(f"{option} is for several hosts: give --nnodes too")
        return Hosts()
    if nnodes < 1:
        raise UsageError(f"--nnodes is {nnodes}; accepted: 1 and more")
    if node_rank is None or not 0 <= node_rank < nnodes:
        raise UsageError(f"--nnodes {nnodes} needs --node-rank, 0 to {nnodes - 1}; {_given(node_rank)}")
    if endpoint is None or not re.fullmatch(r"\S+:\d{1,5}", endpoint):
        what = "HOST:PORT, the same on all hosts"
        raise UsageError(f"--nnodes {nnodes} needs --rdzv-endpoint, {what}; {_given(endpoint)}")
    return Hosts(nnodes, node_rank, endpoint)


def _given(value: object) -> str:
    return "it is missing" if value is None else f"given: {value}"


def check_split(preset: Preset, ranks: int) -> None:
    """Whether so many GPUs can share a preset's video.

    Raises ConfigError when not, ModelError when the model's config.json does not tell how many heads it has.
    """
    from flashtalk_cli.models.folder import resolve

    random = preset.model.weights == "random"
    folder = resolve(preset.model.name, preset.model.speech_encoder, random=random)
    split_of(preset, ranks, folder.heads(random=random))


def split_of(preset: Preset, ranks: int, heads: int) -> Split:
    """How so many GPUs share a preset's video. Raises ConfigError when they cannot."""
    from flashtalk_cli.config import VAE_STRIDE_PX
    from flashtalk_cli.parallel.split import split

    canvas = preset.canvas
    latents = (canvas.height_px // VAE_STRIDE_PX, canvas.width_px // VAE_STRIDE_PX)
    return split(ranks, heads, *latents, preset.compute.ulysses)

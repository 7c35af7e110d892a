"""One run's weights out of several's: their mean, tensor by tensor.

    python -m flashtalk_cli.distill.average OUT RUN RUN ...

Students that come from one teacher by different ways often err differently, and the network of their mean weights
errs less than each (Wortsman et al. 2022, Model soups). It costs nothing in use, and is no more than a candidate:
`flashtalk train eval OUT --student …` says whether it is the better one. Runs that never had a network in common
have no mean that is of any use.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from flashtalk_cli.distill.checkpoint import WEIGHTS
from flashtalk_cli.distill.export import note_of, weights_of
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import InputError, ModelError, OutputError
from flashtalk_cli.log import setup
from flashtalk_cli.models.export import save_tensors
from flashtalk_cli.models.tensors import open_files

log = logging.getLogger(__name__)


def average(out: Path, runs: Sequence[Path]) -> Path:
    """Write OUT/weights.safetensors, the mean of the runs' in float32, as bfloat16; its path.

    Its note says "average" for a stage. Raises InputError for a folder that is no run, or when OUT holds weights
    already, ModelError for networks of other sizes, OutputError when it cannot be written.
    """
    path = out / WEIGHTS
    if path.exists():
        raise InputError(f"{path} is there already: choose another folder")
    sources = [open_files([weights_of(run)]) for run in runs]
    shapes = dict(sources[0].shapes)
    for run, source in zip(runs, sources, strict=True):
        if dict(source.shapes) != shapes:
            raise ModelError(f"{run} is a network of other sizes than {runs[0]}: there is no mean of them")
    mean = {
        name: torch.stack([source.read(name).float() for source in sources]).mean(0).to(torch.bfloat16)
        for name in shapes
    }
    steps = "+".join(note_of(run).get("step", "?") for run in runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return save_tensors(path, mean, {"stage": "average", "step": steps})
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error})") from None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that is written")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="what stage 1 or 2 wrote")
    given = parser.parse_args()
    setup(debug=True)
    log.info("%s", average(given.out, given.runs))


if __name__ == "__main__":
    told_in_a_line(main)

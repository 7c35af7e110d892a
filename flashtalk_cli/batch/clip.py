"""A clip that waits to be rendered."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashtalk_cli.config import Frozen, Preset, RenderJob
from flashtalk_cli.media.audio import prepare_speech


class Clip(Frozen):
    """One line of a manifest, after all that is cheap to know of it was looked at. Paths are absolute."""

    line: int  # in the manifest, from 1
    preset: Preset
    picture: Path
    speech: Path
    output: Path
    overwrite: bool = False

    @contextmanager
    def job(self) -> Iterator[RenderJob]:
        """The job for a worker, whose sound is ready as long as the context is open.

        Raises InputError for a sound that cannot be used, OutputError when there is no room to prepare it.
        """
        with tempfile.TemporaryDirectory(prefix="flashtalk-") as folder:
            yield RenderJob(
                preset=self.preset,
                picture=self.picture,
                audio=self.speech,
                speech=prepare_speech(self.speech, Path(folder)),
                output=self.output,
                overwrite=self.overwrite,
            )


class Setup(Frozen):
    """What all replicas of a run have in common."""

    preset: Preset  # whose model, precision and compute every clip has
    prompts: tuple[str, ...]  # of all clips
    processes: int  # of a replica, a GPU each where there are GPUs
    debug: bool = False

    @classmethod
    def of(cls, clips: list[Clip], processes: int, debug: bool) -> Setup:
        """What these clips need; at least one."""
        prompts = dict.fromkeys(clip.preset.sampling.prompt for clip in clips)
        return cls(preset=clips[0].preset, prompts=tuple(prompts), processes=processes, debug=debug)

"""All examples of a folder, and the drawing of batches from them.

A small model's examples lie on the GPU, and a batch is a few gathers there, without a word to the
host; those of a large one stay in files that are mapped, and a batch is copied from them.
Everything random comes from two generators that the caller keeps (and saves): `shared`, the same on
all ranks and on the CPU, for what must have one shape everywhere, and `own`, on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Generator, Tensor

from flashtalk_cli.distill.encoding import colour_of
from flashtalk_cli.distill.shards import read_origin, read_shard, read_texts, shard_paths, windows_of
from flashtalk_cli.distill.tables import Choices, Tables
from flashtalk_cli.errors import InputError
from flashtalk_cli.pipeline.colour import Statistics
from flashtalk_cli.pipeline.session import MASK_CHANNELS

log = logging.getLogger(__name__)

LARGE = ("latents", "heard", "picture", "tokens")  # the rest is a few bytes an example
RESIDENT_SHARE = 0.4  # of a device's free memory that examples may take


class Rows:
    """One tensor of all shards, read row by row: in one piece on the device, or mapped from files."""

    def __init__(self, parts: list[Tensor], device: torch.device, resident: bool) -> None:
        self.device = device
        self.parts = parts
        self.whole: Tensor | None = None
        if resident:
            n_rows = sum(len(part) for part in parts)
            self.whole = torch.empty(n_rows, *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
            at = 0
            for part in parts:  # one after another: the host never holds them all
                self.whole[at : at + len(part)] = part
                at += len(part)
            self.parts = []
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def take(self, index: Tensor) -> Tensor:
        """Those rows, on the device."""
        if self.whole is not None:
            return self.whole[index]
        places = index.tolist()
        which = torch.searchsorted(self.ends, index.cpu(), right=True).tolist()
        starts = [0, *self.ends.tolist()]
        rows = [self.parts[part][place - starts[part]] for part, place in zip(which, places, strict=True)]
        return torch.stack(rows).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """B examples of one size, on the device."""

    latents: Tensor  # float32 [B, 16, T, h, w]
    y: Tensor  # float32 [B, 20, T, h, w]
    tokens: Tensor  # [B, n, image_dim]
    windows: Tensor  # [B, F, 5, layers, dim]
    text: Tensor  # [B, L, text_dim]
    held: Tensor  # int64 [B]: latents that are given
    box: Tensor  # float32 [B, 4] in pixels; zeros: unknown


@dataclass(frozen=True)
class Talk:
    """B people and what each hears in k chunks on end; with what each chunk really looked like."""

    y: Tensor
    tokens: Tensor
    text: Tensor
    colour: Statistics
    picture_latent: Tensor  # [B, 16, 1, h, w]
    windows: list[Tensor]  # of each chunk [B, F, 5, layers, dim]
    clip: list[Tensor]  # of each chunk, the clip's own latents there [B, 16, T, h, w]
    motion: list[Tensor]  # the first of them, those that a chunk is given [B, 16, 2, h, w]
    box: Tensor  # float32 [B, 4] in pixels; zeros: unknown


@dataclass(frozen=True)
class People:
    """B people by number: little enough to be kept, and shown again."""

    window: Tensor  # int64 [B]: the first chunk of what they say
    picture: Tensor  # int64 [B]


class Bucket:
    """All examples of one size."""

    def __init__(
        self,
        shards: list[dict[str, Tensor]],
        texts: Tensor,
        motion_latents: int,
        new_frames: int,
        device: torch.device,
        resident: bool,
    ) -> None:
        self.device, self.texts, self.motion_latents = device, texts, motion_latents
        self.rows = {name: Rows([shard[name] for shard in shards], device, resident) for name in LARGE}
        clips = [0]
        for shard in shards:
            clips.append(clips[-1] + int(shard["picture_clip"].max()) + 1)

        def small(name: str) -> Tensor:
            return torch.cat([shard[name] for shard in shards])

        def numbered(name: str) -> Tensor:
            parts = [shard[name] + clips[i] for i, shard in enumerate(shards)]
            return torch.cat(parts).long()

        self.text = small("text").long().to(device)
        self.box = small("box").to(device)
        self.colour = small("colour").to(device)
        self.n_frames, self.new_frames = shards[0]["heard"].shape[1] - 4, new_frames
        self._tables = tables = Tables(
            small("start").long(), numbered("clip"), numbered("picture_clip"), small("picture_frame").long()
        )
        self.own = tables.own().to(device)
        self.others = tables.outside(self.n_frames).to(device)
        self.begins = (tables.start == 0).to(device)
        self.next, self.run = (table.to(device) for table in tables.chains(new_frames))
        self._chains: dict[int, Tensor] = {}
        self._shown: dict[int, Choices] = {}

    def __len__(self) -> int:
        return len(self.own)

    @cached_property
    def _beginnings(self) -> Tensor:
        """Windows that begin their clip, with its first frame as their picture: examples of a video's first chunk."""
        return torch.nonzero((self.own >= 0) & self.begins).squeeze(1)

    @cached_property
    def _middles(self) -> Tensor:
        """Windows with a picture outside themselves: examples of a later chunk."""
        return torch.nonzero(self.others.counts > 0).squeeze(1)

    def chains_of(self, n_chunks: int) -> Tensor:
        """Windows that `n_chunks - 1` others of their clip follow, and that have a picture."""
        if n_chunks not in self._chains:  # once: on a GPU the host waits for the count
            fits = (self.run >= n_chunks) & (self.others.counts > 0)
            self._chains[n_chunks] = torch.nonzero(fits).squeeze(1)
        return self._chains[n_chunks]

    def shown_in(self, n_chunks: int) -> Choices:
        """For each window the pictures that a rollout of that many chunks from there may be shown: see `draw_people`."""
        if n_chunks not in self._shown:
            span = self.n_frames + (n_chunks - 1) * self.new_frames
            self._shown[n_chunks] = self._tables.of_rollouts(self.n_frames, span).to(self.device)
        return self._shown[n_chunks]

    def draw(self, n: int, first_share: float, own: Generator) -> Batch:
        """n examples; `first_share` of them are a video's first chunk, shown their own first frame.

        In use the first chunk begins with the picture itself; all later ones have a picture from
        somewhere else, so theirs comes from another window, never from the frames to be made.
        """
        begins = self._uniform(n, own) < first_share
        begins = begins & (len(self._beginnings) > 0) | (len(self._middles) == 0)
        first = self._pick(self._beginnings, n, own) if len(self._beginnings) else None
        later = self._pick(self._middles, n, own) if len(self._middles) else None
        index = first if later is None else later if first is None else torch.where(begins, first, later)
        assert index is not None, "checked when the folder was opened"
        picture = torch.where(begins, self.own[index], self._one_of(self.others, index, own))
        latents = self.rows["latents"].take(index).float()
        y, tokens = self._picture(picture)
        return Batch(
            latents=latents,
            y=y,
            tokens=tokens,
            windows=windows_of(self.rows["heard"].take(index)),
            text=self.texts[self.text[index]],
            held=torch.where(begins, 1, self.motion_latents),
            box=self.box[index],
        )

    def draw_people(self, n: int, n_chunks: int, own: Generator) -> People:
        """n people who talk for n_chunks chunks or longer, each with a picture from outside all of them.

        Where the clip has none, as when it is no longer than they are, theirs is the first frame: the chunks
        continue it, as in use, and do not make it.
        """
        window = self._pick(self.chains_of(n_chunks), n, own)
        return People(window, self._one_of(self.shown_in(n_chunks), window, own))

    def talk_of(self, people: People, n_chunks: int) -> Talk:
        """What they look like, and say in n_chunks chunks."""
        index, picture = people.window, people.picture
        y, tokens = self._picture(picture)
        text = self.texts[self.text[index]]
        windows, clip = [], []
        for _ in range(n_chunks):
            windows.append(windows_of(self.rows["heard"].take(index)))
            clip.append(self.rows["latents"].take(index).float())
            index = self.next[index]
        return Talk(
            y=y,
            tokens=tokens,
            text=text,
            colour=colour_of(self.colour[picture]),
            picture_latent=y[:, MASK_CHANNELS:, :1],
            windows=windows,
            clip=clip,
            motion=[latents[:, :, : self.motion_latents] for latents in clip],
            box=self.box[people.window],
        )

    def _picture(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.rows["picture"].take(picture).float()
        mask = torch.zeros_like(latents[:, :MASK_CHANNELS])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1), self.rows["tokens"].take(picture)

    def _one_of(self, pictures: Choices, index: Tensor, own: Generator) -> Tensor:
        """For each window one of its pictures."""
        place = (self._uniform(len(index), own) * pictures.counts[index]).long()
        return pictures.table[index].gather(1, place[:, None]).squeeze(1)

    def _pick(self, among: Tensor, n: int, own: Generator) -> Tensor:
        return among[(self._uniform(n, own) * len(among)).long()]

    def _uniform(self, n: int, own: Generator) -> Tensor:
        return torch.rand(n, generator=own, device=own.device).to(self.device)


class Pool:
    """All examples of a folder, in buckets of one size."""

    def __init__(self, buckets: list[Bucket], resident: bool) -> None:
        self.buckets, self.resident = buckets, resident

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    def choose(self, shared: Generator, fits: Callable[[Bucket], int] = len) -> Bucket:
        """A bucket, as likely as it has examples (or what `fits` counts); the same one on all ranks."""
        if len(self.buckets) == 1:
            return self.buckets[0]
        sizes = torch.tensor([fits(bucket) for bucket in self.buckets], dtype=torch.float32)
        return self.buckets[int(torch.multinomial(sizes, 1, generator=shared))]

    def check_chains(self, folder: Path, n_chunks: int) -> None:
        """Raise InputError unless some clip is long enough for a rollout of that many chunks."""
        if any(len(bucket.chains_of(n_chunks)) for bucket in self.buckets):
            return
        fits = (n for n in range(n_chunks, 0, -1) if any(len(bucket.chains_of(n)) for bucket in self.buckets))
        longest = next(fits, 0)
        raise InputError(
            f"the longest clip in {folder} that has a picture to spare has {longest} chunks, rollouts need "
            f"{n_chunks}: prepare longer clips, or set distill.chunks to {max(1, longest)}"
        )


def open_pool(folder: Path, motion_frames: int, new_frames: int, device: torch.device, resident: str) -> Pool:
    """The examples of a folder; on the device when they fit there or `resident` is always.

    Raises InputError for a folder without examples, or of which none can be used.
    """
    sizes = shard_paths(folder)
    if not sizes:
        raise InputError(
            f"{folder} has no examples: flashtalk train prepare or flashtalk train people makes some"
        )
    on_device = resident == "always" or (resident == "auto" and _fits(sizes, device))
    texts = _stacked(read_texts(folder)).to(device)
    motion_latents = 1 + (motion_frames - 1) // 4
    buckets = [
        Bucket([read_shard(path) for path in paths], texts, motion_latents, new_frames, device, on_device)
        for paths in sizes.values()
    ]
    usable = [bucket for bucket in buckets if len(bucket._beginnings) or len(bucket._middles)]
    if not usable:
        raise InputError(
            f"no clip in {folder} has a picture for its windows: prepare clips of two chunks or more"
        )
    origin = read_origin(folder)
    log.info(
        "%s: %d clips, %d windows, on %s",
        folder,
        origin.clips,
        sum(map(len, usable)),
        device if on_device else "disk",
    )
    return Pool(usable, on_device)


def _fits(sizes: dict[tuple[int, int], list[Path]], device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    needed_bytes = sum(path.stat().st_size for paths in sizes.values() for path in paths)
    return needed_bytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def _stacked(rows: list[Tensor]) -> Tensor:
    """Prompts' rows as [n, L, dim], padded with zero rows: as the diffusion transformer pads them itself."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

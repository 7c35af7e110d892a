"""A person on screen: prepared once, then moved on a chunk at a time.

    models     = Models(dit, vae, ...)                       shared by any number of sessions
    conditions = prepare(models, picture, text, image)       what stays the same
    state      = begin(conditions, seed)                     all that changes, a value
    state      = yield from step(models, conditions, state, windows)

`step` is a generator: frames come out as their latents decode, and the state that the next
chunk starts from is its return value. Nothing is kept on the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Generator as Yields
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from flashtalk_cli.config import Sampling
from flashtalk_cli.models.dit import AudioContext, Context, DiT
from flashtalk_cli.models.vae import STRIDE_PX, Vae
from flashtalk_cli.models.vae_blocks import Past
from flashtalk_cli.parallel.beside import Beside
from flashtalk_cli.parallel.sequence import Sequence
from flashtalk_cli.parallel.spatial import WHOLE, Tiles
from flashtalk_cli.pipeline.colour import Statistics, match_colour, to_lab
from flashtalk_cli.pipeline.cores import FreeCores
from flashtalk_cli.pipeline.marks import Mark, unmarked
from flashtalk_cli.pipeline.sampler import denoise, first_noise
from flashtalk_cli.pipeline.schedule import times
from flashtalk_cli.pipeline.streams import Graphs

T = TypeVar("T")

MASK_CHANNELS = 4  # one a frame of a latent: 1 where the picture is given
# Of latents that keep a large GPU busy down to the smallest level of the decoder. One GPU decodes one of 448 x 768 at a
# time, for memory; two, of halves, three.
FILLING_PX = 448 * 768 * 3 // 2
ON_CPU = 2  # latents at once: a tenth faster than one, and more would hardly fit its cache


@dataclass(frozen=True)
class Models:
    """The two networks that run in every chunk, and how they are spread over processes."""

    dit: DiT
    vae: Vae
    sampling: Sampling
    device: torch.device
    sequence: Sequence
    tiles: Tiles = WHOLE
    beside: Beside = field(default_factory=Beside)
    graphs: Graphs | None = None  # None: every step is launched as it comes
    cores: FreeCores | None = None  # None: threads stay as they are


@dataclass(frozen=True)
class Conditions:
    """What a session is given: a picture and a prompt, encoded."""

    y: Tensor  # [1, 20, T, h, w]: mask and picture latents
    context: Context  # text and picture tokens, with every block's keys and values
    picture_latent: Tensor  # [1, 16, 1, h, w]: the motion latent of the first chunk
    colour: Statistics


@dataclass(frozen=True)
class Primed:
    """What a chunk begins with that needs no sound: its first noise, and the decoder after the motion latents."""

    motion: Tensor  # the very tensor that was decoded; its frames were on screen before
    video: Tensor  # [1, 3, 1 + 4 (m - 1), H, W]
    decoder: Past
    first: Tensor  # noise [1, 16, T, h, w]
    noise: Tensor  # state of the noise generator after it


@dataclass(frozen=True)
class State:
    """What one chunk hands to the next."""

    motion: Tensor  # float32 [1, 16, m, h, w]
    noise: Tensor  # state of the noise generator, uint8
    chunk: int = 0
    primed: Primed | None = None  # known to be of use when it is of this `motion`


@torch.no_grad()
def prepare(models: Models, picture: Tensor, text: Tensor, image: Tensor) -> Conditions:
    """Encode what stays the same.

    picture: [3, H, W] in [-1, 1]; text: rows of the prompt [L, text_dim]; image: tokens of
    the picture [1, n, image_dim].
    """
    video = picture.to(models.device, torch.float32)[None, :, None]
    unseen = video.new_zeros(1, 3, models.sampling.chunk_frames - 1, *video.shape[3:])
    latents = _encoded(models, models.tiles.cut(torch.cat([video, unseen], dim=2)))
    picture_latent = _encoded(models, models.tiles.cut(video))
    mask = torch.zeros_like(latents[:, :MASK_CHANNELS])
    mask[:, :, 0] = 1
    return Conditions(
        y=torch.cat([mask, latents], dim=1).float(),
        context=models.dit.condition(text.to(models.device), image.to(models.device)),
        picture_latent=picture_latent.float(),
        colour=Statistics.of(to_lab(video)),
    )


def _encoded(models: Models, tile: Tensor) -> Tensor:
    """This rank's tile of a video [1, 3, T, h, w] to the latents of the whole, on every rank."""
    latents, _ = models.vae.encode(tile, tiles=models.tiles)
    return models.tiles.join(latents)


def begin(conditions: Conditions, seed: int) -> State:
    """The state before the first chunk: the person as in the picture."""
    return State(conditions.picture_latent, torch.Generator("cpu").manual_seed(seed).get_state())


@torch.no_grad()
def step(
    models: Models,
    conditions: Conditions,
    state: State,
    windows: Tensor,
    mark: Mark = unmarked,
) -> Yields[Tensor, None, State]:
    """One chunk: yields video [1, 3, n, H, W] in [-1, 1] as it decodes, `new_frames` in all.

    Latents are whole on every rank, and all ranks must take this step together; the video is the tile of
    this rank, which `models.tiles` puts together.

    windows: [1, chunk_frames, 5, layers, dim], what each frame hears. The motion frames at
    the chunk's start were on screen before; they prime the decoder, which is done as soon as they are
    known, and are not given out.
    mark: called at the end of each part, see marks.
    """
    sampling, tiles = models.sampling, models.tiles
    if models.cores is not None:
        models.cores.fit()
    generator = torch.Generator("cpu")
    generator.set_state(state.noise)
    primed = state.primed
    if primed is None or primed.motion is not state.motion:
        primed = _prime(models, state.motion, generator, mark)
    generator.set_state(primed.noise)
    heard = hear(models, windows.to(models.device), state.motion)
    mark("keys")

    def predict(x: Tensor, time: float) -> Tensor:
        mark("noise")
        t = torch.full((len(x),), time * 1000, device=x.device)
        velocity = _velocity(models, conditions, heard, x, t)
        mark("step")
        return velocity

    latents = denoise(
        predict,
        state.motion,
        primed.first,
        times(sampling.steps, sampling.shift),
        generator,
    )
    mark("noise")
    at_once = latents_at_once(latents, tiles)
    latents = tiles.cut(latents)
    models.beside.join()
    video, decoder = primed.video, primed.decoder
    known, seen = state.motion.shape[2], 1 + (sampling.motion_frames - 1) // 4
    if known < seen:  # the first chunk, which knows one picture only
        more, decoder = models.vae.decode(latents[:, :, known:seen], decoder, tiles=tiles)
        video = torch.cat([video, more], dim=2)
    tail = (
        [match_colour(video, conditions.colour, sampling.colour_strength, tiles)]
        if sampling.new_frames < sampling.motion_frames
        else []
    )  # else new frames suffice
    for piece in in_pieces(latents[:, :, seen:], at_once):
        video, decoder = models.vae.decode(piece, decoder, tiles, latents_at_once=piece.shape[2])
        mark("decode")
        video = match_colour(video, conditions.colour, sampling.colour_strength, tiles)
        mark("colour")
        tail = [*tail, video][-(1 + seen) :]
        yield video
    last = torch.cat(tail, dim=2)[:, :, -sampling.motion_frames :]
    size = tuple(state.motion.shape[3:])
    motion = _recorded(models, "motion", size, lambda x: _encoded(models, x).float(), last)
    mark("motion")
    noise = generator.get_state()
    primed = _prime(models, motion, generator, mark)
    return State(motion, noise, state.chunk + 1, primed)


def in_pieces(latents: Tensor, at_once: int) -> list[Tensor]:
    """Latents [B, 16, T, h, w] cut in time: the first alone, so that it is on screen soon; then equal pieces."""
    rest = latents[:, :, 1:]
    pieces = rest.chunk(-(-rest.shape[2] // at_once), dim=2) if rest.shape[2] else ()
    return [latents[:, :, :1], *pieces]


def latents_at_once(latents: Tensor, tiles: Tiles) -> int:
    """How many of these latents [B, 16, T, h, w] of the whole picture are decoded together: the same on all ranks.

    A small picture, or a rank's tile of a large one, would leave most of a GPU idle at the decoder's small
    levels, and be over before the next kernel is launched.
    """
    whole_px = STRIDE_PX**2 * latents.shape[3] * latents.shape[4]
    return ON_CPU if latents.device.type == "cpu" else max(1, FILLING_PX * tiles.count // whole_px)


def hear(models: Models, windows: Tensor, motion: Tensor) -> AudioContext:
    """What all steps of a chunk hear, by a graph where there is one.

    It is folded at once where it is quantised, too, and on a CPU. In sixteen bits on a GPU that gained nothing that
    could be measured, for 8.4 GiB with the released model.

    motion: [1, 16, m, h, w], for the picture's size.
    """
    dit, (_, height, width) = models.dit, models.dit.params.patch_size
    frame_tokens = motion.shape[3] // height * (motion.shape[4] // width)
    span = models.sequence.span(models.sampling.chunk_latents * frame_tokens)
    ahead = dit.eight_bits or windows.device.type == "cpu"

    def heard(windows: Tensor) -> AudioContext:
        given = dit.hear(windows)
        return dit.fold(given, span, frame_tokens) if ahead else given

    graphs = models.graphs
    return graphs.kept("hear", (dit, frame_tokens, span), heard, windows) if graphs else heard(windows)


def _velocity(models: Models, conditions: Conditions, heard: AudioContext, x: Tensor, t: Tensor) -> Tensor:
    """One step's velocity, by a recorded graph where there is one."""

    def forward(x: Tensor, t: Tensor) -> Tensor:
        return models.dit(x, t, conditions.y, conditions.context, heard, models.sequence)

    return models.graphs("step", (conditions, heard), forward, x, t) if models.graphs else forward(x, t)


def _prime(models: Models, motion: Tensor, generator: torch.Generator, mark: Mark) -> Primed:
    """Show the decoder what was on screen, beside the motion network on a GPU; and draw the first noise.

    Between the chunks of a live stream that happens while the stream waits for sound, and otherwise while the GPU
    is busy with the chunk before.
    """
    name = f"prime {motion.shape[2]}"  # a first chunk's is shorter; a recording for each
    with models.beside.run():
        mark("")
        video, decoder = _recorded(
            models,
            name,
            tuple(motion.shape[3:]),
            lambda x: models.vae.decode(models.tiles.cut(x), tiles=models.tiles),
            motion,
        )
        mark("prime")
    first = first_noise(motion, models.sampling.chunk_latents, generator)
    return Primed(motion, video, decoder, first, generator.get_state())


def _recorded(
    models: Models, name: str, size: tuple[int, ...], function: Callable[[Tensor], T], x: Tensor
) -> T:
    """What the VAE makes of x by a recorded graph, where several ranks share it.

    size: of the whole picture in latents, which tells how it is cut: a tile may be as large in another picture.
    Its launches, and its exchanges', take Python longer than a rank's part of the work. One GPU does without: it
    is busy with a step meanwhile, and a recording keeps memory.
    """
    if models.graphs is None or models.tiles.count == 1:
        return function(x)
    return models.graphs(name, (models.vae, size), function, x)


def talk(
    models: Models, conditions: Conditions, hear: Callable[[int], Tensor], n_chunks: int
) -> Iterator[Tensor]:
    """A whole clip: n_chunks chunks one after another, each hearing `hear(index)`; yields as `step` does."""
    state = begin(conditions, models.sampling.seed)
    for index in range(n_chunks):
        state = yield from step(models, conditions, state, hear(index))


def to_bytes(video: Tensor) -> Tensor:
    """Video [1, 3, T, H, W] in [-1, 1] -> uint8 frames [T, H, W, 3], to the nearest level."""
    scaled = ((video[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "c t h w -> t h w c").contiguous()

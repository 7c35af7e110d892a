"""What one rank of tests/test_parallel.py does; in a file of its own, which its processes import."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flashtalk_cli.config import (
    Canvas,
    Compute,
    Encoding,
    Hearing,
    ModelChoice,
    Precision,
    Preset,
    RenderJob,
    Sampling,
    Speech,
)
from flashtalk_cli.events import Emitter
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.vae import Vae, VaeParams
from flashtalk_cli.parallel.mesh import Mesh, make_mesh
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import Sequence
from flashtalk_cli.parallel.spatial import Tiles
from flashtalk_cli.parallel.split import Split, split
from flashtalk_cli.pipeline.colour import Statistics, to_lab
from flashtalk_cli.pipeline.session import Models, begin, prepare, step, to_bytes
from flashtalk_cli.rendering import Worker, render

Found = dict[str, Tensor]
MakeMesh = Callable[[Split], Mesh]

HEADS = (4, 6, 5)
VIDEOS = ((3, 4, 6), (2, 6, 10), (1, 2, 2))  # latent frames, rows, columns
PICTURES = ((5, 7), (7, 1))  # rows and columns of latents
CANVASES = ((64, 80), (112, 64))  # pixels
RENDERS = ((80, 64), (64, 112))  # width and height
RENDERED_S, LONG_CHUNKS = 0.5, 6

CHUNK, MOTION = 9, 5
SIZES = {"text_dim": 8, "text_len": 4, "audio_layers": 2, "audio_dim": 6, "image_dim": 10}


def drawn(draw: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw).to(device)


@cache
def tiny_dit(heads: int, device: torch.device) -> DiT:
    torch.manual_seed(heads)
    sizes = {"num_layers": 2, "freq_dim": 16, "intermediate_dim": 8, "output_dim": 8, "context_tokens": 2}
    dit = DiT(DitParams(dim=12 * heads, ffn_dim=32, num_heads=heads, **sizes, **SIZES)).eval()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return dit.to(device)


@cache
def tiny_vae(device: torch.device) -> Vae:
    torch.manual_seed(1)
    vae = Vae(VaeParams(dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)).eval()
    for p in vae.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.7 / (p[0].numel() ** 0.5))
    return vae.to(device)


def velocity(dit: DiT, video: tuple[int, int, int], sequence: Sequence) -> Tensor:
    draw, device = torch.Generator().manual_seed(2), dit.patch_embedding.weight.device
    t, h, w = video
    x, y = (drawn(draw, device, 1, c, t, h, w) for c in (16, 20))
    windows = drawn(draw, device, 1, 1 + 4 * (t - 1), 5, 2, 6)
    context = dit.condition(drawn(draw, device, 3, 8), drawn(draw, device, 1, 5, 10))
    return dit(x, torch.tensor([500.0], device=device), y, context, dit.hear(windows), sequence)


def coded(vae: Vae, picture: tuple[int, int], tiles: Tiles) -> Found:
    """Encoded and decoded in two pieces, so that states are met too; and the colours of the second."""
    h, w = picture
    draw, device = torch.Generator().manual_seed(3), vae.conv1.weight.device
    video, latents = drawn(draw, device, 1, 3, 9, 8 * h, 8 * w), drawn(draw, device, 1, 16, 3, h, w)
    first, state = vae.encode(tiles.cut(video[:, :, :5]), tiles=tiles)
    second, _ = vae.encode(tiles.cut(video[:, :, 5:]), state, tiles)
    shown, state = vae.decode(tiles.cut(latents[:, :, :2]), tiles=tiles)
    later, _ = vae.decode(tiles.cut(latents[:, :, 2:]), state, tiles)
    colours = Statistics.of(to_lab(later), tiles)
    return {
        "encoded": tiles.join(torch.cat([first, second], 2)),
        "decoded": tiles.join(torch.cat([shown, later], 2)),
        "mean": colours.mean,
        "std": colours.std,
    }


def chunks(dit: DiT, vae: Vae, canvas: tuple[int, int], mesh: Mesh, count: int) -> Found:
    """Frames as bytes on rank 0, and the motion latents after each chunk."""
    draw, device = torch.Generator().manual_seed(4), vae.conv1.weight.device
    sampling = Sampling(steps=2, chunk_frames=CHUNK, motion_frames=MOTION)
    models = Models(dit, vae, sampling, device, mesh.sequence, mesh.tiles)
    picture = 0.1 * torch.rand(
        3, *canvas, generator=draw
    )  # of the decoder's own contrast: nothing is amplified
    text, image = drawn(draw, device, 3, 8), drawn(draw, device, 1, 5, 10)
    conditions = prepare(models, picture, text, image)
    state, videos, frames, motions = begin(conditions, 7), [], [], []
    for _ in range(count):
        pieces = step(models, conditions, state, drawn(draw, device, 1, CHUNK, 5, 2, 6))
        while True:
            try:
                video = next(pieces)
            except StopIteration as end:
                state = end.value
                motions.append(state.motion)
                break
            videos.append(mesh.tiles.join(video))
            frames.append(mesh.tiles.collect(to_bytes(video)))
    found = {"y": conditions.y, "video": torch.cat(videos, 2), "motion": torch.cat(motions)}
    return found if frames[0] is None else {**found, "frames": torch.cat(frames)}


@torch.no_grad()
def parts(size: int, device: torch.device, mesh_of: MakeMesh, long_chunks: int) -> Found:
    """Results of all parts by name; those of one process are what they must be."""
    found: Found = {}
    for heads in HEADS:
        dit = tiny_dit(heads, device)
        degrees = [n for n in range(1, size + 1) if size % n == 0 and heads % n == 0]
        for video in VIDEOS:
            for degree in degrees:
                name = f"dit {heads} {video}" + (f" ulysses {degree}" if size > 1 else "")
                sequence = mesh_of(split(size, heads, 8, 8, degree)).sequence
                found[name] = velocity(dit, video, sequence)
    vae = tiny_vae(device)
    for picture in PICTURES:
        mesh = mesh_of(split(size, 4, *picture))
        found |= {f"vae {picture} {name}": x for name, x in coded(vae, picture, mesh.tiles).items()}
    for canvas, count in zip(CANVASES, (2, long_chunks), strict=True):
        mesh = mesh_of(split(size, 4, *(side // 8 for side in canvas)))
        results = chunks(tiny_dit(4, device), vae, canvas, mesh, count)
        found |= {f"session {canvas} {name}": x for name, x in results.items()}
    return {name: x.cpu() for name, x in found.items()}


def rendered(ranks: Ranks, folder: Path) -> None:
    """Render a video in each of several sizes, from random weights, to FOLDER/SIZE-RANKS.mkv."""
    sound = folder / "s.wav"
    for width, height in RENDERS:
        preset = Preset(
            name="parity",
            description="",
            model=ModelChoice(name=str(folder / "model"), weights="random"),
            canvas=Canvas(width_px=width, height_px=height),
            sampling=Sampling(steps=1, chunk_frames=13),
            hearing=Hearing(context_s=2),
            precision=Precision(dit="float32", vae="float32"),
            compute=Compute(device="cpu"),
            encoding=Encoding(crf=0),
        )
        job = RenderJob(
            preset=preset,
            picture=folder / "p.png",
            speech=Speech(samples_path=sound, n_samples=int(16_000 * RENDERED_S), loudness_lufs=None),
            audio=sound,
            output=folder / f"{width}x{height}-{ranks.size}.mkv",
        )
        worker = StandIn(job, ranks, Emitter(None))
        assert render(worker, job, threading.Event(), 1) == 0


class StandIn(Worker):
    """A worker whose picture, prompt and sound need no encoder, which would take longer to load than all else."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        canvas, sizes = self.preset.canvas, self.folder.config()
        draw = torch.Generator().manual_seed(5)
        picture = 0.1 * torch.rand(3, canvas.height_px, canvas.width_px, generator=draw)
        return (
            picture,
            torch.randn(3, sizes["text_dim"], generator=draw),
            torch.ones(1, 5, sizes["image_dim"]),
        )

    def hearing(self) -> Callable[[int], Tensor]:
        frames, sizes = self.preset.sampling.chunk_frames, self.folder.config()

        def windows(index: int) -> Tensor:
            if index:
                self.ranks.pulse.round()
            draw = torch.Generator().manual_seed(index)
            return torch.randn(1, frames, 5, sizes["audio_layers"], sizes["audio_dim"], generator=draw)

        return windows


def everything(ranks: Ranks, folder: Path) -> Found:
    """All results of this rank by name, and its renders in the folder."""
    made: dict[Split, Mesh] = {}

    def mesh_of(split: Split) -> Mesh:
        if split not in made:
            made[split] = make_mesh(ranks, split)
        return made[split]

    rendered(ranks, folder)
    return parts(ranks.size, ranks.device, mesh_of, LONG_CHUNKS)

"""The video VAE: against diffusers, and against itself in pieces of time, in tiles, and in bfloat16.

The cases of the released model are in test_reference.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtalk_cli.models.vae import Vae, VaeParams
from flashtalk_cli.models.vae_blocks import Conv, RmsNorm, conv_causal, stacked_kernel
from flashtalk_cli.parallel.spatial import Tiles

SMALL = VaeParams(dim=8, dim_mult=(1, 2, 2, 3), num_res_blocks=1)


@cache
def small_vae() -> Vae:
    """Every part of the released network, few channels, random weights; never changed by a test."""
    return seeded_vae(SMALL)


def seeded_vae(params: VaeParams) -> Vae:
    torch.manual_seed(0)
    vae = Vae(params).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif name.endswith("proj.weight"):  # it begins as zeros, and would hide the attention
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return vae


def latents_of(n: int, height: int = 4, width: int = 3) -> Tensor:
    return torch.randn(1, 16, n, height, width, generator=torch.Generator().manual_seed(n))


def video_of(n_frames: int, height_px: int = 32, width_px: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(n_frames)
    return torch.rand(1, 3, n_frames, height_px, width_px, generator=generator) * 2 - 1


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Against diffusers


def diffusers_names(params: VaeParams) -> Iterator[tuple[str, str]]:
    """Beginnings of our parameters' names, and of the same ones in diffusers."""
    residual = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    residual["shortcut"] = "conv_shortcut"
    middle = {"middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0"}
    middle["middle.2"] = "mid_block.resnets.1"
    blocks = {f"encoder.{ours}": f"encoder.{theirs}" for ours, theirs in middle.items()}
    blocks |= {f"decoder.{ours}": f"decoder.{theirs}" for ours, theirs in middle.items()}
    blocks |= {f"encoder.downsamples.{n}": f"encoder.down_blocks.{n}" for n in range(100)}
    per_level = params.num_res_blocks + 2
    for level in range(len(params.dim_mult)):
        first = f"decoder.upsamples.{level * per_level}"
        for n in range(params.num_res_blocks + 1):
            blocks[f"decoder.upsamples.{level * per_level + n}"] = f"decoder.up_blocks.{level}.resnets.{n}"
        first = f"decoder.upsamples.{level * per_level + per_level - 1}"
        blocks[first] = f"decoder.up_blocks.{level}.upsamplers.0"
    yield "conv1", "quant_conv"
    yield "conv2", "post_quant_conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv1", f"{half}.conv_in"
        yield f"{half}.head.0", f"{half}.norm_out"
        yield f"{half}.head.2", f"{half}.conv_out"
    for ours, theirs in blocks.items():
        for leaf in ("resample.1", "time_conv", "norm", "to_qkv", "proj"):
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}"
        for leaf, their_leaf in residual.items():
            yield f"{ours}.{leaf}", f"{theirs}.{their_leaf}"


def as_diffusers(tensors: dict[str, Tensor], params: VaeParams) -> dict[str, Tensor]:
    names = dict(diffusers_names(params))
    return {
        f"{names[owner]}.{leaf}": tensor
        for (owner, _, leaf), tensor in ((name.rpartition("."), tensor) for name, tensor in tensors.items())
    }


def oracle_of(vae: Vae) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    params = vae.params
    oracle = diffusers.AutoencoderKLWan(
        base_dim=params.dim,
        z_dim=params.z_dim,
        dim_mult=list(params.dim_mult),
        num_res_blocks=params.num_res_blocks,
        temperal_downsample=list(params.temporal_downsample),
    )
    oracle.load_state_dict(as_diffusers(vae.state_dict(), params))
    return oracle.eval()


def statistics(oracle: torch.nn.Module) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(oracle.config[key]) for key in ("latents_mean", "latents_std"))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


@pytest.mark.parametrize("params", [SMALL, VaeParams(dim=6, dim_mult=(1, 2, 4, 4), num_res_blocks=2)])
def test_equals_diffusers(params: VaeParams) -> None:
    """Parity: encode and decode, odd latent sizes, on shared random weights."""
    vae = seeded_vae(params)
    oracle = oracle_of(vae)
    mean, std = statistics(oracle)
    video, latents = video_of(9, 40, 24), latents_of(3, 5, 3)
    with torch.no_grad():
        posterior = oracle.encode(video).latent_dist
        assert difference(vae.encode(video)[0], (posterior.mean - mean) / std) < 1e-4
        assert difference(vae.decode(latents)[0], oracle.decode(latents * std + mean).sample) < 1e-4


def test_gradients_equal_those_of_diffusers() -> None:
    """Parity: the gradient of every weight, through encoder and decoder."""
    vae = seeded_vae(SMALL)
    oracle = oracle_of(vae)
    mean, std = statistics(oracle)
    video = video_of(5)
    (vae.decode(vae.encode(video)[0])[0] - video).square().mean().backward()
    latents = (oracle.encode(video).latent_dist.mean - mean) / std
    (oracle.decode(latents * std + mean).sample - video).square().mean().backward()
    ours = as_diffusers({name: p.grad for name, p in vae.named_parameters()}, SMALL)
    for name, parameter in oracle.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-6)
        assert (ours[name] - parameter.grad).abs().max() < 1e-3 * scale, name


# In pieces of time


@settings(max_examples=12)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_decoding_in_any_split_is_decoding_the_whole(split: list[int]) -> None:
    """Property: bit for bit in float32, whatever the split."""
    latents = latents_of(sum(split))
    state, pieces = None, []
    with torch.no_grad():
        whole, _ = small_vae().decode(latents)
        for piece in latents.split(split, dim=2):
            video, state = small_vae().decode(piece, state)
            pieces.append(video)
    assert whole.shape[2] == 1 + 4 * (sum(split) - 1)
    assert torch.equal(torch.cat(pieces, dim=2), whole)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_encoding_in_any_split_is_encoding_the_whole(split: list[int]) -> None:
    """Property: bit for bit; the first piece has 1 + 4n frames, the others 4n."""
    sizes = [1 + 4 * split[0], *(4 * n for n in split[1:] if n)]
    video = video_of(sum(sizes))
    state, pieces = None, []
    with torch.no_grad():
        whole, _ = small_vae().encode(video)
        for piece in video.split(sizes, dim=2):
            latents, state = small_vae().encode(piece, state)
            pieces.append(latents)
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_several_latents_at_once_are_the_same() -> None:
    """Property: batching in time changes rounding at most."""
    with torch.no_grad():
        for run, x in ((small_vae().decode, latents_of(6)), (small_vae().encode, video_of(21))):
            assert difference(run(x, latents_at_once=3)[0], run(x)[0]) < 1e-5


def test_a_state_is_a_value() -> None:
    """Contract: going on twice from one state gives one result, and the state holds no more than it needs."""
    latents = latents_of(4)
    with torch.no_grad():
        _, state = small_vae().decode(latents[:, :, :2])
        first, _ = small_vae().decode(latents[:, :, 2:], state)
        second, later = small_vae().decode(latents[:, :, 2:], state)
    assert torch.equal(first, second)
    for tensors in (list(flattened(state)), list(flattened(later))):
        for tensor in tensors:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert tensor.shape[1] == 2


def flattened(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from flattened(part)


def test_a_batch_is_its_members() -> None:
    """Property: streams that are decoded together do not see each other."""
    latents = torch.cat([latents_of(2), -latents_of(2)])
    with torch.no_grad():
        together, _ = small_vae().decode(latents)
        for n in range(2):
            assert difference(together[n : n + 1], small_vae().decode(latents[n : n + 1])[0]) < 1e-5


# In tiles


@dataclass
class Wall:
    """Where the threads of one grid put what the others may look at."""

    rows: int
    columns: int
    slots: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.rows * self.columns, timeout=60)

    def whole(self, rank: int, tile: Tensor) -> tuple[Tensor, int, int]:
        """All tiles put together [..., H, W, C], and the row and column where this rank's begins."""
        self.slots[rank] = tile
        self.barrier.wait()
        grid = [[self.slots[r * self.columns + c] for c in range(self.columns)] for r in range(self.rows)]
        self.barrier.wait()
        row, column = divmod(rank, self.columns)
        frames = torch.cat([torch.cat(tiles, dim=-2) for tiles in grid], dim=-3)
        top = sum(tiles[0].shape[-3] for tiles in grid[:row])
        return frames, top, sum(tile.shape[-2] for tile in grid[0][:column])


@dataclass(frozen=True)
class ThreadTiles(Tiles):
    """A grid of tiles, a thread each."""

    rank: int
    wall: Wall

    def halo(self, x: Tensor, before: int, after: int) -> tuple[Tensor, tuple[int, int]]:
        frames, top, left = self.wall.whole(self.rank, x)
        padded = F.pad(frames, (0, 0, before, after, before, after))
        height, width = x.shape[-3] + before + after, x.shape[-2] + before + after
        return padded[..., top : top + height, left : left + width, :].contiguous(), (0, 0)

    def gather(self, x: Tensor) -> Tensor:
        return self.wall.whole(self.rank, x)[0]


def in_tiles(run: Callable, x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    """Run on every tile of [B, C, T, H, W] in its own thread, and put the results together."""
    wall = Wall(len(heights), len(widths))
    tiles = [tile for rows in x.split(heights, dim=-2) for tile in rows.split(widths, dim=-1)]

    def one(rank: int) -> Tensor:
        with torch.no_grad():  # of this thread only
            return run(tiles[rank], tiles=ThreadTiles(rank, wall))[0]

    with ThreadPoolExecutor(len(tiles)) as pool:
        done = list(pool.map(one, range(len(tiles))))
    rows = [done[n : n + len(widths)] for n in range(0, len(done), len(widths))]
    return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)


@pytest.mark.parametrize(("heights", "widths"), [([2, 1, 2], [3]), ([3, 2], [1, 2])])
def test_tiles_give_the_whole_picture(heights: list[int], widths: list[int]) -> None:
    """Contract: halo and gather are all that a grid of ranks needs, for tiles of unequal size too."""
    latents, video = latents_of(2, sum(heights), sum(widths)), video_of(5, 8 * sum(heights), 8 * sum(widths))
    with torch.no_grad():
        decoded, _ = small_vae().decode(latents)
        encoded, _ = small_vae().encode(video)
    assert difference(in_tiles(small_vae().decode, latents, heights, widths), decoded) < 1e-5
    pixels = [8 * n for n in heights], [8 * n for n in widths]
    assert difference(in_tiles(small_vae().encode, video, *pixels), encoded) < 1e-5


# Number formats and memory order


def test_bfloat16_is_near() -> None:
    """Golden: half precision stays within its rounding, and results are float32 all the same."""
    vae = seeded_vae(SMALL).to(torch.bfloat16)
    with torch.no_grad():
        for run, exact, x in (
            (vae.decode, small_vae().decode, latents_of(3)),
            (vae.encode, small_vae().encode, video_of(9)),
        ):
            ours, theirs = run(x)[0], exact(x)[0]
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_without_gradients_is_that_with_them(dtype: torch.dtype, silu: bool) -> None:
    """Parity: written into a place of its own, which is what comes out; the input stays, zeros stay zeros."""
    norm = RmsNorm(6).to(dtype)
    torch.nn.init.normal_(norm.gamma)
    x = (torch.randn(2, 3, 4, 5, 6) * 4).to(dtype)
    x[0, 1, 2, 3] = 0
    before, room = x.clone(), torch.full((2, 5, 4, 5, 6), 7, dtype=dtype)
    with torch.no_grad():
        ours = norm.into(room[:, 2:], x, silu)
        torch.testing.assert_close(ours, norm(x, silu))
    assert torch.equal(ours, room[:, 2:])
    assert (room[:, :2] == 7).all()
    assert torch.equal(x, before)
    torch.testing.assert_close(ours, norm(x, silu).detach())


@pytest.mark.parametrize("width", [9, 10])  # in bfloat16 an even one is computed two pixels at once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_causal_convolution_is_a_3d_one(dtype: torch.dtype, width: int) -> None:
    """Parity: each way of computing it equals conv3d on zero-padded frames."""
    conv = Conv(5, 7, (3, 3, 3)).to(dtype)
    frames = torch.randn(2, 6, 8, width, 5, dtype=dtype)
    with torch.no_grad():
        y = conv_causal(frames, conv.weight, conv.bias, padding=1)
        expected = F.conv3d(
            frames.movedim(-1, 1).float(), conv.weight.float(), conv.bias.float(), padding=(0, 1, 1)
        )
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert difference(y.movedim(-1, 1).float(), expected) < tolerance


def loaded(vae: Vae) -> Vae:
    vae.load_state_dict({name: p.contiguous() for name, p in small_vae().state_dict().items()})
    return vae


def assigned(vae: Vae) -> Vae:
    vae.load_state_dict({name: p.contiguous() for name, p in small_vae().state_dict().items()}, assign=True)
    return vae


@pytest.mark.parametrize(
    "made",
    [loaded, assigned, lambda vae: vae.to(torch.bfloat16), lambda vae: vae.to("meta").to_empty(device="cpu")],
)
def test_kernels_are_views(made: Callable[[Vae], Vae]) -> None:
    """Contract: however weights came, no call lays them out anew."""
    vae = made(Vae(SMALL))
    for conv in (vae.decoder.conv1, vae.encoder.downsamples[0].residual["2"]):
        kernel = stacked_kernel(conv.weight)
        assert kernel.data_ptr() == conv.weight.data_ptr()
        assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_assigned_weights_keep_their_values() -> None:
    """Contract: laying out anew moves values, and changes none."""
    for name, tensor in assigned(Vae(SMALL)).state_dict().items():
        assert torch.equal(tensor, small_vae().state_dict()[name])


def test_sizes_come_from_the_folder() -> None:
    """Contract: keys of config.json, the released sizes without them."""
    assert VaeParams.from_config({"dim": 5120}) == VaeParams()
    config = {"vae_dim": 12, "vae_dim_mult": [1, 2, 2, 2], "vae_num_res_blocks": 1, "dim": 5120}
    assert VaeParams.from_config(config) == VaeParams(dim=12, dim_mult=(1, 2, 2, 2), num_res_blocks=1)

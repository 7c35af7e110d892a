"""Parts of the DiT by their definitions: rotation, speech, tokens shared by ranks."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from dit_parts import CPU, SMALL, Inputs, gradients_of, random_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtalk_cli.models import rope
from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.models.audio import AudioProjector, FoldBounds
from flashtalk_cli.models.dit import Layout
from flashtalk_cli.models.fp8 import LARGEST, quantise_rows
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.parallel.mesh import make_mesh
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import Attend, Exchange, Sequence, Size
from flashtalk_cli.parallel.spatial import WHOLE
from flashtalk_cli.parallel.split import split


def test_rotation_is_that_of_complex_numbers() -> None:
    """Parity: pairs of neighbours turn by the angles of frame, row and column, in that order of frequencies."""
    (t, h, w), head_dim = (3, 2, 4), 22  # 11 frequencies: 5 for the frame, 3 for row and column
    x = torch.randn(2, t * h * w, 3, head_dim)
    turned = torch.view_as_complex(
        rope.rotate(x, rope.rotation_table((t, h, w), head_dim, CPU)).unflatten(-1, (-1, 2))
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for token in range(t * h * w):
        place = (token // (h * w), token // w % h, token % w)
        angles = [place[axis] / 10_000 ** (i / n) for axis, n in enumerate((5, 3, 3)) for i in range(n)]
        expected = pairs[:, token] * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        torch.testing.assert_close(turned[:, token], expected.to(turned.dtype))


def test_both_forms_of_the_rotation_agree() -> None:
    """Parity: the form for compilers computes what the CPU's does."""
    table = rope.rotation_table((2, 3, 2), 16, CPU)[:, None]
    pairs = torch.randn(2, 12, 3, 8, 2)
    torch.testing.assert_close(rope._as_reals(pairs, table), rope._as_complex(pairs, table))


def test_a_table_is_made_once_and_serves_training_after_inference() -> None:
    """Contract: one table a grid, usable where gradients are kept although inference made it."""
    rope.rotation_table.cache_clear()
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    with torch.inference_mode():
        given_.through(dit)
        given_.through(dit)
    assert rope.rotation_table.cache_info().misses == 1
    gradients_of(dit, given_)
    assert rope.rotation_table.cache_info().misses == 1


@pytest.mark.parametrize(("window", "scale"), [(5, 4), (3, 4), (7, 4), (5, 2), (5, 8)])
def test_a_latent_frame_hears_the_windows_of_its_frames(window: int, scale: int) -> None:
    """Golden: which frame of which window reaches the latent frame, and in what order."""
    projector = AudioProjector(
        audio_window=window,
        vae_scale=scale,
        audio_layers=1,
        audio_dim=1,
        intermediate_dim=4,
        output_dim=4,
        context_tokens=2,
    )
    frames = 1 + 2 * scale
    at = torch.arange(frames)[:, None] * 100 + torch.arange(window)  # value: frame, place in its window
    heard = projector._belonging(at[None, 1:, :, None, None].float())[0].int().tolist()
    half = window // 2
    for group, row in enumerate(heard):
        first = 1 + group * scale
        expected = [first * 100 + i for i in range(half + 1)]
        expected += [f * 100 + half for f in range(first + 1, first + scale - 1)]
        expected += [(first + scale - 1) * 100 + i for i in range(half, window)]
        assert row == expected
    assert projector(at[None, :, :, None, None].float()).shape == (1, 3, 2, 4)


@settings(max_examples=15)
@given(st.data())
def test_a_run_of_tokens_hears_what_it_hears_in_the_whole(data: st.DataObject) -> None:
    """Property: a rank whose tokens begin or end inside a frame, padding included, gets its slice of the whole."""
    frames, size, b = 4, 5, 2
    start = data.draw(st.integers(0, frames * size))
    stop = data.draw(st.integers(min(start + 1, frames * size), frames * size))
    padding = data.draw(st.integers(0 if start < stop else 1, 3))
    layer = random_dit().blocks[0].audio_cross_attn
    x = torch.randn(b, frames * size, SMALL.dim)
    audio = layer.keys(torch.randn(b, frames, SMALL.context_tokens, SMALL.output_dim))
    whole = Layout(torch.empty(0), size, (0, frames * size), frames * size, Sequence(), SDPA)
    run = torch.cat([x[:, start:stop], torch.full((b, padding, SMALL.dim), torch.nan)], dim=1)
    with torch.no_grad():
        expected = layer(x, audio, whole)[:, start:stop]
        heard = layer(run, audio, replace(whole, span=(start, stop)))
        ahead = layer.fold(audio, (start, stop), size, PLAIN)
        assert torch.equal(layer(run, ahead, replace(whole, span=(start, stop))), heard)
        layer.eight_bits = True
        rows = quantise_rows(run.nan_to_num())
        small = layer(rows, audio, replace(whole, span=(start, stop)))
        small_expected = layer(quantise_rows(x), audio, whole)[:, start:stop]
    assert heard.shape == small.shape == run.shape
    assert heard.isfinite().all()
    torch.testing.assert_close(heard[:, : stop - start], expected)
    torch.testing.assert_close(small[:, : stop - start], small_expected)
    assert not small[:, stop - start :].any()
    if start < stop:
        assert (small_expected - expected).norm() < 0.1 * expected.norm()


@settings(max_examples=20)
@given(st.integers(0, 1 << 30), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_number_is_beyond_its_bound(seed: int, loudness: float) -> None:
    """Property: scales that are known before leave nothing to be cut off, and no more than they must to spare."""
    torch.manual_seed(seed)
    dit, given_ = random_dit(), Inputs.draw(SMALL, b=2)
    layer, cross = dit.blocks[0].audio_cross_attn, dit.blocks[0].cross_attn
    k, v = (kv.flatten(0, 1) * loudness for kv in layer.keys(dit.audio_proj(given_.windows)))
    w_q = layer.q_linear.weight.unflatten(0, (SMALL.num_heads, -1))
    w_o = layer.proj.weight.T.unflatten(0, (SMALL.num_heads, -1))
    bounds = FoldBounds.of(w_q, w_o, layer.proj.bias)
    keys, values = PLAIN.fold(k, w_q), PLAIN.fold(v, w_o, layer.proj.bias)
    text, image = (loudness * torch.randn(2, n, SMALL.dim) for n in (3, 5))
    seen = cross.keys(text, 1, image)
    q = torch.randn(2, 7, SMALL.num_heads, SMALL.head_dim)
    mean = PLAIN.cross_attention(q, 1e-6, seen, SDPA)
    for found, scales in (
        (keys, bounds.of_keys(k)),
        (values, bounds.of_values(v)),
        (mean, seen.scale[:, None, None]),
    ):
        share = (found.abs() / (LARGEST * scales)).amax()
        assert 0.02 < share <= 1 + 1e-5


def test_audio_attention_by_definition() -> None:
    """Golden: kv_linear holds keys, then values, head by head; a frame's tokens hear that frame only."""
    layer, frames, size = random_dit().blocks[0].audio_cross_attn, 3, 4
    x, tokens = torch.randn(1, frames * size, SMALL.dim), torch.randn(1, frames, 5, SMALL.output_dim)
    width, d = SMALL.dim, SMALL.head_dim
    weight, bias = layer.kv_linear.weight, layer.kv_linear.bias
    out = torch.empty_like(x)
    for token in range(frames * size):
        q, heard = layer.q_linear(x[0, token]), tokens[0, token // size]
        k, v = heard @ weight[:width].T + bias[:width], heard @ weight[width:].T + bias[width:]
        for head in (slice(i * d, (i + 1) * d) for i in range(SMALL.num_heads)):
            out[0, token, head] = torch.softmax(k[:, head] @ q[head] / d**0.5, 0) @ v[:, head]
    layout = Layout(torch.empty(0), size, (0, frames * size), frames * size, Sequence(), SDPA)
    torch.testing.assert_close(layer(x, layer.keys(tokens), layout), layer.proj(out))


@dataclass
class Meeting:
    """Where the ranks of a pretended group lay down tensors and pick up everybody's."""

    size: int
    laid: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.laid, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, what: Any) -> list[Any]:
        self.laid[rank] = what
        self.barrier.wait()
        everybody = list(self.laid)
        self.barrier.wait()
        return everybody


@dataclass(frozen=True)
class ThreadSequence(Sequence):
    """A sequence over threads: runs of equal length, the last one padded."""

    size: int
    rank: int
    meeting: Meeting
    length: int

    @property
    def run(self) -> int:
        return -(-self.length // self.size)

    def span(self, length: int) -> tuple[int, int]:
        return self.rank * self.run, min(length, (self.rank + 1) * self.run)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        padded = torch.cat([x, x.narrow(dim, 0, self.run * self.size - x.shape[dim])], dim)
        return padded.narrow(dim, self.rank * self.run, self.run)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x), dim).narrow(dim, 0, length)

    def exchange(self, size: Size) -> Exchange:
        return ThreadExchange(size, self)


class ThreadExchange(Exchange):
    def __init__(self, size: Size, sequence: ThreadSequence) -> None:
        super().__init__(size)
        self.sequence = sequence

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        k, v = (self.sequence.gather(x, 1, self.size.length) for x in (k, v))
        return super().attend(kernel, q, k, v, scales)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_ranks_together_compute_what_one_computes(size: int) -> None:
    """Parity: shard, attend and gather are all that ranks need, whole frames held or not, padding or not."""
    dit, given_ = random_dit(), Inputs.draw(SMALL, latents=3, h=4, w=6)
    length = 3 * 2 * 3
    meeting = Meeting(size)
    results: list[Tensor | None] = [None] * size

    def run(rank: int) -> None:
        with torch.no_grad():
            results[rank] = given_.through(dit, ThreadSequence(size, rank, meeting, length))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        expected = given_.through(dit)
    for result in results:
        assert result is not None
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_one_rank_is_the_identity() -> None:
    """Contract: nothing is copied, padded or changed when nobody shares the work."""
    mesh = make_mesh(Ranks(torch.device("cpu")), split(1, heads=4, height=2, width=3))
    x = torch.randn(2, 3)
    assert mesh.tiles is WHOLE
    assert mesh.sequence.shard(x, 0) is x
    assert mesh.sequence.gather(x, 1, 3) is x
    assert mesh.sequence.span(7) == (0, 7)

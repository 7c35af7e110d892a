"""From speech features to the audio tokens of each latent frame, and the attention to them.

Every video frame comes with a window of speech features around it. A latent frame stands for
one video frame (the first) or for `vae_scale` of them (each other), so its tokens are made of
one whole window, or of the parts of several windows that belong to it: with the released
sizes, a window of 5 and 4 frames, the first frame gives the first 3 of its window, the two
in the middle give their centre, and the last gives its last 3, which are 8 in all.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.models.attention import KeyValue
from flashtalk_cli.models.fp8 import LARGEST, Rows, Runs, grouped
from flashtalk_cli.models.token_ops import TokenOps

if TYPE_CHECKING:
    from flashtalk_cli.models.dit import DitParams, Layout


class AudioProjector(nn.Module):
    """Speech windows -> `context_tokens` tokens of `output_dim` for every latent frame."""

    def __init__(
        self,
        *,
        audio_window: int,
        vae_scale: int,
        audio_layers: int,
        audio_dim: int,
        intermediate_dim: int,
        output_dim: int,
        context_tokens: int,
    ) -> None:
        super().__init__()
        self.vae_scale = vae_scale
        self.centre = audio_window // 2
        self.context_tokens = context_tokens
        features = audio_layers * audio_dim
        self.proj1 = nn.Linear(audio_window * features, intermediate_dim)
        self.proj1_vf = nn.Linear((audio_window + vae_scale - 1) * features, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, context_tokens * output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, windows: Tensor) -> Tensor:
        """[B, F, audio_window, audio_layers, audio_dim] -> [B, 1 + (F - 1) / vae_scale, tokens, output_dim]."""
        first = self.proj1(rearrange(windows[:, :1], "b f w l d -> b f (w l d)"))
        later = self.proj1_vf(self._belonging(windows[:, 1:]))
        hidden = F.relu(torch.cat([first, later], dim=1))
        hidden = F.relu(self.proj2(hidden))
        tokens = rearrange(self.proj3(hidden), "b t (n c) -> b t n c", n=self.context_tokens)
        return self.norm(tokens)

    def _belonging(self, windows: Tensor) -> Tensor:
        """What each group of `vae_scale` frames hears: [B, F, w, l, d] -> [B, F / vae_scale, features]."""
        groups = rearrange(windows, "b (t s) w l d -> b t s w l d", s=self.vae_scale)
        first = groups[:, :, 0, : self.centre + 1]
        middle = groups[:, :, 1:-1, self.centre]
        last = groups[:, :, -1, self.centre :]
        return rearrange(torch.cat([first, middle, last], dim=2), "b t w l d -> b t (w l d)")


class Folded(NamedTuple):
    """What frames hear, with the weights around it multiplied in: see AudioCrossAttention."""

    keys: Tensor  # [B, f, heads n, dim]
    values: Tensor  # [B, f, heads n, dim], with the output's bias
    biased: Tensor  # [B, f, heads, n], what the queries' bias adds to scores


class FoldedRows(NamedTuple):
    """The same in eight bits."""

    keys: Rows  # [B, f, heads n, dim]
    values: Rows  # [B, f, dim, heads n]
    biased: Tensor
    runs: Runs  # tokens held here of each frame


Heard = KeyValue | Folded | FoldedRows


class FoldBounds(NamedTuple):
    """What is folded is divided by in eight bits, for each unit of length of what it is folded from.

    A folded number is the product of a key's, or a value's, head with a column of weights, and so no larger than
    the product of their lengths: its scale is known before it is made, as in head_bounds.py.
    """

    keys: Tensor  # float32 [heads]
    values: Tensor  # float32 [dim]
    owed: Tensor  # float32 [dim], for the bias

    @classmethod
    @torch.no_grad()
    def of(cls, w_q: Tensor, w_o: Tensor, bias: Tensor) -> FoldBounds:
        """From weights [heads, head_dim, dim] and the bias [dim] that is dealt out to the heads."""
        longest_q, longest_o = (torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) for w in (w_q, w_o))
        owed = bias.float().abs() / (len(w_o) * LARGEST)
        return cls(longest_q.amax(1) / LARGEST, longest_o.amax(0) / LARGEST, owed)

    def of_keys(self, k: Tensor) -> Tensor:
        """Scales of the rows that keys [f, n, heads, head_dim] become: float32 [f, heads n, 1]."""
        lengths = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32)
        return rearrange(lengths * self.keys, "f n h -> f (h n) 1").contiguous()

    def of_values(self, v: Tensor) -> Tensor:
        """Scales of the channels that values [..., head_dim] become, one for all frames and videos: float32 [dim]."""
        longest = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32).amax()
        return torch.addcmul(self.owed, longest, self.values)


class AudioCrossAttention(nn.Module):
    """The tokens of a latent frame to the speech of that frame only.

    A frame has hundreds of tokens and hears few, n: so keys are multiplied by the queries' weights, and
    values by the output's, and not the other way round. With W_q and W_o the rows and columns of a head,

        q k^T = x (W_q^T k^T) + b_q k^T        out = sum over heads of softmax(..) (v W_o^T)

    which is the same number, by one product of [dim, heads n] on either side of the softmax where there
    was one of [dim, dim]: a quarter of the multiplications in the released model, an eighth in `mini`.
    The output's bias goes with values, since a head's weights sum to one. In eight bits it is what was folded
    that is quantised, tokens and weights, and no parameter.
    """

    def __init__(self, p: DitParams) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.eight_bits = False
        self.bounds: FoldBounds | None = None  # known from when eight bits first ask
        self.q_linear = nn.Linear(p.dim, p.dim)
        self.kv_linear = nn.Linear(p.output_dim, 2 * p.dim)
        self.proj = nn.Linear(p.dim, p.dim)

    def keys(self, tokens: Tensor) -> KeyValue:
        """Audio tokens [B, T, context_tokens, output_dim] -> keys and values."""
        k, v = rearrange(self.kv_linear(tokens), "b t n (two h d) -> two b t n h d", two=2, h=self.num_heads)
        return KeyValue(k, v)

    def forward(self, x: Tensor | Rows, audio: Heard, layout: Layout) -> Tensor:
        """[B, n, dim] -> [B, n, dim]; in eight bits x comes as rows. Padding gets zeros."""
        start, stop = layout.span
        folded, real = self.fold(audio, layout.span, layout.frame_tokens, layout.ops), stop - start
        videos, held, dim = (x.values if isinstance(x, Rows) else x).shape
        if not real:
            return folded.biased.new_zeros(videos, held, dim)
        if isinstance(x, Rows):
            assert isinstance(folded, FoldedRows)
            out = self._frames_of_rows(Rows(x.values[:, :real], x.scales[:, :real]), folded, layout)
        else:
            assert isinstance(folded, Folded)
            out = self._frames(x[:, :real], folded, layout)
        return F.pad(out, (0, 0, 0, held - real)) if held > real else out

    def fold(
        self, audio: Heard, span: tuple[int, int], frame_tokens: int, ops: TokenOps
    ) -> Folded | FoldedRows:
        """Keys and values, of the frames alone that tokens of this span belong to, with their weights multiplied in.

        What is folded stays as it is: it must have been for the same span.
        """
        if not isinstance(audio, KeyValue):
            return audio
        (start, stop), heads = span, self.num_heads
        # of a rank without tokens one frame, since there are no empty products
        held = slice(min(start, stop - 1) // frame_tokens, -(-stop // frame_tokens))
        w_q = rearrange(self.q_linear.weight, "(h d) c -> h d c", h=heads)
        w_o = rearrange(self.proj.weight, "c (h d) -> h d c", h=heads)
        k, v = (kv[:, held].flatten(0, 1) for kv in audio)
        biased = torch.einsum("fnhd,hd->fhn", k, self.q_linear.bias.unflatten(0, (heads, -1)))

        def of_videos(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(audio.k), held.stop - held.start))

        if self.eight_bits:
            bounds = self.bounds = self.bounds or FoldBounds.of(w_q, w_o, self.proj.bias)
            keys = Rows(*map(of_videos, ops.fold_keys(k, w_q, bounds.of_keys(k))))
            of_values = bounds.of_values(audio.v)  # of all frames: the same on every rank
            values = Rows(*map(of_videos, ops.fold_values(v, w_o, self.proj.bias, of_values)))
            return FoldedRows(keys, values, of_videos(biased), _runs(span, frame_tokens, k.device))
        return Folded(*map(of_videos, (ops.fold(k, w_q), ops.fold(v, w_o, self.proj.bias), biased)))

    def _frames(self, x: Tensor, folded: Folded, layout: Layout) -> Tensor:
        """To what their frames hear, whole ones together, and what there is of the first and the last by itself."""
        (start, stop), size = layout.span, layout.frame_tokens
        first, whole = start // size, min(stop, -(-start // size) * size)
        rest = max(whole, stop // size * size)
        outs = []
        for begin, end in pairwise((start, whole, rest, stop)):
            if begin < end:
                heard = slice(begin // size - first, -(-end // size) - first)
                outs.append(self._attend(x[:, begin - start : end - start], folded, heard, layout.ops))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _attend(self, x: Tensor, folded: Folded, frames: slice, ops: TokenOps) -> Tensor:
        """x [B, f s, dim] to what these frames, f of them, hear: [B, f s, dim]."""
        keys, values, biased = (part[:, frames].flatten(0, 1) for part in folded)
        x, videos = rearrange(x, "b (f s) c -> (b f) s c", f=len(keys) // len(x)), len(x)
        weights = ops.softmax(torch.bmm(x, keys.mT), biased, (x.shape[-1] // self.num_heads) ** -0.5)
        return rearrange(torch.bmm(weights, values), "(b f) s c -> b (f s) c", b=videos)

    def _frames_of_rows(self, x: Rows, folded: FoldedRows, layout: Layout) -> Tensor:
        """The same in eight bits, all frames in one product: [B, n, dim]."""
        keys, values, biased, runs = folded
        size, scale = layout.frame_tokens, (x.values.shape[-1] // self.num_heads) ** -0.5
        outs = []
        for video in range(len(x.values)):  # one, in use
            scores = grouped(_one(x, video), _one(keys, video), runs, biased.dtype)
            weights = layout.ops.softmax_rows(scores, biased[video], scale, size, layout.span[0] % size)
            outs.append(grouped(weights, _one(values, video), runs, biased.dtype))
        return outs[0][None] if len(outs) == 1 else torch.stack(outs)


def _one(rows: Rows, video: int) -> Rows:
    return Rows(rows.values[video], rows.scales[video])


@lru_cache(maxsize=8)
def _runs(span: tuple[int, int], frame_tokens: int, device: torch.device) -> Runs:
    """The tokens of a span by their latent frames. Kept: none can be made while a graph is recorded."""
    start, stop = span
    frames = range(start // frame_tokens, -(-stop // frame_tokens))
    lengths = [min(stop, (f + 1) * frame_tokens) - max(start, f * frame_tokens) for f in frames]
    return Runs.of(lengths, device)

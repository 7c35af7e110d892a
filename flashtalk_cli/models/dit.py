"""The audio-driven diffusion transformer: noisy latents, a picture, a prompt and speech -> velocity.

    context  = dit.condition(text, image)      once a session
    audio    = dit.hear(windows)               once a chunk
    audio    = dit.fold(audio, ...)            where that pays; else every step does it anew
    velocity = dit(x, t, y, context, audio, par)   every step

Everything that does not depend on x and t, the keys and values of all cross-attentions above all, is
computed in the first two. Parameters are named as in the released checkpoint. Norms, rotary
embedding, modulation and gates compute in float32 and hand back the compute dtype, which is
that of the weights. Shapes: B videos, T latent frames of h x w, N = T (h / 2) (w / 2) tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.attention import SDPA, AttentionKernel, CrossKeys, KeyValue, PromptKeys
from flashtalk_cli.models.audio import AudioCrossAttention, AudioProjector, Heard
from flashtalk_cli.models.fp8 import LARGEST, Rows, to_eight_bits
from flashtalk_cli.models.head_bounds import HeadBounds
from flashtalk_cli.models.layers import in_eight_bits, lay_together, linear_together
from flashtalk_cli.models.offload import Offload
from flashtalk_cli.models.rope import rotation_table
from flashtalk_cli.models.token_ops import PLAIN, TokenOps, rms_norm, token_ops
from flashtalk_cli.parallel.sequence import Sequence, Size

TIME_BASE = 10_000.0  # longest wavelength of the time sinusoid, as in the released model

# How the names of those parameters of a block begin that `condition` and `hear` read; `forward` reads the rest.
PARTS = {
    "condition": ("cross_attn.k", "cross_attn.v", "cross_attn.norm"),
    "hear": ("audio_cross_attn.kv_linear",),
}

SPEECH = "audio_cross_attn"

# What multiplies in eight bits where that is asked for: these of a block, in all but the last EXACT_BLOCKS (of speech
# it is what is folded). Any may be named, q, k and v all or none. What it costs in the picture: see bench/README.md.
EIGHT_BITS = (
    *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
    *("cross_attn.q", "cross_attn.o", SPEECH, "ffn.0", "ffn.2"),
)
EXACT_BLOCKS = 0


@dataclass(frozen=True)
class DitParams:
    """Sizes of the DiT, in the words of the released `config.json`; defaults are the 14B model's."""

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 36
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    audio_window: int = 5
    intermediate_dim: int = 512
    output_dim: int = 768
    context_tokens: int = 32
    vae_scale: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    audio_layers: int = 12
    audio_dim: int = 768
    image_dim: int = 1280

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.num_heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DitParams:
        """Read a `config.json`: keys that are not sizes are passed over, missing ones keep the default.

        Raises ModelError for a size that makes no sense and for a variant that is not this model.
        """
        for key in ("qk_norm", "cross_attn_norm", "norm_input_visual", "norm_output_audio"):
            if config.get(key, True) is not True:
                raise ModelError(f"config.json: {key} is {config[key]!r}, this model has it true")
        for key in ("in_dim", "out_dim", "audio_window", "vae_scale", "patch_size"):
            found, only = config.get(key), getattr(cls, key)
            if key in config and (tuple(found) if isinstance(found, list) else found) != only:
                raise ModelError(f"config.json: {key} is {found!r}, this model has {only!r}")
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        for key, value in known.items():
            released = getattr(cls, key)
            if not _is_like(value, released):
                raise ModelError(
                    f"config.json: {key} is {value!r}, expected a positive size like {released!r}"
                )
        params = cls(**{**known, "patch_size": tuple(known.get("patch_size", cls.patch_size))})
        if params.dim % (2 * params.num_heads):
            raise ModelError(
                f"config.json: dim {params.dim} does not divide into {params.num_heads} heads of even width"
            )
        if params.freq_dim % 2:
            raise ModelError(
                f"config.json: freq_dim {params.freq_dim} is odd: half of it are sines, half cosines"
            )
        return params


def _is_like(value: Any, released: Any) -> bool:
    """Whether value is positive, or a list of such, and of the kind of the released one."""
    if isinstance(released, tuple):
        of_its_length = isinstance(value, (list, tuple)) and len(value) == len(released)
        return of_its_length and all(map(_is_like, value, released))
    kind = (int, float) if isinstance(released, float) else int
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Context:
    """What stays the same in a session: for every block, the prompt's and the picture's keys and values."""

    blocks: tuple[CrossKeys, ...]


@dataclass(frozen=True)
class AudioContext:
    """What a chunk hears: for every block, keys and values [B, T, context_tokens, heads, head_dim]; or folded."""

    blocks: tuple[Heard, ...]


@dataclass(frozen=True)
class Layout:
    """Where the tokens held here lie in the video, and how they attend."""

    rotation: Tensor  # [tokens held here, head_dim / 2, 2], see rope
    frame_tokens: int  # tokens of a latent frame
    span: tuple[int, int]  # the real tokens held here; what is held beyond them is padding
    length: int  # real tokens of the video
    par: Sequence
    kernel: AttentionKernel
    ops: TokenOps = PLAIN


class DiT(nn.Module):
    """The whole model. `kernel` computes its attention; `recompute` trades time for memory in training."""

    def __init__(self, params: DitParams, kernel: AttentionKernel = SDPA) -> None:
        super().__init__()
        p = self.params = params
        self.kernel = kernel
        self.compiled = self.eight_bits = False
        self.recompute = False  # keep no activations inside blocks; compute them again for the backward pass
        self.offload: Offload | None = None  # where the blocks' weights are when they are not on the device
        self.patch_embedding = nn.Conv3d(p.in_dim, p.dim, kernel_size=p.patch_size, stride=p.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(p.text_dim, p.dim), nn.GELU("tanh"), nn.Linear(p.dim, p.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(p.freq_dim, p.dim), nn.SiLU(), nn.Linear(p.dim, p.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(p.dim, 6 * p.dim))
        self.blocks = nn.ModuleList(Block(p) for _ in range(p.num_layers))
        self.head = Head(p)
        self.img_emb = ImageEmbedding(p.image_dim, p.dim)
        self.audio_proj = AudioProjector(
            audio_window=p.audio_window,
            vae_scale=p.vae_scale,
            audio_layers=p.audio_layers,
            audio_dim=p.audio_dim,
            intermediate_dim=p.intermediate_dim,
            output_dim=p.output_dim,
            context_tokens=p.context_tokens,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the weights."""
        return self.patch_embedding.weight.dtype

    def arrange(self, eight_bits: bool) -> None:
        """Make loaded weights ready for inference: see `Block.arrange`."""
        self.eight_bits = eight_bits
        for index, block in enumerate(self.blocks):
            exact = not eight_bits or index >= len(self.blocks) - EXACT_BLOCKS
            cast("Block", block).arrange(() if exact else EIGHT_BITS)

    def condition(self, text: Tensor, image: Tensor) -> Context:
        """Embed a prompt and a picture and give every block its keys and values.

        text: the prompt's rows [L, text_dim] or [B, L, text_dim], L up to text_len. The released model
        attends to zero rows up to text_len like to any other; one is embedded here, for all of them.
        image: the image encoder's tokens [B, n, image_dim].
        """
        text = text.to(self.dtype).reshape(-1, *text.shape[-2:])
        empty = self.params.text_len - text.shape[1]
        assert empty >= 0, f"{text.shape[1]} text rows, {self.params.text_len} fit"
        text = F.pad(text, (0, 0, 0, min(1, empty)))
        text = self.text_embedding(text).expand(image.shape[0], -1, -1)
        image = self.img_emb(image.to(self.dtype))
        blocks = self._each_block("condition")
        return Context(tuple(block.cross_attn.keys(text, max(1, empty), image) for block in blocks))

    def hear(self, windows: Tensor) -> AudioContext:
        """Speech features -> every block's keys and values for every latent frame.

        windows: [B, F, audio_window, audio_layers, audio_dim], F = 1 + vae_scale * (T - 1).
        """
        tokens = self.audio_proj(windows.to(self.dtype))
        return AudioContext(tuple(block.audio_cross_attn.keys(tokens) for block in self._each_block("hear")))

    def fold(self, audio: AudioContext, span: tuple[int, int], frame_tokens: int) -> AudioContext:
        """What `hear` gave, made ready for the tokens held here (see Layout): for memory, a step's work less a step."""
        ops = token_ops(self.patch_embedding.weight)
        layers = (block.audio_cross_attn for block in self._each_block("forward"))
        pairs = zip(layers, audio.blocks, strict=True)
        return AudioContext(tuple(layer.fold(heard, span, frame_tokens, ops) for layer, heard in pairs))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, context: Context, audio: AudioContext, par: Sequence
    ) -> Tensor:
        """Velocity, float32 [B, out_dim, T, h, w].

        x: noisy latents [B, 16, T, h, w]. t: times [B], 0 to 1000. y: mask and picture latents
        [B, in_dim - 16, T, h, w].
        """
        tokens, grid = self._patchify(torch.cat([x, y], dim=1))
        length = tokens.shape[1]
        ops = PLAIN if self.compiled else token_ops(tokens)
        e, modulation = self._embed_time(t, ops)
        rotation = rotation_table(grid, self.params.head_dim, tokens.device)
        layout = Layout(
            rotation=par.shard(rotation, 0),
            frame_tokens=grid[1] * grid[2],
            span=par.span(length),
            length=length,
            par=par,
            kernel=self.kernel,
            ops=ops,
        )

        tokens = par.shard(tokens, 1)
        for block, keys, heard in zip(self._each_block("forward"), context.blocks, audio.blocks, strict=True):
            given = tokens, modulation, keys, heard, layout
            recompute = self.recompute and torch.is_grad_enabled()
            tokens = checkpoint(block, *given, use_reentrant=False) if recompute else block(*given)
        tokens = par.gather(self.head(tokens, e, layout.ops), 1, length)
        return self._unpatchify(tokens, grid).float()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile trace each block: for training, which gains more by it than it takes.

        The compiler fuses a block's passes itself, so traced blocks run their plain code. (It does not take
        kernels whose arguments are tuples either.)
        """
        self.compiled = True
        for block in self.blocks:
            block.compile(dynamic=False, backend=backend)

    def _each_block(self, part: str) -> Iterator[Block]:
        """The blocks, each with the weights of that part on the device."""
        return cast("Iterator[Block]", self.offload.each(part) if self.offload else iter(self.blocks))

    def _patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, in_dim, T, h, w] -> tokens [B, N, dim], and how many of them there are along each axis."""
        p, q, r = self.params.patch_size
        grid = (x.shape[2] // p, x.shape[3] // q, x.shape[4] // r)
        patches = rearrange(
            x.to(self.dtype), "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r
        )  # patches do not overlap, so the convolution is a matrix product
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias), grid

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (t, h, w), (p, q, r) = grid, self.params.patch_size
        return rearrange(tokens, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r)

    def _embed_time(self, t: Tensor, ops: TokenOps) -> tuple[Tensor, Tensor]:
        """t [B] -> e [B, dim] for the head and [B, 6, dim] for the blocks, float32."""
        half = self.params.freq_dim // 2
        frequencies = TIME_BASE ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angles = t.double()[:, None] * frequencies
        e = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        e = ops.linear_float32(self.time_embedding[0], e)
        e = ops.linear_float32(self.time_embedding[2], F.silu(e))
        modulation = ops.linear_float32(self.time_projection[1], F.silu(e))
        return e, rearrange(modulation, "b (six d) -> b six d", six=6)


class Block(nn.Module):
    """Self-attention, cross-attention to prompt and picture, cross-attention to speech, feed-forward."""

    def __init__(self, p: DitParams) -> None:
        super().__init__()
        self.eps = p.eps
        self.modulation = _modulation(6, p.dim)
        self.self_attn = SelfAttention(p)
        self.norm3 = nn.LayerNorm(p.dim, eps=p.eps)
        self.cross_attn = CrossAttention(p)
        self.norm_x = nn.LayerNorm(p.dim, eps=p.eps)
        self.audio_cross_attn = AudioCrossAttention(p)
        self.ffn = nn.Sequential(nn.Linear(p.dim, p.ffn_dim), nn.GELU("tanh"), nn.Linear(p.ffn_dim, p.dim))

    def arrange(self, eight_bits: Collection[str]) -> None:
        """Make loaded weights ready: what has these names in eight bits, and q, k, v in one piece of memory."""
        self.self_attn.bounds = self.audio_cross_attn.bounds = None
        self.audio_cross_attn.eight_bits = SPEECH in eight_bits
        to_eight_bits(self, (name for name in eight_bits if name != SPEECH))
        lay_together([self.self_attn.q, self.self_attn.k, self.self_attn.v])

    def forward(self, x: Tensor, modulation: Tensor, keys: CrossKeys, audio: Heard, layout: Layout) -> Tensor:
        """Tokens held here [B, n, dim] -> the same; modulation: float32 [B, 6, dim] of the time."""
        ops, eps = layout.ops, self.eps
        vectors, reach = ops.modulate(self.modulation, modulation, reach=layout.kernel.eight_bits)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.chunk(6, 1)
        small = in_eight_bits  # of the layer that a norm or a GELU feeds
        y = ops.norm(x, scale_1, shift_1, eps, quantise=small(self.self_attn.q))
        y = self.self_attn(y, layout, reach)
        x, y = ops.add_norm(
            x, y, gate_1, self.norm3.weight, self.norm3.bias, eps, quantise=small(self.cross_attn.q)
        )
        y = self.cross_attn(y, keys, layout)
        heard = self.audio_cross_attn.eight_bits
        x, y = ops.add_norm(x, y, None, self.norm_x.weight, self.norm_x.bias, eps, quantise=heard)
        y = self.audio_cross_attn(y, audio, layout)
        x, y = ops.add_norm(x, y, None, scale_2, shift_2, eps, quantise=small(self.ffn[0]))
        y = self.ffn[2](ops.gelu(self.ffn[0], y, quantise=small(self.ffn[2])))
        return ops.add(x, y, gate_2)


class SelfAttention(nn.Module):
    """Every token to every token of the video."""

    def __init__(self, p: DitParams) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.q = nn.Linear(p.dim, p.dim)
        self.k = nn.Linear(p.dim, p.dim)
        self.v = nn.Linear(p.dim, p.dim)
        self.o = nn.Linear(p.dim, p.dim)
        self.norm_q = RMSNorm(p.dim, p.eps)
        self.norm_k = RMSNorm(p.dim, p.eps)
        self.bounds: HeadBounds | None = None  # known from when attention in eight bits first asks

    def forward(self, x: Tensor | Rows, layout: Layout, reach: Tensor | None = None) -> Tensor:
        """[B, n, dim] -> [B, n, dim].

        reach: float32 [B], no token of x is longer; given where attention is in eight bits.
        """
        ops, scales = layout.ops, None if reach is None else self._scales(reach)
        given = x.values if isinstance(x, Rows) else x
        exchange = layout.par.exchange(self._size(given, layout, eight_bits=scales is not None))

        def turned(a: Tensor, norm: RMSNorm, out: Tensor | None, which: int) -> Tensor:
            scale = None if scales is None else scales[which]
            head_dim = exchange.size.head_dim
            return ops.rms_rotate(a, norm.weight, layout.rotation, head_dim, norm.eps, out, scale)

        if exchange.keys_first:
            k, v = linear_together(x, self.k, self.v)
        else:
            q, k, v = linear_together(x, self.q, self.k, self.v)
        k = turned(k, self.norm_k, exchange.k, 1)
        if exchange.v is not None or scales is not None:
            v = ops.place(v, exchange.v, None if scales is None else scales[2])
        exchange.send()
        if exchange.keys_first:
            q = self.q(x)
        q = turned(q, self.norm_q, exchange.q, 0)
        out = exchange.attend(layout.kernel, q, k, v, scales)
        if out.ndim == 4 and not in_eight_bits(self.o):
            out = ops.place(out, out.new_empty(given.shape))
        return self.o(ops.rows(out) if in_eight_bits(self.o) else out)

    def _size(self, x: Tensor, layout: Layout, *, eight_bits: bool) -> Size:
        videos, tokens, dim = x.shape
        dtype = torch.float8_e4m3fn if eight_bits else self.norm_q.weight.dtype
        return Size(videos, tokens, self.num_heads, dim // self.num_heads, layout.length, dtype, x.device)

    def _scales(self, reach: Tensor) -> Tensor:
        """What q, k and v are divided by in eight bits, float32 [3, B, heads]."""
        if self.bounds is None:
            self.bounds = HeadBounds.of(self.norm_q.weight, self.norm_k.weight, self.v, self.num_heads)
        return self.bounds.scales(reach)


class CrossAttention(nn.Module):
    """Every token to the prompt, and apart from that to the picture; the two are summed."""

    def __init__(self, p: DitParams) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.q = nn.Linear(p.dim, p.dim)
        self.k = nn.Linear(p.dim, p.dim)
        self.v = nn.Linear(p.dim, p.dim)
        self.o = nn.Linear(p.dim, p.dim)
        self.norm_q = RMSNorm(p.dim, p.eps)
        self.norm_k = RMSNorm(p.dim, p.eps)
        self.k_img = nn.Linear(p.dim, p.dim)
        self.v_img = nn.Linear(p.dim, p.dim)
        self.norm_k_img = RMSNorm(p.dim, p.eps)

    def keys(self, text: Tensor, times: int, image: Tensor) -> CrossKeys:
        """Embedded text rows [B, rows, dim], of which the last stands for so many, and picture tokens [B, n, dim].

        The weight of the queries' norm goes with the keys, which are few.
        """
        values, seen = self.v(text), self.v_img(image)
        with torch.no_grad():
            scale = (values.abs().amax((1, 2)) + seen.abs().amax((1, 2))).float() / LARGEST
        weight = self.norm_q.weight

        def heads(x: Tensor) -> Tensor:
            return rearrange(x, "b n (h d) -> b n h d", h=self.num_heads)

        said = PromptKeys(heads(self.norm_k(self.k(text)) * weight), heads(values), times)
        return CrossKeys(
            said, KeyValue(heads(self.norm_k_img(self.k_img(image)) * weight), heads(seen)), scale
        )

    def forward(self, x: Tensor | Rows, keys: CrossKeys, layout: Layout) -> Tensor:
        """[B, n, dim] -> [B, n, dim]."""
        q = rearrange(self.q(x), "b n (h d) -> b n h d", h=self.num_heads)
        return self.o(
            layout.ops.cross_attention(
                q, self.norm_q.eps, keys, layout.kernel, quantise=in_eight_bits(self.o)
            )
        )


class Head(nn.Module):
    """Tokens -> the velocity of their patches."""

    def __init__(self, p: DitParams) -> None:
        super().__init__()
        self.eps = p.eps
        self.head = nn.Linear(p.dim, math.prod(p.patch_size) * p.out_dim)
        self.modulation = _modulation(2, p.dim)

    def forward(self, x: Tensor, e: Tensor, ops: TokenOps) -> Tensor:
        """[B, n, dim] and the embedded time, float32 [B, dim] -> [B, n, prod(patch_size) * out_dim]."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        return self.head(ops.norm(x, 1 + scale, shift, self.eps))


class ImageEmbedding(nn.Module):
    """The image encoder's tokens -> tokens of the model's width."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        """[B, n, image_dim] -> [B, n, dim]."""
        return self.proj(image)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, self.weight, self.eps)


def _modulation(n: int, dim: int) -> nn.Parameter:
    """n vectors of standard deviation 1 / sqrt(dim); uniform, since normal_ on the meta device loads a compiler."""
    bound = math.sqrt(3 / dim)
    return nn.Parameter(torch.empty(1, n, dim).uniform_(-bound, bound))

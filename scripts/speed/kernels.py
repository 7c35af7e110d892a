"""Single operations at the 14B model's sizes, each beside the ceiling that was measured in the same run.

Fused kernels beside the plain code they stand for and the memory's rate (bytes: every input read once, every
output written once); products and attention beside each other; ways to launch a kernel over rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from measure import BF16, DEVICE, DIT, LATENTS, SMALL, TOKENS, VAE, H, Report, W, draw, milliseconds
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.models import fp8, rope, vae_blocks
from flashtalk_cli.models.attention import (
    KERNEL_NAMES,
    ROUNDING,
    CrossKeys,
    KeyValue,
    PromptKeys,
    choose_kernel,
    why_absent,
)
from flashtalk_cli.models.attention_fp8 import normed_scales, to_e4m3
from flashtalk_cli.models.audio import AudioCrossAttention, FoldBounds
from flashtalk_cli.models.dit import Layout
from flashtalk_cli.models.kernels import frames, heads, rows
from flashtalk_cli.models.kernels.ops import FUSED
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.parallel.sequence import UNDIVIDED

Run = Callable[[], object]


class Bench:
    """Times operations into a report."""

    def __init__(self) -> None:
        self.report = Report("kernels")
        a = draw(2**10 if SMALL else 2**30)
        b = torch.empty_like(a)
        self.copy_gbs = 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e6
        self.report.add("copy", gbs=self.copy_gbs)

    def compare(self, name: str, plain: Run, fast: Run, gigabytes: float) -> None:
        """Fused code beside the plain, and beside the time that its bytes take."""

        def measure() -> None:
            fused_ms = milliseconds(fast)
            floor_ms = gigabytes / self.copy_gbs * 1e3
            self.report.add(
                name, fused_ms=fused_ms, of_ceiling=floor_ms / fused_ms, plain_ms=milliseconds(plain)
            )

        self.report.trying(name, measure)

    def product(self, name: str, run: Run, tflop: float) -> None:
        """An operation with much arithmetic."""

        def measure() -> None:
            ms = milliseconds(run)
            self.report.add(name, ms=ms, tflops=tflop / ms * 1e3)

        self.report.trying(name, measure)


def row_kernels(bench: Bench) -> None:
    """Norms, sums, rotation, quantisation."""
    p = DIT
    x, y = draw(1, TOKENS, p.dim), draw(1, TOKENS, p.dim)
    scale, shift, gate = (draw(1, 1, p.dim, dtype=torch.float32) for _ in range(3))
    size = x.nbytes / 1e9
    for q in (False, True):
        tag, out = (" to e4m3", size / 2) if q else ("", size)
        bench.compare("norm" + tag, lambda q=q: PLAIN.norm(x, scale, shift, p.eps, quantise=q),
                      lambda q=q: FUSED.norm(x, scale, shift, p.eps, quantise=q), size + out)  # fmt: skip
        bench.compare("gated sum and norm" + tag,
                      lambda q=q: PLAIN.add_norm(x, y, gate, scale, shift, p.eps, quantise=q),
                      lambda q=q: FUSED.add_norm(x, y, gate, scale, shift, p.eps, quantise=q), 3 * size + out)  # fmt: skip
    bench.compare("gated sum", lambda: PLAIN.add(x, y, gate), lambda: FUSED.add(x, y, gate), 3 * size)
    table = rope.rotation_table((LATENTS, H // 2, W // 2), p.head_dim, DEVICE)
    weight, packed = draw(p.dim), draw(1, TOKENS, 3 * p.dim)[..., : p.dim]
    bench.compare("RMS norm, rotation of q", lambda: PLAIN.rms_rotate(packed, weight, table, p.head_dim, p.eps),
                  lambda: FUSED.rms_rotate(packed, weight, table, p.head_dim, p.eps), 2 * size)  # fmt: skip
    scales = normed_scales(weight, p.num_heads)[None]
    given = (packed, weight, table, p.head_dim, p.eps, None, scales)
    bench.compare("RMS norm, rotation, mixing of q to e4m3", lambda: PLAIN.rms_rotate(*given),
                  lambda: FUSED.rms_rotate(*given), 1.5 * size)  # fmt: skip
    bench.compare("v to e4m3", lambda: PLAIN.place(packed, None, scales),
                  lambda: FUSED.place(packed, None, scales), 1.5 * size)  # fmt: skip
    bench.compare("rows to e4m3", lambda: PLAIN.rows(x), lambda: FUSED.rows(x), 1.5 * size)
    own, time = draw(1, 6, p.dim), draw(1, 6, p.dim, dtype=torch.float32)
    bench.compare("modulation", lambda: PLAIN.modulate(own, time, reach=True),
                  lambda: FUSED.modulate(own, time, reach=True), 10 * own.nbytes / 2e9)  # fmt: skip
    embedding, e = (
        torch.nn.Linear(p.dim, 6 * p.dim, device=DEVICE, dtype=BF16),
        draw(1, p.dim, dtype=torch.float32),
    )
    bench.compare("time, the last of its layers", lambda: PLAIN.linear_float32(embedding, e),
                  lambda: FUSED.linear_float32(embedding, e), embedding.weight.nbytes / 1e9)  # fmt: skip
    hidden, ident = draw(1, TOKENS, p.ffn_dim), torch.nn.Identity()
    bench.compare("GELU to e4m3", lambda: PLAIN.gelu(ident, hidden, quantise=True),
                  lambda: FUSED.gelu(ident, hidden, quantise=True), 1.5 * hidden.nbytes / 1e9)  # fmt: skip


def launches(bench: Bench) -> None:
    """What a row is cut into, and the warps that take a piece: what is fastest is a matter of registers."""
    p = DIT
    x, y = draw(1, TOKENS, p.dim), draw(1, TOKENS, p.dim)
    vector = draw(1, 1, p.dim, dtype=torch.float32)
    table = rope.rotation_table((LATENTS, H // 2, W // 2), p.head_dim, DEVICE)
    runs: dict[str, Run] = {
        "gated sum and norm": lambda: FUSED.add_norm(x, y, vector, vector, vector, p.eps),
        "gated sum and norm to e4m3": lambda: FUSED.add_norm(
            x, y, vector, vector, vector, p.eps, quantise=True
        ),
        "RMS norm, rotation of q": lambda: FUSED.rms_rotate(x, vector.flatten(), table, p.head_dim, p.eps),
    }
    for piece, warps in ((512, 2), (1024, 2), (1024, 4), (1024, 8), (2048, 8)):
        figures = {}
        with mock.patch.object(rows, "pieces", lambda dim, cut=(piece, warps): cut):
            for name, run in runs.items():
                figures[name] = milliseconds(run, repeats=7)
        bench.report.add(f"pieces of {piece}, {warps} warps", **figures)
    weight, scales = draw(p.dim), torch.ones(1, p.num_heads, device=DEVICE)
    for tokens, taken, warps, stages, programs, registers in (
        (2, 32, 4, 3, 3, 168),
        (2, 32, 4, 2, 3, 168),
        (2, 32, 4, 3, 2, 255),
        (2, 32, 4, 2, 4, 128),
        (2, 16, 4, 3, 3, 168),
        (2, 8, 4, 3, 3, 168),
        (1, 32, 4, 3, 3, 168),
        (4, 32, 8, 2, 2, 128),
    ):
        cut = dict(TOKENS=tokens, TURNED_HEADS={2: taken}, TURNED_WARPS=warps, STAGES={2: stages},
                   PROGRAMS=programs, REGISTERS=registers)  # fmt: skip

        def measure(cut: dict[str, Any] = cut) -> None:
            def run() -> Tensor:
                return FUSED.rms_rotate(x, weight, table, p.head_dim, p.eps, None, scales)

            with mock.patch.multiple(heads, **cut):
                bench.report.add(f"heads to e4m3, {cut}", ms=milliseconds(run, repeats=7))

        bench.report.trying("heads to e4m3", measure)


def products(bench: Bench) -> None:
    """Matrix products in bf16 and e4m3."""
    p = DIT
    for out, width in ((p.dim, p.dim), (3 * p.dim, p.dim), (p.ffn_dim, p.dim), (p.dim, p.ffn_dim)):
        x, weight, bias = draw(1, TOKENS, width), draw(out, width), draw(out)
        tflop = 2e-12 * TOKENS * width * out
        bench.product(f"bf16 {width} to {out}", lambda x=x, w=weight, b=bias: F.linear(x, w, b), tflop)
        quantised, small = PLAIN.rows(x), fp8.Fp8Linear(weight, bias, BF16)
        bench.product(f"e4m3 {width} to {out}", lambda x=quantised, f=small: f(x), tflop)
    wide, x = torch.nn.Linear(p.dim, p.ffn_dim, device=DEVICE, dtype=BF16), draw(1, TOKENS, p.dim)
    tflop = 2e-12 * TOKENS * p.dim * p.ffn_dim
    bench.product("FFN up, GELU apart", lambda: PLAIN.gelu(wide, x), tflop)
    bench.product("FFN up, GELU within", lambda: FUSED.gelu(wide, x), tflop)


def attentions(bench: Bench) -> None:
    """Self-attention by every kernel that is here, and the speech's, folded and not."""
    p = DIT
    q = draw(1, TOKENS, p.num_heads, p.head_dim)
    scales = torch.full((3, 1, p.num_heads), 1 / 6, device=DEVICE)
    small = to_e4m3(q, scales[0])
    text, image = (draw(1, n, p.num_heads, p.head_dim) for n in (p.text_len, 257))
    for name in (*KERNEL_NAMES, *ROUNDING):
        reason = why_absent(name, DEVICE, BF16)
        if reason is not None:
            bench.report.add(f"attention, {name}", absent=reason)
            continue
        kernel = choose_kernel(name, DEVICE, BF16)
        own = (small, small, small, scales) if name in ROUNDING else (q, q, q)
        for what, given in (("self", own), ("text", (q, text, text)), ("picture", (q, image, image))):
            bench.product(f"attention, {name}, {what}", lambda kernel=kernel, given=given: kernel(*given),
                          4e-12 * TOKENS * given[1].shape[1] * p.dim)  # fmt: skip
    said = PromptKeys(text[:, :64], text[:, :64], max(1, p.text_len - 63))
    seen, auto = KeyValue(image, image), choose_kernel("auto", DEVICE, BF16)
    keys = CrossKeys(said, seen, torch.full((1,), 1 / 50, device=DEVICE))
    tflop = 4e-12 * TOKENS * (p.text_len + 257) * p.dim
    for quantise in (False, True):
        for name, ops in (("apart", PLAIN), ("fused", FUSED)):
            bench.product(f"attention to prompt and picture, {name}" + ", to e4m3" * quantise,
                          lambda ops=ops, e4m3=quantise: ops.cross_attention(q, p.eps, keys, auto, quantise=e4m3),
                          tflop)  # fmt: skip
    layer, x = AudioCrossAttention(p).to(DEVICE, BF16), draw(1, TOKENS, p.dim)
    heard = layer.keys(draw(1, LATENTS, p.context_tokens, p.output_dim))
    k, v = (kv.flatten(0, 1) for kv in heard)
    w_q, w_o = (w.unflatten(0, (p.num_heads, -1)) for w in (layer.q_linear.weight, layer.proj.weight.T))
    bounds, bias = FoldBounds.of(w_q, w_o, layer.proj.bias), layer.proj.bias
    of_keys, of_values = bounds.of_keys(k), bounds.of_values(v)
    size = (w_q.nbytes + k.nbytes + LATENTS * p.num_heads * p.context_tokens * p.dim) / 1e9
    bench.compare("speech's keys folded to e4m3", lambda: PLAIN.fold_keys(k, w_q, of_keys),
                  lambda: FUSED.fold_keys(k, w_q, of_keys), size)  # fmt: skip
    bench.compare("speech's values folded to e4m3", lambda: PLAIN.fold_values(v, w_o, bias, of_values),
                  lambda: FUSED.fold_values(v, w_o, bias, of_values), size)  # fmt: skip
    table = rope.rotation_table((LATENTS, H // 2, W // 2), p.head_dim, DEVICE)
    layout = Layout(
        table, TOKENS // LATENTS, (0, TOKENS), TOKENS, UNDIVIDED, choose_kernel("sdpa", DEVICE, BF16)
    )

    def unfolded() -> Tensor:
        q = layer.q_linear(x).view(LATENTS, -1, p.num_heads, p.head_dim).transpose(1, 2)
        k, v = (kv.flatten(0, 1).transpose(1, 2) for kv in heard)
        return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, TOKENS, p.dim))

    bench.product("audio attention, as released", unfolded, 4e-12 * TOKENS * p.dim**2)
    bench.product("audio attention, folded", lambda: layer(x, heard, layout), 4e-12 * TOKENS * p.dim**2)


def vae_kernels(bench: Bench) -> None:
    """The VAE's convolutions and the passes between them, four frames."""
    for mult, scale in ((1, 8), (2, 4), (4, 2)):
        channels, height, width = VAE.dim * mult, scale * H, scale * W
        f, past = draw(1, 4, height, width, channels), draw(1, 2, height, width, channels)
        norm, b = vae_blocks.RmsNorm(channels).to(DEVICE, BF16), draw(channels)

        def plain(f: Tensor = f, past: Tensor = past, norm: Any = norm, b: Tensor = b) -> Tensor:
            return vae_blocks.stack_frames(vae_blocks.with_past(norm(f + b, silu=True), past)[0])

        bench.compare(f"VAE norm, past, stack, {channels} ch", plain,
                      lambda f=f, past=past, norm=norm, b=b: frames.norm_stack(f, b, norm.gamma.flatten(), past),
                      (f.nbytes * 4 + past.nbytes * 2) / 1e9)  # fmt: skip
        bench.compare(f"VAE bias, shortcut, {channels} ch", lambda f=f, b=b: f.clone().add_(b).add_(f),
                      lambda f=f, b=b: frames.add_bias(f, b, f), 3 * f.nbytes / 1e9)  # fmt: skip
        stacked = draw(1, 4, height, width, 3 * channels)
        conv = vae_blocks.CausalConv(channels, channels).to(DEVICE, BF16)
        kernel = vae_blocks.stacked_kernel(conv.weight.detach())
        tflop = 2e-12 * 4 * height * width * 27 * channels**2
        for tuned in (False, True):
            torch.backends.cudnn.benchmark = tuned
            bench.product(f"VAE convolution, {channels} ch{', cudnn.benchmark' * tuned}",
                          lambda x=stacked, k=kernel: vae_blocks.conv_frames(x, k, None, padding=1), tflop)  # fmt: skip
        torch.backends.cudnn.benchmark = False


@torch.no_grad()
def main() -> int:
    bench = Bench()
    for part in (products, attentions, row_kernels, vae_kernels, launches):
        bench.report.trying(part.__name__, lambda part=part: part(bench))  # type: ignore[misc]
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return bench.report.ended()


if __name__ == "__main__":
    sys.exit(main())

"""Every Triton kernel compiles for a Hopper GPU, as the 14B model calls it: no GPU is needed for that.

The networks run on the meta device at their full sizes, with the types and constants of a real run, and each
launch is compiled to machine code in place of running. What the code computes is held by kernel_checks.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtalk_cli.models import audio as audio_module
from flashtalk_cli.models import dit as dit_module
from flashtalk_cli.models import fp8, vae_blocks
from flashtalk_cli.models import vae as vae_module
from flashtalk_cli.models.attention import CrossKeys, KeyValue, PromptKeys
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.vae import Vae, VaeParams
from flashtalk_cli.parallel.sequence import UNDIVIDED
from flashtalk_cli.parallel.spatial import WHOLE, Tiles

triton = pytest.importorskip("triton", reason="needs the package triton")
from tests.kernel_checks import Framed  # noqa: E402  (it imports kernels)

META, BF16 = torch.device("meta"), torch.bfloat16
EVERY_LAYER = [
    f"{part}.{name}"
    for part, names in (("self_attn", "qkvo"), ("cross_attn", "qo"), ("ffn", "02"))
    for name in names
] + [dit_module.SPEECH]
LATENTS, H, W = 9, 96, 56  # of a chunk at 448 x 768
SHARED_BYTES = 227 * 1024  # that one program may have on a Hopper GPU
STACK_BYTES = 64  # a thread, next to 1 kB of registers
MORE_STACK_BYTES = {"_cross_held": 192}  # measured: nothing that needs less was faster (docs/speed-log.md)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU they run"),
]

Compiled = dict[str, list[Any]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """By a kernel's name, what its launches were compiled to."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    kernels: Compiled = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: object, grid: object, warmup: bool = False, **options: object) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.setdefault(self.fn.__name__, []).append(kernel)
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", hopper)
    return kernels


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=META, dtype=dtype)


def assert_machine_code(compiled: Compiled, names: set[str]) -> None:
    """There is some, it fits the shared memory of a multiprocessor, and it keeps its numbers in registers."""
    assert set(compiled) == names
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_BYTES, name
            assert stack_bytes(kernel.asm["cubin"]) <= MORE_STACK_BYTES.get(name, STACK_BYTES), name


def stack_bytes(cubin: bytes) -> int:
    """Memory a thread for what found no register, as Triton's cuobjdump tells it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"STACK:(\d+)", told))


@torch.no_grad()
def test_a_step_of_the_dit(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, and with every layer in eight bits that can be."""
    from flashtalk_cli.models.kernels.ops import FUSED

    monkeypatch.setattr(dit_module, "token_ops", lambda tokens: FUSED)
    monkeypatch.setattr(
        dit_module, "rotation_table", lambda grid, width, _: meta(LATENTS * H * W // 4, width // 2, 2)
    )
    monkeypatch.setattr(
        fp8, "linear", lambda x, weight, *_: meta(*x.values.shape[:-1], len(weight), dtype=BF16)
    )  # torch has no product in eight bits for this device
    monkeypatch.setattr(
        audio_module, "grouped", lambda x, weight, *_: meta(len(x.values), weight.values.shape[1], dtype=BF16)
    )
    with META:
        dit = DiT(replace(DitParams(), num_layers=1)).to(BF16)
    p = dit.params
    context = dit.condition(meta(64, p.text_dim), meta(1, 257, p.image_dim))
    heard = dit.hear(meta(1, 33, p.audio_window, p.audio_layers, p.audio_dim))
    for names in ((), EVERY_LAYER):
        dit.blocks[0].arrange(names)
        velocity = dit(
            meta(1, 16, LATENTS, H, W), meta(1), meta(1, 20, LATENTS, H, W), context, heard, UNDIVIDED
        )
        assert velocity.shape == (1, 16, LATENTS, H, W)
    assert_machine_code(
        compiled,
        {
            *("_sum_norm", "_rms_rotate", "_quantise", "_inverse_rms", "_cross_held", "_fold", "_softmax"),
            *("_modulate", "_linear"),
        },
    )


def test_attention_to_prompt_and_picture_in_float32(compiled: Compiled) -> None:
    """Heads as wide as the 14B model's, for which tiles of bfloat16 would not do."""
    from flashtalk_cli.models.kernels import cross

    q, text, image = meta(1, 12096, 40, 128), meta(2, 1, 64, 40, 128), meta(2, 1, 257, 40, 128)
    keys = CrossKeys(PromptKeys(*text, 449), KeyValue(*image), meta(1))
    out = cross.attention(q, 1e-6, keys, quantise=False)
    assert isinstance(out, Tensor)
    assert out.shape == (1, 12096, 5120)
    assert_machine_code(compiled, {"_cross", "_inverse_rms"})


def test_heads_in_eight_bits(compiled: Compiled) -> None:
    """Slices of one product for q, k and v, alone and into what two ranks exchange."""
    from flashtalk_cli.models.kernels import heads

    tokens, dim = 12096, 5120
    x, scales = meta(1, tokens, 3 * dim, dtype=BF16)[..., dim : 2 * dim], meta(1, 40)
    weight, table = meta(dim, dtype=BF16), meta(tokens, 64, 2)
    room = meta(2, 1, tokens, 3, dim // 2, dtype=torch.float8_e4m3fn)[:, :, :, 1].permute(1, 2, 0, 3)
    for out in (None, room):
        for result in (
            heads.rms_rotate(x, weight, table, scales, 1e-6, out),
            heads.place(x, scales, out),
        ):
            assert result.shape[:2] == (1, tokens)
            assert result.dtype == torch.float8_e4m3fn
    assert_machine_code(compiled, {"_rms_rotate_heads", "_place_heads"})


@pytest.mark.parametrize("tiles", [WHOLE, Framed()], ids=["whole", "framed"])
@torch.no_grad()
def test_a_decode(compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    """The first latent, the second and those after it; every convolution is given its kernel channels-last."""

    def conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        sides = (
            (n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[2:], kernel.shape[2:], strict=True)
        )
        return meta(len(x), *sides, len(kernel), dtype=x.dtype).permute(0, 3, 1, 2)  # as cuDNN gives it

    monkeypatch.setattr(vae_blocks, "fused", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(vae_blocks.F, "conv2d", conv2d)
    monkeypatch.setattr(vae_module, "_latent_statistics", lambda device: (meta(16), meta(16)))
    with META:
        vae = Vae(VaeParams()).to(BF16)
    video, _ = vae.decode(meta(1, 16, 3, H, W), tiles=tiles)
    assert video.shape == (1, 3, 9, 8 * H, 8 * W)
    assert_machine_code(compiled, {"_norm_stack", "_add_bias", "_interleave"})


@pytest.mark.parametrize("silu", [False, True])
def test_norm_and_stacking_with_gradients(compiled: Compiled, silu: bool) -> None:
    """Forward and backward, at the widths of the VAE's levels."""
    from flashtalk_cli.models import vae_triton

    for channels in (96, 192, 384):
        x, gamma = (
            meta(1, 4, H, W, channels, dtype=BF16).requires_grad_(),
            meta(channels, dtype=BF16).requires_grad_(),
        )
        vae_triton.NormSilu.apply(x, gamma, silu).sum().backward()
        vae_triton.StackFrames.apply(x).sum().backward()
    assert_machine_code(compiled, {"_norm", "_norm_backward", "_unstack"})

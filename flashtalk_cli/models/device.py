"""Which device and which number format a run uses."""

from __future__ import annotations

import torch

from flashtalk_cli.errors import DeviceError


def choose_device(name: str) -> torch.device:
    """The device a preset names; `auto` is the first GPU where there is one.

    Raises DeviceError when a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"no CUDA device is visible to torch {torch.__version__}: "
            "install a driver and a CUDA build of torch, or use --device cpu, "
            "or --set compute.device=cpu where a command has no --device"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format a preset names; `auto` is bfloat16 where the device multiplies it faster than float32.

    Beside `fp8`, which is for matrix products only, all else is bfloat16.
    """
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX; without them torch emulates the format, slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may go away
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def out_of_memory(error: torch.OutOfMemoryError) -> DeviceError:
    """What an allocation that failed means to whoever runs the program, and what helps."""
    return DeviceError(
        f"out of memory: {str(error).splitlines()[0]}; use --offload, a smaller --size, or more GPUs (--gpus)"
    )

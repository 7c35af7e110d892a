"""Networks made ready for training: their first weights, their number format, their spread over ranks.

In one piece, the network computes in `dtype`, and float32 masters of its parameters are what the optimiser
moves. In shards, one a rank, FSDP2 keeps them in float32 and gathers them in `dtype`, block by block.
Both look alike from outside: `Trained.parameters` are float32, whoever holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flashtalk_cli.distill.config import Network
from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.attention import AttentionKernel
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.folder import ModelFolder
from flashtalk_cli.models.tensors import Source, open_files, tensors_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED_VARIANTS = 64  # batch sizes, and with and without gradients, over all networks of a run
READ_OUTSIDE_FORWARD = {"cross_attn": ("keys",), "audio_cross_attn": ("keys",)}


def build(params: DitParams, network: Network, kernel: AttentionKernel) -> DiT:
    """The network without memory."""
    with torch.device("meta"):
        dit = DiT(params, kernel)
    dit.recompute = network.recompute
    return dit


def place(dit: DiT, network: Network, device: torch.device, shards: int, *, trained: bool) -> None:
    """Give it memory on the device, its values still unset; cut into shards, one of them."""
    dtype = DTYPES[network.dtype]
    if shards == 1 or not trained:
        dit.to(dtype)
    if shards > 1:
        _shard(dit, dtype, device)
    dit.to_empty(device=device)
    dit.requires_grad_(trained)
    # CPUs rotate pairs as complex numbers, for which inductor makes no code.
    if network.compile and device.type == "cuda":
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
        dit.compile_blocks()


def _shard(dit: DiT, dtype: torch.dtype, device: torch.device) -> None:
    """Float32 shards, gathered in `dtype` one block at a time, gradients summed in float32.

    A cross-attention is a unit of its own: its keys are computed before the block itself runs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in dit.blocks:
        for name, methods in READ_OUTSIDE_FORWARD.items():
            unit = fully_shard(getattr(block, name), mesh=mesh, mp_policy=policy)
            for method in methods:
                register_fsdp_forward_method(unit, method)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(dit, mesh=mesh, mp_policy=policy)
    for method in ("condition", "hear"):
        register_fsdp_forward_method(dit, method)


@torch.no_grad()
def draw_weights(dit: DiT, seed: int) -> None:
    """First weights of a network that is trained from nothing, the same on any number of ranks.

    Linear layers as Glorot and Bengio draw them; what each branch adds to the residual stream
    starts small, by the depth of the network; the head starts at zero: no motion.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    branches = ("self_attn.o.", "cross_attn.o.", "audio_cross_attn.proj.", "ffn.2.")
    for name, parameter in dit.named_parameters():
        shape, leaf = tuple(parameter.shape), name.rpartition(".")[2]
        value = torch.zeros(shape)
        if leaf == "modulation":
            value.normal_(0, shape[-1] ** -0.5, generator=generator)
        elif leaf == "weight" and len(shape) == 1:  # norms
            value.fill_(1.0)
        elif leaf == "weight" and name != "head.head.weight":
            fan_out, fan_in = shape[0], math.prod(shape[1:])
            bound = math.sqrt(6 / (fan_in + fan_out))
            if any(branch in name for branch in branches):
                bound /= math.sqrt(2 * len(dit.blocks))
            value.uniform_(-bound, bound, generator=generator)
        set_value(parameter, value)


def read_weights(dit: DiT, source: Source) -> None:
    """Fill the network from a file of weights, tensor by tensor.

    Raises ModelError when names or shapes are not the network's.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in tensors_of(dit)}
    found = dict(source.shapes)
    if found != expected:
        wrong = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise ModelError(
            f"{source.where} does not fit this network: {len(wrong)} tensors differ, first {wrong[0]} "
            f"({list(found.get(wrong[0], ()))} there, {list(expected.get(wrong[0], ()))} here)"
        )
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            set_value(parameter, source.read(name))


def read_released(dit: DiT, folder: ModelFolder) -> None:
    """Fill the network from a model folder. Raises ModelError."""
    paths = folder.files("dit")
    if not paths:
        raise ModelError(
            f"{folder.path} has no weights of the diffusion transformer: set network.init to random"
        )
    read_weights(dit, open_files(paths))


def set_value(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; of a shard only its own rows."""
    local(parameter).copy_(like(value, parameter))


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that all ranks have, if it is spread as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    placements = parameter.placements  # type: ignore[attr-defined]
    return local(distribute_tensor(value, parameter.device_mesh, placements, src_data_rank=None))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over ranks, in one piece. All ranks must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def whole_tensors(
    names: list[str], tensors: list[Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Named tensors in one piece on the CPU, one at a time. All ranks must ask."""
    for name, tensor in zip(names, tensors, strict=True):
        yield name, whole(tensor).to("cpu", dtype)


def params_of(config: Mapping[str, Any]) -> DitParams:
    """Sizes of a model folder's diffusion transformer."""
    return DitParams.from_config(config)

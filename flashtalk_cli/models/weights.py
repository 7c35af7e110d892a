"""Networks with their weights, from a model folder.

Every loader builds its network on the meta device, checks all names and shapes, and then reads tensor
by tensor onto the device, in the wanted number format: the host never holds a model twice, and a
wrong folder is told before anything is read.

Random weights are for timing: the same networks, filled on the device at scales that keep activations
ordinary, with no file read. What comes out of them means nothing.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from flashtalk_cli.errors import DeviceError, ModelError
from flashtalk_cli.models.attention import SDPA, AttentionKernel
from flashtalk_cli.models.dit import PARTS, DiT, DitParams
from flashtalk_cli.models.folder import CONFIG, KNOWN, Component, ModelFolder, read_json
from flashtalk_cli.models.image import ImageEncoder, ImageParams, build_image, image_layout
from flashtalk_cli.models.offload import CudaLane, Offload
from flashtalk_cli.models.speech import (
    SpeechEncoder,
    build_speech,
    fold_weight_norm,
    speech_layout,
    speech_name,
)
from flashtalk_cli.models.tensors import (
    Layout,
    Source,
    View,
    fill,
    home_of,
    open_files,
    put,
    settled,
    tensors_of,
)
from flashtalk_cli.models.text import (
    MAX_TOKENS,
    TextEncoder,
    TextParams,
    build_text,
    byte_ids,
    load_tokenizer,
    text_layout,
)
from flashtalk_cli.models.vae import Vae, VaeParams

_log = logging.getLogger(__name__)


def load_dit(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernel: AttentionKernel = SDPA,
    offload: bool = False,
    eight_bits: bool = False,
    random: bool = False,
    seed: int = 0,
) -> DiT:
    """The diffusion transformer; with `offload`, its blocks' weights in host memory (see models/offload.py).

    With `eight_bits`, the blocks' large layers are quantised as they lie on the device (see models/fp8.py).

    This and the other loaders: parameters are `dtype` on `device`, without gradients, in evaluation
    mode. Raises ModelError for files that are absent, broken, or whose tensors do not fit (the first
    few are named), DeviceError when the device has too little memory free.
    """
    plan = plan_of(folder, "dit", random)
    plan.module.kernel = kernel
    if not offload:
        dit = _loaded(plan, device, dtype, random, seed)
        dit.arrange(eight_bits)
        return dit
    if eight_bits:
        raise DeviceError("precision.dit fp8 does not go with --offload: leave one of them out")
    dit = _loaded(plan, device, dtype, random, seed, on_host="blocks.")
    dit.offload = Offload(dit.blocks, PARTS, CudaLane(device))
    return dit


def load_vae(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, *, random: bool = False, seed: int = 0
) -> Vae:
    """The video VAE. See `load_dit`."""
    return _loaded(plan_of(folder, "vae", random), device, dtype, random, seed)


def load_text_encoder(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, *, random: bool = False, seed: int = 0
) -> TextEncoder:
    """The text encoder with its tokenizer; prompts are cut to what the DiT takes. See `load_dit`."""
    max_tokens = min(MAX_TOKENS, DitParams.from_config(_config(folder, random)).text_len)
    plan = plan_of(folder, "text", random)
    tokenise: Callable[[str], list[int]]
    if random and not folder.tokenizer.is_dir():
        tokenise = partial(byte_ids, max_tokens=max_tokens)
    else:
        tokenise = load_tokenizer(folder.tokenizer, max_tokens, plan.params.vocabulary)
    return TextEncoder(_loaded(plan, device, dtype, random, seed), tokenise)


def load_image_encoder(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, *, random: bool = False, seed: int = 0
) -> ImageEncoder:
    """The image encoder. See `load_dit`."""
    plan = plan_of(folder, "image", random)
    return ImageEncoder(_loaded(plan, device, dtype, random, seed), plan.params)


def load_speech_encoder(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, *, random: bool = False, seed: int = 0
) -> SpeechEncoder:
    """The speech encoder. See `load_dit`."""
    plan = plan_of(folder, "speech", random)
    if random:
        fold_weight_norm(plan.module)  # before: a random magnitude and direction would make a silent one
    module = _loaded(plan, device, dtype, random, seed)
    fold_weight_norm(module)
    return SpeechEncoder(module)


@dataclass(frozen=True)
class Plan:
    """A component's network on the meta device, and where its tensors are.

    params are the sizes, in the component's own class; no source: the weights will be random.
    """

    component: Component
    module: Any
    layout: Layout
    params: Any
    source: Source | None


def plan_of(folder: ModelFolder, component: Component, random: bool = False) -> Plan:
    """Build a component's network without memory, from a folder's files; compares no tensor names yet.

    random: sizes of files that are absent are the released ones. Raises ModelError for a file that
    is absent or broken, and for components that are not of one model.
    """
    config = _config(folder, random)
    dit = DitParams.from_config(config)
    source = _source(folder, component, random)
    shapes = source.shapes if source else {}
    if component == "text":
        return _plan_text(dit, source, shapes)
    if component == "image":
        return _plan_image(dit, config, source, shapes)
    if component == "speech":
        return _plan_speech(dit, folder, source)
    try:
        params: DitParams | VaeParams = dit if component == "dit" else VaeParams.from_config(config)
        with torch.device("meta"):
            module = DiT(params) if isinstance(params, DitParams) else Vae(params)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # of the wrong type, or fractional
        raise ModelError(f"config.json has a size that makes no {component}: {error!s:.160}") from error
    return Plan(component, module, Layout.same_names(module), params, source)


def _plan_text(dit: DitParams, source: Source | None, shapes: Mapping[str, Any]) -> Plan:
    params = TextParams.from_shapes(shapes) if source else replace(TextParams(), dim=dit.text_dim)
    _agree("text encoder", params.dim, "text_dim", dit.text_dim)
    return Plan("text", build_text(params), text_layout(params), params, source)


def _plan_image(
    dit: DitParams, config: Mapping[str, Any], source: Source | None, shapes: Mapping[str, Any]
) -> Plan:
    heads = config.get("clip_heads", ImageParams.heads)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ModelError(f"config.json: clip_heads is {heads!r}, a positive whole number was expected")
    params = ImageParams.from_shapes(shapes, heads) if source else replace(ImageParams(), dim=dit.image_dim)
    _agree("image encoder", params.dim, "image_dim", dit.image_dim)
    module = build_image(params)
    return Plan("image", module, image_layout(module, params), params, source)


def _plan_speech(dit: DitParams, folder: ModelFolder, source: Source | None) -> Plan:
    module = build_speech(read_json(folder.speech_path / CONFIG) if source else {})
    _agree("speech encoder", module.config.hidden_size, "audio_dim", dit.audio_dim)
    _agree("speech encoder", module.config.num_hidden_layers, "audio_layers", dit.audio_layers)
    return Plan("speech", module, speech_layout(module), module.config, source)


def _agree(name: str, found: int, key: str, wanted: int) -> None:
    if found != wanted:
        raise ModelError(
            f"the {name} has {found} where config.json's {key} is {wanted}: they are of two models"
        )


def _config(folder: ModelFolder, random: bool) -> dict[str, Any]:
    """config.json; without one, random weights of a model from the Hub have the released sizes."""
    known = KNOWN.get(folder.name)
    if random and known and known.repository and not (folder.path / CONFIG).is_file():
        return {}
    return folder.config()


def _source(folder: ModelFolder, component: Component, random: bool) -> Source | None:
    """The component's tensors under the names that its layout uses."""
    paths = folder.files(component)
    if random and (component in ("dit", "vae") or not paths):
        return None  # sizes come from config.json, or are the released ones
    if not paths:
        raise ModelError(
            f"{folder.path} has no file of the {component} component: {', '.join(folder.missing())}"
        )
    source = open_files(paths)
    if component == "image":
        return View.of(source, lambda key: key.removeprefix("visual.") if key.startswith("visual.") else None)
    return View.of(source, speech_name) if component == "speech" else source


def _loaded(
    plan: Plan, device: torch.device, dtype: torch.dtype, random: bool, seed: int, on_host: str | None = None
) -> Any:
    started_s = time.perf_counter()
    module: nn.Module = plan.module
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in tensors_of(module)}
    n_bytes = sum(size for name, size in sizes.items() if home_of(name, device, on_host) == device)
    _check_memory(plan.component, n_bytes, device)
    if random:
        _log.warning("%s: random weights, for timing only; the pictures mean nothing", plan.component)
        fill_random(module, device, dtype, seed, on_host)
    else:
        assert plan.source is not None
        fill(module, plan.layout, plan.source, device, dtype, on_host)
    _log.info(
        "%s: %.2f GB on %s in %.1f s", plan.component, n_bytes / 1e9, device, time.perf_counter() - started_s
    )
    return module.eval()


def _check_memory(component: Component, n_bytes: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    free_bytes, _ = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if n_bytes > free_bytes:
        mend = "use --offload, " if component == "dit" else ""
        raise DeviceError(
            f"{device} has {free_bytes / 2**30:.1f} GiB free, the {component} component needs "
            f"{n_bytes / 2**30:.1f} GiB: {mend}free the device, use bfloat16, or a smaller model"
        )


@torch.no_grad()
def fill_random(
    module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int, on_host: str | None = None
) -> None:
    """Give a module on the meta device normal weights drawn on the device itself; see `fill` for `on_host`.

    A tensor's values follow from the seed and its name, so two ranks or two builds agree.
    """
    generator = torch.Generator(device)
    for name, built in list(tensors_of(module)):
        mean, std = random_scale(name, tuple(built.shape))
        generator.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        # `empty_like` of a tensor on the meta device would load a compiler first.
        value = torch.empty_strided(built.shape, built.stride(), device=device, dtype=dtype)
        value = value.normal_(mean, std, generator=generator)
        put(module, name, value, home_of(name, device, on_host), dtype)
    settled(module)


def random_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation for a random parameter: what keeps activations near their scale."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return 0.0, 0.02
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):  # norms
        return 1.0, 0.02
    if name == "shared.weight":  # T5's embedding: its rows are not scaled afterwards
        return 0.0, 1.0
    if leaf in ("modulation", "class_embedding"):
        return 0.0, 0.1
    return 0.0, 1 / math.sqrt(max(1, math.prod(shape[1:])))

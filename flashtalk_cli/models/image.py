"""The image encoder: a picture to tokens, by the vision half of CLIP (ViT-H/14 as released).

The network is `transformers.CLIPVisionModel`. The diffusion model was trained on the tokens that
go into the last block, so that block, the norm behind it and the head are not built here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.tensors import Layout, MemorySource, Piece, Shape, fill
from flashtalk_cli.models.text import count_blocks

# Mean and standard deviation of the pictures that CLIP was trained on, by channel, of values 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageParams:
    """Size of the network; the defaults are the released one's."""

    image_px: int = 224
    patch_px: int = 14
    dim: int = 1280
    ffn_dim: int = 5120
    heads: int = 16  # no shape tells it: `clip_heads` of config.json
    layers: int = 32  # in the file; one less is run
    head_dim: int = 1024  # width of the projection that is not used

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape], heads: int) -> ImageParams:
        """Sizes as the released tensors' shapes tell them; ModelError when one that tells is absent."""
        try:
            dim, _, patch_px, _ = shapes["patch_embedding.weight"]
            _, n_tokens, _ = shapes["pos_embedding"]
            ffn_dim, _ = shapes["transformer.0.mlp.0.weight"]
            _, head_dim = shapes["head"]
        except (KeyError, ValueError) as error:
            raise ModelError(f"the image encoder's size cannot be told: no fitting tensor {error}") from error
        side = math.isqrt(n_tokens - 1)
        if side * side != n_tokens - 1 or dim % heads:
            raise ModelError(
                f"the image encoder has {n_tokens} positions (1 + a square expected) and "
                f"width {dim} in {heads} heads: set clip_heads in config.json"
            )
        layers = count_blocks(shapes, "transformer")
        return cls(side * patch_px, patch_px, dim, ffn_dim, heads, layers, head_dim)


def build_image(params: ImageParams) -> Any:
    """The network on the meta device, without what comes after the last block but one."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=params.dim,
        intermediate_size=params.ffn_dim,
        num_hidden_layers=params.layers - 1,
        num_attention_heads=params.heads,
        image_size=params.image_px,
        patch_size=params.patch_px,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        module = CLIPVisionModel(config)
    inner = _inner(module)
    inner.post_layernorm = nn.Identity()
    positions = inner.embeddings.position_ids
    inner.embeddings.position_ids = torch.arange(positions.shape[-1], device="cpu").expand(positions.shape)
    return module.eval()


def _inner(module: Any) -> Any:
    """Where embeddings and blocks are: transformers 4 wraps them once more."""
    return getattr(module, "vision_model", module)


def image_layout(module: nn.Module, params: ImageParams) -> Layout:
    """Where each parameter of the network lies among the file's `visual.` tensors."""
    prefix = "vision_model." if _inner(module) is not module else ""
    pieces = {
        "embeddings.class_embedding": Piece("cls_embedding", lead=2),
        "embeddings.position_embedding.weight": Piece("pos_embedding", lead=1),
        "embeddings.patch_embedding.weight": Piece("patch_embedding.weight"),
        "pre_layrnorm.weight": Piece("pre_norm.weight"),  # transformers' own spelling
        "pre_layrnorm.bias": Piece("pre_norm.bias"),
    }
    for i in range(params.layers - 1):
        pieces |= {f"encoder.layers.{i}.{name}": piece for name, piece in _block(f"transformer.{i}").items()}
    return Layout({prefix + name: piece for name, piece in pieces.items()}, _unused(params))


def _block(released: str) -> dict[str, Piece]:
    places = {
        **{f"self_attn.{x}_proj": Piece(f"{released}.attn.to_qkv", i, 3) for i, x in enumerate("qkv")},
        "self_attn.out_proj": Piece(f"{released}.attn.proj"),
        "layer_norm1": Piece(f"{released}.norm1"),
        "layer_norm2": Piece(f"{released}.norm2"),
        "mlp.fc1": Piece(f"{released}.mlp.0"),
        "mlp.fc2": Piece(f"{released}.mlp.2"),
    }
    return {
        f"{name}.{kind}": Piece(f"{piece.key}.{kind}", piece.part, piece.parts)
        for name, piece in places.items()
        for kind in ("weight", "bias")
    }


def _unused(params: ImageParams) -> dict[str, Shape]:
    dim, ffn_dim, last = params.dim, params.ffn_dim, f"transformer.{params.layers - 1}"
    rows: dict[str, Shape] = {
        "norm1": (dim,),
        "attn.to_qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "norm2": (dim,),
        "mlp.0": (ffn_dim, dim),
        "mlp.2": (dim, ffn_dim),
    }
    unused: dict[str, Shape] = {
        "head": (dim, params.head_dim),
        "post_norm.weight": (dim,),
        "post_norm.bias": (dim,),
    }
    for name, shape in rows.items():
        unused |= {f"{last}.{name}.weight": shape, f"{last}.{name}.bias": shape[:1]}
    return unused


def image_module(weights: Mapping[str, Tensor], heads: int) -> nn.Module:
    """The network with tensors under their released names (without `visual.`); float32, on the CPU."""
    source = MemorySource(weights)
    params = ImageParams.from_shapes(source.shapes, heads)
    module = build_image(params)
    fill(module, image_layout(module, params), source, "cpu", torch.float32)
    return module


def tokens(module: nn.Module, pixels: Tensor) -> Tensor:
    """Tokens [B, n, dim] before the last block, of normalised pixels [B, 3, image_px, image_px]."""
    return module(pixel_values=pixels).last_hidden_state


def normalise(picture: Tensor, image_px: int) -> Tensor:
    """Pictures [3, H, W] or [N, 3, H, W] in [-1, 1] as CLIP sees them: float32 [N, 3, image_px, image_px].

    Squeezed to a square, bicubic without antialiasing: what the diffusion model was trained with.
    """
    pictures = picture.float().reshape(-1, *picture.shape[-3:])
    squeezed = F.interpolate(pictures, size=(image_px, image_px), mode="bicubic", align_corners=False)
    mean, std = (squeezed.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (squeezed / 2 + 0.5 - mean) / std


class ImageEncoder:
    """Pictures to tokens."""

    def __init__(self, module: nn.Module, params: ImageParams) -> None:
        self.module = module
        self.params = params

    @torch.no_grad()
    def encode(self, picture: Tensor) -> Tensor:
        """A picture [3, H, W] in [-1, 1], cut to the canvas, as tokens [1, n, dim] in the network's format."""
        weight = next(self.module.parameters())
        pixels = normalise(picture.to(weight.device), self.params.image_px)
        return tokens(self.module, pixels.to(weight.dtype))

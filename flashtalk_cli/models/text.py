"""The text encoder: a prompt to one row per token, by the encoder half of UMT5.

The network is `transformers.UMT5EncoderModel`; here are its sizes read from the released tensors,
the renaming of those tensors, and the cleaning of the prompt that the model was trained with.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.tensors import Layout, MemorySource, Piece, Shape, fill

MAX_TOKENS = 512


@dataclass(frozen=True)
class TextParams:
    """Size of the network; the defaults are the released one's."""

    vocabulary: int = 256_384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10_240
    heads: int = 64
    layers: int = 24
    buckets: int = 32  # of relative positions

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> TextParams:
        """Sizes as the released tensors' shapes tell them; ModelError when one that tells is absent."""
        try:
            vocabulary, dim = shapes["token_embedding.weight"]
            buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
            attention_dim, _ = shapes["blocks.0.attn.q.weight"]
            ffn_dim, _ = shapes["blocks.0.ffn.fc1.weight"]
        except (KeyError, ValueError) as error:
            raise ModelError(f"the text encoder's size cannot be told: no fitting tensor {error}") from error
        return cls(vocabulary, dim, attention_dim, ffn_dim, heads, count_blocks(shapes, "blocks"), buckets)


def count_blocks(shapes: Mapping[str, Shape], prefix: str) -> int:
    """Number of blocks named PREFIX.0., PREFIX.1., ...: the highest index plus one."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for key in shapes if (found := pattern.match(key))), default=-1)


def build_text(params: TextParams) -> nn.Module:
    """The network on the meta device: parameters have shapes and no memory."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=params.vocabulary,
        d_model=params.dim,
        d_kv=params.attention_dim // params.heads,
        d_ff=params.ffn_dim,
        num_layers=params.layers,
        num_heads=params.heads,
        relative_attention_num_buckets=params.buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",  # the tanh form
        dropout_rate=0.0,
        use_cache=False,
    )
    with torch.device("meta"):
        module = UMT5EncoderModel(config)
    module.set_input_embeddings(module.shared)  # tied; not every transformers release does it by itself
    return module.eval()


def text_layout(params: TextParams) -> Layout:
    """Where each parameter of the network lies in the released file."""
    names = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}
    inside = {
        "layer.0.layer_norm.weight": "norm1.weight",
        **{f"layer.0.SelfAttention.{x}.weight": f"attn.{x}.weight" for x in "qkvo"},
        "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
        "layer.1.layer_norm.weight": "norm2.weight",
        "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
        "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
        "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
    }
    for i in range(params.layers):
        names |= {f"encoder.block.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in inside.items()}
    return Layout({ours: Piece(theirs) for ours, theirs in names.items()})


def text_module(weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with tensors under their released names; float32, on the CPU."""
    source = MemorySource(weights)
    params = TextParams.from_shapes(source.shapes)
    module = build_text(params)
    fill(module, text_layout(params), source, "cpu", torch.float32)
    return module


def encode_ids(module: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Rows of token ids [B, n] up to the longest true length: [B, L, dim].

    mask: [B, n], 1 for a token and 0 for padding at the end; a shorter prompt's rows past its own
    length mean nothing.
    """
    length = int(mask.sum(dim=1).max())
    ids, mask = ids[:, :length], mask[:, :length]
    return module(input_ids=ids, attention_mask=mask).last_hidden_state


def clean(prompt: str) -> str:
    """Mend broken Unicode, undo HTML entities (twice: they come doubly escaped), collapse white space."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended.strip()).strip()


class TextEncoder:
    """Prompts to rows. `tokenise` gives the ids of a text, the end token included."""

    def __init__(self, module: nn.Module, tokenise: Callable[[str], list[int]]) -> None:
        self.module = module
        self.tokenise = tokenise

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """A prompt, cleaned, as rows [L, dim] in the network's number format.

        The end token is a row of its own, so an empty prompt is one row.
        """
        device = next(self.module.parameters()).device
        ids = torch.tensor([self.tokenise(clean(prompt))], device=device)
        return encode_ids(self.module, ids, torch.ones_like(ids))[0]


def load_tokenizer(folder: Path, max_tokens: int, vocabulary: int) -> Callable[[str], list[int]]:
    """Text to at most `max_tokens` ids below `vocabulary`, by tokenizer.json of a folder.

    Read with the tokenizers library: transformers 5 would rebuild UMT5's as T5's, which has no
    tokens for bytes. Raises ModelError when the file is absent, broken, or of another model.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"no tokenizer {path}: flashtalk models pull fetches it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"the tokenizer {path} cannot be read: {str(error)[:160]}") from error
    if tokenizer.get_vocab_size() > vocabulary:
        raise ModelError(
            f"the tokenizer {path} has {tokenizer.get_vocab_size()} tokens, the text encoder {vocabulary}: "
            "they are of two models"
        )
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text).ids


def byte_ids(text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Bytes as ids from 3 on, and the end token 1: a stand-in where weights are random and no file need be."""
    return [*(byte + 3 for byte in text.encode()[: max_tokens - 1]), 1]

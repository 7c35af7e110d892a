"""Self-attention by a sequence's exchange, as the model does it, for queries, keys and values that are there."""

from __future__ import annotations

from torch import Tensor

from flashtalk_cli.parallel.sequence import Attend, Sequence, Size


def attend(
    sequence: Sequence,
    kernel: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int,
    scales: Tensor | None = None,
) -> Tensor:
    """Of this rank's q, k and v [B, n, heads, head_dim] of `length` tokens in all: of q's shape."""
    exchange = sequence.exchange(Size(*q.shape, length, q.dtype, q.device))
    given = {name: x.flatten(2) for name, x in zip("qkv", (q, k, v), strict=True)}
    for name in "kvq":
        if (place := getattr(exchange, name)) is not None:
            given[name] = place.copy_(given[name].unflatten(2, place.shape[2:]))
        if name == "v":
            exchange.send()
    return exchange.attend(kernel, **given, scales=scales).flatten(2).unflatten(2, q.shape[2:])

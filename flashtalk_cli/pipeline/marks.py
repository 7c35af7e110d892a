"""Marks between the parts of a chunk, for whoever measures; a mark costs nothing when nobody does.

`mark(name)` says that what ran on the current stream since that stream's last mark ends here, and what it
is called. `mark("")` says that what follows on this stream counts towards its next mark. Names may come
again in a chunk. On a CPU there is one stream.

    speech    what the chunk hears, encoded           (rendering.Worker.hearing)
    keys      speech to keys and values of all blocks
    noise     noise drawn, latents moved in time
    step      one pass through the DiT
    prime     decoding of the motion latents, whose frames were on screen before
    decode    decoding of one latent, or of as many as are decoded at once
    colour    matching of its frames to the picture
    bytes     frames to bytes, and together on rank 0
    motion    encoding of the last frames, for the next chunk
    to host   bytes to host memory, on a stream of their own
"""

from __future__ import annotations

from collections.abc import Callable

Mark = Callable[[str], None]


def unmarked(name: str) -> None:
    """Time nothing."""

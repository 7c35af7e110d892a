"""Addresses of sound without what in them may be a secret: a stream key, a password, a token."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 4  # a shorter piece is no secret, and would be found in every word


def shown_address(url: str) -> str:
    """An address as it may be printed: its scheme, host and port."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    hidden = f"/{HIDDEN}" if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{host}{hidden}"


def masked(url: str, text: str) -> str:
    """A text about an address, such as ffmpeg's complaint, without the address's secrets."""
    parts = urlsplit(url)
    user_info = parts.netloc.rpartition("@")[0]
    last = parts.path.rpartition("/")[2]
    pieces = {user_info, *user_info.split(":"), last, parts.query, *(v for _, v in parse_qsl(parts.query))}
    text = text.replace(url, shown_address(url))
    for piece in sorted(pieces | {unquote(piece) for piece in pieces}, key=len, reverse=True):
        if len(piece) >= SHORTEST:
            text = text.replace(piece, HIDDEN)
    return text

"""Addresses of sound without what in them may be a secret: a stream key, a password, a token."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 4  # a shorter piece is no secret, and would be found in every word
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"]*[^\s'\":,;]", re.IGNORECASE)
ALONE = r"(?<![\w-])(?<!\w\.){}(?![\w-])(?!\.\w)"  # no part of a longer word or of a host's name


def shown_address(url: str) -> str:
    """An address as it may be printed: its scheme, host and port."""
    try:
        parts = urlsplit(url)
    except ValueError:  # there is no telling what of it is the host
        return HIDDEN
    host = parts.netloc.rpartition("@")[2]
    hidden = f"/{HIDDEN}" if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{host}{hidden}"


def masked(url: str, text: str) -> str:
    """A text about an address, such as ffmpeg's complaint, without the address's secrets.

    Other addresses in it, to which a server or a playlist led, lose theirs too.
    """
    text = text.replace(url, shown_address(url))
    text = ADDRESS.sub(lambda found: shown_address(found[0]), text)
    patterns = _patterns(url)
    for piece in sorted(patterns, key=len, reverse=True):
        text = re.sub(patterns[piece], HIDDEN, text)
    return text


def _patterns(url: str) -> dict[str, str]:
    """What may be a secret in an address, as it is written and as it is meant, and how to find each.

    The folders of a path are often plain words ("live", "audio"): they are hidden only where they stand alone.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return {}
    *folders, last = parts.path.split("/")
    user_info = parts.netloc.rpartition("@")[0]
    rest = [user_info, *user_info.split(":"), last, parts.query, parts.fragment]
    rest += [value for _, value in parse_qsl(parts.query)]
    found = {piece: ALONE.format(re.escape(piece)) for piece in _readings(folders)}
    return found | {piece: re.escape(piece) for piece in _readings(rest)}


def _readings(pieces: list[str]) -> set[str]:
    return {reading for piece in pieces for reading in (piece, unquote(piece)) if len(reading) >= SHORTEST}

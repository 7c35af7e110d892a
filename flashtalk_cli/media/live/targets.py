"""Where a live stream goes, with a name for it that holds no secret.

A stream key is a password. It is read from a file or the environment if asked, never shown, and handed to
ffmpeg beside its command line where that can be done (`commands.py` says where it cannot).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from flashtalk_cli.errors import UsageError
from flashtalk_cli.media.files import shown as shown_path

Kind = Literal["rtmp", "srt", "whip", "hls", "udp", "file", "stdout"]

HIDDEN = "***"
SCHEMES = {"rtmp": ("rtmp", "rtmps"), "srt": ("srt",), "whip": ("http", "https"), "udp": ("udp",)}
EXAMPLES = {
    "rtmp": "rtmp://HOST/APP/KEY",
    "srt": "srt://HOST:PORT",
    "whip": "https://HOST/PATH",
    "udp": "udp://HOST:PORT",
}
FILE_SUFFIXES = (".mp4", ".mov", ".mkv")
# Parameters of an address whose values tell nobody anything; all others are shown masked.
HARMLESS = frozenset(
    {"mode", "latency", "rcvlatency", "peerlatency", "connect_timeout", "tlpktdrop", "transtype", "maxbw"}
    | {"pbkeylen", "pkt_size", "payload_size", "ttl", "localport", "buffer_size", "fifo_size"}
)


@dataclass(frozen=True)
class Target:
    """One output. `url` is the whole secret address, or empty for a file, a folder and standard output."""

    kind: Kind
    shown: str  # safe to print
    url: str = field(default="", repr=False)
    path: Path | None = None  # of kind `file`: the file; of kind `hls`: the folder
    secrets: tuple[str, ...] = field(default=(), repr=False)  # longest first

    @property
    def is_network(self) -> bool:
        """Whether it goes to another machine, and may come back after it went away."""
        return bool(self.url)

    def masked(self, text: str) -> str:
        """The text without anything secret of this target, on one printable line."""
        if self.url:
            text = text.replace(self.url, self.shown)
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return shown_path(" ".join(text.split()))


def parse_target(kind: Kind, text: str) -> Target:
    """The target that a user named. Addresses may be `@FILE` or `env:NAME`: then they are read from there.

    Raises `UsageError` with one line that never repeats the address.
    """
    assert kind in get_args(Kind), kind
    if kind == "stdout":
        return Target(kind, "standard output")
    if kind in ("file", "hls"):
        return _local(kind, text)
    url = _address(kind, resolve_secret(f"--{kind}", text))
    parts = _split(kind, url)
    if kind == "rtmp":
        return _rtmp(url, parts)
    if kind == "whip":
        return _whip(url, parts)
    return _datagrams(kind, url, parts)


def resolve_secret(option: str, text: str) -> str:
    """What `env:NAME` or `@FILE` stands for, or the text itself, without space around it.

    Raises `UsageError`, which names the source and never what is in it.
    """
    if text.startswith("env:"):
        name = text[len("env:") :]
        source, value = f"environment variable {shown_path(name)}", os.environ.get(name)
        if value is None:
            raise UsageError(f"{option}: there is no {source}; set it")
    elif text.startswith("@"):
        source = shown_path(text[1:])
        try:
            value = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a text"
            raise UsageError(f"{option}: {source} cannot be read ({reason}); name another file") from None
    else:
        source, value = "the value", text
    if not value.strip():
        raise UsageError(f"{option}: {source} is empty")
    return value.strip()


def rtmp_names(parts: SplitResult) -> tuple[str, str]:
    """Application and play path of an RTMP address, cut where ffmpeg cuts them.

    The application is one path element, or two when at least three are there; the rest is the stream key.
    """
    rest = parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")
    path, mark, query = rest.partition("?")
    elements = path.split("/")
    n_app = 2 if len(elements) > 2 else 1
    return "/".join(elements[:n_app]), "/".join(elements[n_app:]) + mark + query


def _local(kind: Kind, text: str) -> Target:
    path = Path(os.path.abspath(text))
    if not text or "\0" in text:
        raise UsageError(f"--{kind}: no name is given")
    if kind == "file" and path.suffix.lower() not in FILE_SUFFIXES:
        raise UsageError(
            f"{shown_path(text)}: a live recording is H.264 and AAC; end its name in {', '.join(FILE_SUFFIXES)}"
        )
    return Target(kind, shown_path(text), path=path)


def _address(kind: Kind, url: str) -> str:
    if not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise UsageError(
            f"--{kind}: the address holds spaces, several lines or other than ASCII; give {EXAMPLES[kind]}"
        )
    return url


def _split(kind: Kind, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"--{kind}: the address cannot be understood; give {EXAMPLES[kind]}") from None
    if parts.scheme not in SCHEMES[kind]:
        schemes = " or ".join(f"{scheme}://" for scheme in SCHEMES[kind])
        raise UsageError(f"--{kind}: the address must begin with {schemes}; give {EXAMPLES[kind]}")
    if not host:
        raise UsageError(f"--{kind}: the address has no host; give {EXAMPLES[kind]}")
    if port is None and kind in ("srt", "udp"):
        raise UsageError(f"--{kind}: the address has no port; give {EXAMPLES[kind]}")
    return parts


def _rtmp(url: str, parts: SplitResult) -> Target:
    app, playpath = rtmp_names(parts)
    if not app or not playpath:
        raise UsageError(f"--rtmp: the address has no stream key; give {EXAMPLES['rtmp']}")
    name, *deeper = app.partition("?")[0].split("/")
    if parts.path.strip("/") == name:  # with no path behind it, the one word there may be the key
        name, deeper = HIDDEN, [name]
    shown = f"{parts.scheme}://{_authority(parts)}/{name}/{HIDDEN}"
    pieces = [playpath, *re.split(r"[/?]", playpath), *_values(parts.query), *app.split("/")[1:], *deeper]
    return Target("rtmp", shown, url, secrets=_secrets(parts, pieces))


def _whip(url: str, parts: SplitResult) -> Target:
    """Everything behind the host may be the secret: services differ in where they put it.

    A password before the host (`https://:TOKEN@HOST/PATH`) is sent as the bearer token.
    """
    shown = f"{parts.scheme}://{_authority(parts)}/{HIDDEN}"
    pieces = [parts.path.lstrip("/"), *parts.path.split("/"), parts.query, *_values(parts.query)]
    return Target("whip", shown, url, secrets=_secrets(parts, pieces))


def _datagrams(kind: Kind, url: str, parts: SplitResult) -> Target:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    if kind == "srt" and dict(pairs).get("mode", "caller") != "caller":
        raise UsageError("--srt: the address must be of a receiver that listens; leave its mode out")
    query = "&".join(
        f"{key}={value}" if key in HARMLESS and re.fullmatch(r"[a-z0-9]*", value) else f"{key}={HIDDEN}"
        for key, value in pairs
        if re.fullmatch(r"[a-z_]+", key)
    )
    shown = f"{parts.scheme}://{_authority(parts)}" + (f"?{query}" if query else "")
    hidden = [value for key, value in pairs if key not in HARMLESS]
    pieces = [*hidden, *(quote(value, safe="") for value in hidden), *_values(parts.query, HARMLESS)]
    return Target(
        kind, shown, url, secrets=_secrets(parts, [*pieces, parts.path.lstrip("/"), parts.fragment])
    )


def _authority(parts: SplitResult) -> str:
    """Host and port, a name and password before them masked."""
    host = parts.netloc.rpartition("@")[2]
    return f"{HIDDEN}@{host}" if "@" in parts.netloc else host


def _values(query: str, but: frozenset[str] = frozenset()) -> list[str]:
    """Values of a query as they are written."""
    pairs = (pair.partition("=") for pair in query.split("&"))
    return [value or key for key, _, value in pairs if key not in but]


def _secrets(parts: SplitResult, pieces: list[str]) -> tuple[str, ...]:
    """All that must not be seen, as it is written and as it is meant."""
    user_info = parts.netloc.rpartition("@")[0] if "@" in parts.netloc else ""
    written = {*pieces, user_info, *user_info.split(":", 1)}
    return tuple(sorted((written | {unquote(piece) for piece in written}) - {""}, key=lambda s: (-len(s), s)))

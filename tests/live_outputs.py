"""What tests of live outputs share: claps to send, a way to measure them, and a real RTMP server."""

from __future__ import annotations

import functools
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from flashtalk_cli.config import Encoding
from flashtalk_cli.media.ffmpeg import find_ffmpeg
from flashtalk_cli.media.live.encoder import LiveEncoder
from flashtalk_cli.media.live.limits import LivePolicy
from flashtalk_cli.media.live.statistics import SinkStatistics
from flashtalk_cli.media.live.targets import Target
from flashtalk_cli.media.live.units import FlvReader
from flashtalk_cli.media.probe import probe

FPS, SIDE_PX, RATE_HZ = 25, 64, 48_000
PER_FRAME = RATE_HZ // FPS
CLAP_FRAMES = 25  # one flash and one click in a second
FLASH_AT = 10
NGINX_MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx") is None or not NGINX_MODULE.exists(),
    reason="needs nginx with its RTMP module (apt install nginx libnginx-mod-rtmp)",
)


def quick(**changes: float) -> LivePolicy:
    """Tests feed faster than real time, so that what waits is longer in seconds of media."""
    return LivePolicy(**{"queue_s": 60.0, "retry_s": 0.05, **changes})


def live(targets: list[Target], told: list[str] | None = None, **options: object) -> LiveEncoder:
    """Outputs in a test; `told` gets what is told of outages, not what this ffmpeg lets others see."""
    told = [] if told is None else told

    def tell(line: str) -> None:
        if "command line" not in line:
            told.append(line)

    return LiveEncoder(
        targets,
        **{
            "width_px": SIDE_PX,
            "height_px": SIDE_PX,
            "fps": FPS,
            "encoding": Encoding(),
            "policy": quick(),
            "on_warning": tell,
            **options,
        },
    )


def claps(first: int, n_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [first, first + n) of a stream with a white frame and a click of 10 ms at each clap."""
    frames = np.full((n_frames, SIDE_PX, SIDE_PX, 3), 40, np.uint8)
    samples = np.zeros(n_frames * PER_FRAME, np.float32)
    for at in range(n_frames):
        if (first + at) % CLAP_FRAMES == FLASH_AT:
            frames[at] = 255
            samples[at * PER_FRAME :][:480] = 0.8 * np.sin(2 * np.pi * 2000 / RATE_HZ * np.arange(480))
    return frames, samples


def noise(first: int, n_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames that fill buffers, for they do not compress."""
    frames = np.random.default_rng(first).integers(0, 256, (n_frames, SIDE_PX, SIDE_PX, 3), np.uint8)
    return frames, np.zeros(n_frames * PER_FRAME, np.float32)


def send_claps(encoder: LiveEncoder, first: int, n_frames: int, piece: int = 5) -> None:
    for at in range(first, first + n_frames, piece):
        assert encoder.write(*claps(at, min(piece, first + n_frames - at)), limit_s=20)


def send_until(encoder: LiveEncoder, first: int, what: Callable[[], object], limit_s: float = 30.0) -> int:
    """Send on, faster than real time, until it is so: the next frame.

    A sink's ffmpeg that has nothing to read tells nothing of what it wrote before, so one waits while it is fed.
    """
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        send_claps(encoder, first, 5)
        first += 5
        time.sleep(0.05)
    return first


def wait_for(what: Callable[[], object], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def of_kind(encoder: LiveEncoder, kind: str) -> SinkStatistics:
    return next(found for found in encoder.statistics() if found.kind == kind)


def _read(path: Path | str, *options: str) -> bytes:
    words = [find_ffmpeg(), "-v", "error", "-nostdin", "-copyts", "-i", str(path), *options, "-"]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout


@functools.cache
def times(path: Path | str, stream: str) -> list[float]:
    """Presentation times of a stream's packets in seconds, in order; `stream` is v or a."""
    lines = _read(path, "-map", f"0:{stream}", "-c", "copy", "-f", "framecrc").decode().splitlines()
    base = next(line for line in lines if line.startswith("#tb")).split(": ")[1].split("/")
    packets = [line.split(",") for line in lines if not line.startswith("#")]
    return [int(words[2]) * int(base[0]) / int(base[1]) for words in packets]


def clap_times(path: Path | str) -> tuple[list[float], list[float]]:
    """When flashes are shown and when clicks are heard, in seconds on the file's clock."""
    raw = _read(
        path, "-map", "0:v", "-fps_mode", "passthrough", "-vf", "scale=8:8,format=gray", "-f", "rawvideo"
    )
    means = np.frombuffer(raw, np.uint8).reshape(-1, 64).mean(axis=1)
    shown = times(path, "v")
    assert len(shown) == len(means), (len(shown), len(means))
    heard = np.frombuffer(_read(path, "-map", "0:a", "-ac", "1", "-f", "f32le"), "<f4")
    loud = np.flatnonzero(np.abs(heard) > 0.2)
    starts = loud[np.diff(loud, prepend=-RATE_HZ) > RATE_HZ // 10]
    first_s = times(path, "a")[0]
    return [shown[at] for at in np.flatnonzero(means > 140)], [first_s + at / RATE_HZ for at in starts]


def check_claps(path: Path | str, n_claps: int) -> None:
    """Every flash within a frame of its click."""
    flashes, clicks = clap_times(path)
    assert len(flashes) == len(clicks) == n_claps, (flashes, clicks)
    assert max(abs(flash - click) for flash, click in zip(flashes, clicks, strict=True)) < 1 / FPS


def first_is_key(flv: Path) -> bool:
    """Whether the first picture of an FLV is a key frame."""
    pictures = (tag for tag in FlvReader().tags(flv.read_bytes()) if tag.is_video and not tag.is_config)
    return next(pictures).is_key


def n_frames(path: Path | str) -> int:
    found = probe(Path(path)).video
    assert found is not None
    return found.n_frames


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class RtmpServer:
    """nginx with its RTMP module in `folder`, where it records each publishing as an FLV of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"rtmp://127.0.0.1:{self.port}/live"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "taken").mkdir(parents=True)
        (folder / "taken").chmod(0o777)
        self._n_starts = 0

    def start(self) -> None:
        self._n_starts += 1
        (self.folder / "nginx.conf").write_text(
            f"load_module {NGINX_MODULE};\n"
            f"daemon off; master_process off; pid {self.folder}/pid; error_log {self.folder}/log info;\n"
            "events {}\n"
            f"rtmp {{ server {{ listen 127.0.0.1:{self.port}; application live {{\n"
            f"  live on; record all; record_path {self.folder}/taken;\n"
            f"  record_suffix -{self._n_starts}-%s.flv; record_unique on;\n"
            "} } }\n"
        )
        words = ["nginx", "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]
        self._process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def has_passed_on(self) -> bool:
        """Whether its publishers have left and nobody has anything from it still to read."""
        port = f":{self.port:04X}"
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        held = [words[4] for words in sockets if port in words[1] + words[2]]
        publishers = re.findall(r"(\*\d+) publish:", self.log())
        gone = publishers and all(f"{who} disconnect" in self.log() for who in publishers)
        return bool(gone) and all(queues == "00000000:00000000" for queues in held)

    def taken(self) -> list[Path]:
        """What it recorded, the first first; none of those that are empty."""
        found = [path for path in (self.folder / "taken").iterdir() if path.stat().st_size > 1000]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)

    def log(self) -> str:
        return re.sub(r"\x00", "", (self.folder / "log").read_text(errors="replace"))

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


@contextmanager
def rtmp_server(folder: Path) -> Iterator[RtmpServer]:
    server = RtmpServer(folder)
    server.start()
    try:
        yield server
    finally:
        with suppress(AssertionError):
            server.signal(signal.SIGCONT)
        server.kill()

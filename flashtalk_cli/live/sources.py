"""Where the sound comes from: a file, a device or an address through ffmpeg, or raw samples on stdin.

Each source has a thread that reads and adds to the timeline. One that can wait (a file, a pipe) waits for
room; one that cannot (a microphone, a broadcast) adds what comes, and the oldest goes when it is too much.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import select
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import ffmpeg
import numpy as np

from flashtalk_cli.config import PcmFormat, SoundSource
from flashtalk_cli.errors import FlashtalkError, InputError
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.masking import masked, shown_address
from flashtalk_cli.live.microphone import microphone
from flashtalk_cli.live.reading import LIST, LongReading, list_of_one, reads_lists
from flashtalk_cli.live.timeline import RATE_HZ, Timeline
from flashtalk_cli.media.ffmpeg import cause, find_ffmpeg, listed
from flashtalk_cli.media.files import shown
from flashtalk_cli.media.live.backoff import SETTLED_S, Backoff

log = logging.getLogger(__name__)

BLOCK_S = 0.02  # what is read at once: sound must not wait for more of itself
ROOM_S = 0.2  # what a source that can wait hands over at once, and how often it looks for room
FIRST_RETRY_S = 0.5
LOOKED_AT_S = 1.0  # of a live sound, to find out what it is
RESUME_S = 30.0  # the longest wait between ffmpeg's own attempts to read a file on: after 0, 1, 3, 7, 15 s
STALLED_S = 15.0  # a connection without a byte for so long is taken for dead

# What ffmpeg says of a connection that broke. It then ends with status 0, as at the end of the sound.
LOST = re.compile(
    r"timed out|reset by peer|Input/output error|I/O error|prematurely|Broken pipe|unreachable"
    r"|Connection (refused|aborted)|No such device",
    re.IGNORECASE,
)
# The protocols that ffmpeg may use for an address, and no others: a playlist from outside reads no file here.
PROTOCOLS = {
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tls,tcp",
    "srt": "srt",
    "udp": "udp",
    "rtp": "rtp,udp",
    "rtsp": "rtsp,rtp,udp,tcp",
    "tcp": "tcp",
    "http": "http,https,tcp,tls,crypto",
    "https": "https,http,tcp,tls,crypto",
}
WAITING_SCHEMES = ("http", "https", "tcp")  # whose senders wait when we do not read
NUMPY_TYPES = {"s16le": "<i2", "s16be": ">i2", "s32le": "<i4", "f32le": "<f4", "u8": "u1"}


class Source:
    """A thread that adds sound to a timeline until the sound ends or `close` is called."""

    paced = False  # whether the sound comes at its own pace and cannot be made to wait
    may_wait_s = 2.0  # how long it may take to begin before the person idles on air
    knows_future = False  # whether what follows is there to be heard ahead

    def __init__(self, timeline: Timeline, clock: Clock, on_warning: Callable[[str], None]) -> None:
        self.timeline = timeline
        self.clock = clock
        self.warn = on_warning
        self.closed = threading.Event()
        self.state = "starting"
        self.failure: FlashtalkError | None = None  # why it ended, if not because the sound did
        self.on_interrupt: Callable[[], float] = lambda: 0.0  # drops what was handed over
        self._thread = threading.Thread(target=self._live, name="source", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def interrupt(self) -> float:
        """Drop all sound that is not yet spoken; how many seconds that was."""
        return self.on_interrupt()

    def close(self) -> None:
        """Stop reading."""
        self.closed.set()

    def read(self) -> None:
        """Add all sound, and return at its end. Raises `FlashtalkError` when the source cannot be used."""
        raise NotImplementedError

    def add(self, samples: np.ndarray) -> None:
        """Hand over float32 [n] at the timeline's rate, waiting for room if this source can wait."""
        self.state = "live"
        block = round(ROOM_S * self.timeline.rate_hz)
        for start in range(0, len(samples), block):
            piece = samples[start : start + block]
            while not self.paced and not self.timeline.has_room(len(piece)) and not self.closed.is_set():
                with self.timeline.changed:
                    self.timeline.changed.wait(ROOM_S)
            self.timeline.add(piece, self.clock.now_s())

    def _live(self) -> None:
        try:
            self.read()
        except FlashtalkError as error:
            self.failure = error
            self.warn(str(error))
        except Exception as error:
            log.debug("a source failed", exc_info=True)
            self.warn(f"the sound ended: {type(error).__name__}: {error}")
        self.state = "ended"
        self.timeline.end()


class FfmpegSource(Source):
    """Whatever ffmpeg reads. An address that fails is tried again, later each time; a file is not."""

    def __init__(self, source: SoundSource, keep_alive: bool, *rest: Any) -> None:
        super().__init__(*rest)
        self._source = source
        self._keep_alive = keep_alive
        is_url = source.kind == "url"
        scheme = urlsplit(source.where).scheme if is_url else ""
        self._shown = shown_address(source.where) if is_url else shown(source.where) or "the microphone"
        self.paced = source.kind == "microphone" or (is_url and scheme not in WAITING_SCHEMES)
        self.knows_future = source.kind == "file"
        self.may_wait_s = 0.0 if self.paced else 5.0
        self._reading: LongReading | None = None
        self._live_s: float | None = None  # from the first to the last sound of an attempt; None: none came

    def read(self) -> None:
        """Read, and read again, until the sound has ended for good."""
        backoff, told = Backoff(random.Random(), FIRST_RETRY_S), False
        if self._is_exposed():
            self.warn(
                f"{self._shown}: this ffmpeg takes the address only on its command line, "
                "where other users of this machine can see it"
            )
        while not self.closed.is_set():
            self._live_s = None
            status, lines = self._read_once()
            if self.closed.is_set():
                return
            lost = [line for line in lines if LOST.search(line)]
            why = cause(status, lost or lines) if status or lines else "it ended"
            if not self._comes_again(status != 0 or bool(lost)):
                if self._live_s is None and not self._source.start_s:  # else it began where the file ends
                    raise InputError(f"{self._shown}: no sound can be had from it ({why})")
                return
            live_s = self._live_s or 0.0
            if not told or live_s >= SETTLED_S:  # one that comes and goes is told of once
                self.warn(f"{self._shown}: no sound ({why}); trying to get it back")
                told = True
            self.state = "waiting"
            self.closed.wait(backoff.wait_s(live_s))

    def close(self) -> None:
        """Stop reading, and end ffmpeg."""
        super().close()
        if self._reading is not None:
            self._reading.end()

    def _is_exposed(self) -> bool:
        """Whether `ps` shows more of the address than we do."""
        where = self._source.where.rstrip("/")
        return self._source.kind == "url" and shown_address(where) != where and not listed_input(self._source)

    def _comes_again(self, lost: bool) -> bool:
        """Whether to try again, after it was lost or ended."""
        if self._source.kind == "file":
            return False
        return lost or (self._keep_alive and self.paced)

    def _read_once(self) -> tuple[int, list[str]]:
        block_bytes = 4 * round(BLOCK_S * RATE_HZ)
        output = {"format": "f32le", "c:a": "pcm_f32le", "ar": RATE_HZ, "ac": 1, "map": "0:a:0"}
        rest, since_s = b"", math.inf
        stream = ffmpeg_input(self._source).output("-", flush_packets=1, **output)
        is_url = self._source.kind == "url"
        hide: Callable[[str], str] = partial(masked, self._source.where) if is_url else str
        with LongReading(stream, listed_input(self._source), hide) as reading:
            self._reading = reading
            while not self.closed.is_set() and (data := reading.read(block_bytes)):
                since_s = min(since_s, now_s := self.clock.now_s())
                self._live_s = now_s - since_s
                data = rest + data
                whole = len(data) // 4 * 4
                rest = data[whole:]
                self.add(np.nan_to_num(np.frombuffer(data[:whole], "<f4"), posinf=0, neginf=0))
            self._reading = None
            return (0, []) if self.closed.is_set() else reading.outcome()


class StdinSource(Source):
    """Raw samples on a file descriptor, until it ends."""

    def __init__(self, descriptor: int, pcm: PcmFormat, *rest: Any) -> None:
        super().__init__(*rest)
        self._descriptor = descriptor
        self._pcm = pcm

    def read(self) -> None:
        """Read to the end."""
        decoder = Decoder(self._pcm)
        block_bytes = round(BLOCK_S * self._pcm.rate_hz) * decoder.frame_bytes
        while not self.closed.is_set():
            if select.select([self._descriptor], [], [], ROOM_S)[0]:
                if not (data := os.read(self._descriptor, block_bytes)):
                    break
                self.add(decoder.decode(data))
        if not self.closed.is_set():
            self.add(decoder.finish())


class Decoder:
    """Raw samples, cut anywhere, to mono float32 at the timeline's rate."""

    def __init__(self, pcm: PcmFormat, rate_hz: int = RATE_HZ) -> None:
        import soxr

        self._type = np.dtype(NUMPY_TYPES[pcm.encoding])
        self._channels = pcm.channels
        self.frame_bytes = self._type.itemsize * pcm.channels
        self._rest = b""
        self._resampler = (
            None if pcm.rate_hz == rate_hz else soxr.ResampleStream(pcm.rate_hz, rate_hz, 1, dtype="float32")
        )

    def decode(self, data: bytes) -> np.ndarray:
        """float32 [n] at full scale 1; what is no finite number counts as silence."""
        data = self._rest + data
        whole = len(data) // self.frame_bytes * self.frame_bytes
        self._rest = data[whole:]
        raw = np.frombuffer(data[:whole], self._type).reshape(-1, self._channels)
        mono = raw.astype(np.float32).mean(axis=1)
        if self._type.kind == "u":
            mono = (mono - 128) / 128
        elif self._type.kind == "i":
            mono = mono / np.float32(-float(np.iinfo(self._type).min))
        else:
            mono = np.clip(np.nan_to_num(mono, posinf=0, neginf=0), -8, 8)
        return mono if self._resampler is None else self._resampler.resample_chunk(mono)

    def finish(self) -> np.ndarray:
        """What the resampler still holds."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        return np.asarray(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))


def ffmpeg_input(source: SoundSource) -> Any:
    """The ffmpeg-python input of a source: nothing but its own protocol is open to it."""
    if source.kind == "file":
        options: dict[str, Any] = {"stream_loop": -1} if source.loop else {}
        options |= {"ss": source.start_s} if source.start_s else {}
        return ffmpeg.input(f"file:{source.where}", protocol_whitelist="file,pipe", vn=None, **options)
    if source.kind == "microphone":
        return microphone(source.where)
    protocols = PROTOCOLS[urlsplit(source.where).scheme]
    if listed_input(source):
        return ffmpeg.input(LIST, format="concat", safe=0, protocol_whitelist=f"pipe,{protocols}", vn=None)
    return ffmpeg.input(source.where, protocol_whitelist=protocols, vn=None, **_url_options(source))


def listed_input(source: SoundSource) -> bytes:
    """What ffmpeg is to read as the list of a source; nothing where it gets the address itself."""
    if source.kind != "url" or not source.where.isprintable() or not reads_lists():
        return b""
    return list_of_one(source.where, _url_options(source))


def _url_options(source: SoundSource) -> dict[str, Any]:
    options: dict[str, Any] = {}
    scheme = urlsplit(source.where).scheme
    if scheme == "rtsp":  # whose own limit ffmpeg 4 calls stimeout: there, timeout makes it a server
        of_4 = "-stimeout" in listed(find_ffmpeg(), "-h", "demuxer=rtsp")
        options["stimeout" if of_4 else "timeout"] = round(STALLED_S * 1e6)
    elif "tcp" in PROTOCOLS[scheme].split(","):
        options["rw_timeout"] = round(STALLED_S * 1e6)
    if scheme in ("http", "https"):  # a file goes on where it broke, and does not begin anew
        options |= {"reconnect": 1, "reconnect_delay_max": round(RESUME_S)}
    if scheme not in WAITING_SCHEMES:  # what is live is to be heard soon: ffmpeg would look at five seconds
        options |= {"fflags": "nobuffer", "analyzeduration": round(LOOKED_AT_S * 1e6)}
    return options

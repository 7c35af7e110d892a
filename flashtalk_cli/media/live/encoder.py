"""One encode, many live outputs: frames and samples in, each output kept alive by itself.

    frames, samples -> backlog -> ffmpeg (H.264, AAC) -> units -> queue -> ffmpeg (copy) -> output
                                                              `-> queue -> ffmpeg (copy) -> output

No clock is read here but for stalls and back-off: when to write is the caller's affair.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.files import shown
from flashtalk_cli.media.live.backoff import Backoff
from flashtalk_cli.media.live.commands import Coding, Sending, after_restart, live_codec, sending
from flashtalk_cli.media.live.encoder_process import Backlog, EncoderProcess
from flashtalk_cli.media.live.limits import LivePolicy, SinkLimits
from flashtalk_cli.media.live.recording import Recording, check_folder, clear_folder, next_name
from flashtalk_cli.media.live.statistics import SinkStatistics
from flashtalk_cli.media.live.supervise import Sink
from flashtalk_cli.media.live.targets import Target
from flashtalk_cli.media.live.units import (
    SAMPLE_RATE_HZ,
    StreamFormat,
    Tag,
    Unit,
    frame_time_us,
    packet_time_us,
)
from flashtalk_cli.media.part_file import check_writable, part_path

log = logging.getLogger(__name__)

MOST_FRUITLESS = 5  # encoders in a row that end without having coded a frame
RESTART_S = 0.1  # the first wait before a new encoder
LOOK_UP_S = 0.1
SLACK_S = 12.0  # for a process that does not die


def check_targets(
    targets: Sequence[Target], encoding: Encoding, width_px: int, height_px: int, overwrite: bool = False
) -> None:
    """Everything that can be known before the first frame: `OutputError` for what cannot be written.

    Creates nothing. Cheap, and to be called before anything slow.
    """
    live_codec(encoding, width_px, height_px)
    names = [target.path or target.url or target.kind for target in targets]
    for target, name in zip(targets, names, strict=True):
        if names.count(name) > 1:
            raise OutputError(f"{target.shown}: is given twice; give every output once")
        if target.kind == "file":
            assert target.path is not None
            check_writable(target.path, overwrite)
        elif target.kind == "hls":
            assert target.path is not None
            check_folder(target.path)
        _sending(target, 25, "")


class LiveEncoder:
    """Live outputs being written; a context manager, and leaving it without `end` is `abort`.

    Sound is 48 kHz. `on_warning` gets one line without secrets for each outage and each return, from other
    threads. `stdout` is the descriptor of a target of that kind, to be kept open meanwhile. `resumed`: another
    was cut off, whose playlists go on. Raises `OutputError` as `check_targets`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        width_px: int,
        height_px: int,
        fps: int,
        encoding: Encoding,
        comment: str = "",
        n_channels: int = 1,
        policy: LivePolicy | None = None,
        on_warning: Callable[[str], None] = log.warning,
        overwrite: bool = False,
        stdout: int = 1,
        resumed: bool = False,
    ) -> None:
        assert SAMPLE_RATE_HZ % fps == 0, fps
        check_targets(targets, encoding, width_px, height_px, overwrite)
        self._frame_shape = (height_px, width_px, 3)
        self._fps = fps
        self._n_channels = n_channels
        self._policy = policy or LivePolicy()
        self._tell = on_warning
        self._configs: dict[bool, bytes] = {}
        self._form: StreamFormat | None = None
        self._backlog = Backlog(fps, room_frames=max(fps, 16))
        self._stopping = threading.Event()
        self._whole = False
        self._deadline = float("inf")  # for everything to be written; monotonic
        self._failure = ""
        self.encoder_restarts = 0
        self._coding = Coding(
            live_codec(encoding, width_px, height_px),
            encoding.crf,
            self._policy.max_kbps,
            width_px,
            height_px,
            fps,
            n_channels,
            for_browsers=any(target.kind == "whip" for target in targets),
        )
        self._sinks: list[Sink] = []
        try:
            for target in targets:
                self._sinks.append(self._sink(target, comment, overwrite, stdout, resumed))
            self._process = EncoderProcess(self._coding, self._backlog)
        except BaseException:
            for sink in self._sinks:
                sink.abort()
                sink.join()
            raise
        self._thread = threading.Thread(target=self._run, name="encoder-units", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id of the ffmpeg that encodes now."""
        return self._process.pid

    @property
    def sink_pids(self) -> tuple[int | None, ...]:
        """Process ids of the outputs' ffmpegs; None for one that has none now."""
        return tuple(sink.pid for sink in self._sinks)

    @property
    def recordings(self) -> tuple[Path, ...]:
        """Recordings that have their names."""
        return tuple(path for sink in self._sinks for path in sink.recorded)

    @property
    def frames_coded(self) -> int:
        """Frames that came out of the encoder."""
        return self._backlog.coded_frames

    def write(self, frames: np.ndarray, samples: np.ndarray, limit_s: float | None = None) -> bool:
        """Send uint8 [T, H, W, 3] RGB and float32 [T * 48000 / fps] or [.., channels], full scale at 1.

        The arrays are handed over: do not change them afterwards. Waits while a second of frames is not yet
        encoded, `limit_s` at most: False then, and nothing was taken. Raises `OutputError` when no output is
        left or the encoder cannot be started any more.
        """
        if not len(frames):
            return True
        assert frames.dtype == np.uint8, frames.dtype
        assert frames.shape[1:] == self._frame_shape, (frames.shape, self._frame_shape)
        # One NaN from outside would end the encoder, and each that comes after it.
        samples = np.nan_to_num(samples.astype(np.float32, copy=False), nan=0.0).clip(-1, 1)
        samples = samples.reshape(len(samples), -1)
        assert samples.shape == (len(frames) * SAMPLE_RATE_HZ // self._fps, self._n_channels), samples.shape
        self._check()
        if self._backlog.add(frames, samples, limit_s):
            return True
        self._check()
        return False

    def end(self, limit_s: float) -> bool:
        """Write everything out and publish recordings: whether all that was done within `limit_s` seconds."""
        self.hurry(limit_s)
        self._backlog.end()
        while self._thread.is_alive() and time.monotonic() < self._deadline:
            self._thread.join(LOOK_UP_S)
        if self._thread.is_alive() or not self._whole:
            self.abort()
            return False
        for sink in self._sinks:
            sink.end(self._deadline)
        ended = [sink.join(max(0.0, self._deadline - time.monotonic()) + SLACK_S) for sink in self._sinks]
        return all(ended)

    def hurry(self, limit_s: float) -> None:
        """Have `end`, which another thread waits for, be done within `limit_s` seconds from now."""
        self._deadline = min(self._deadline, time.monotonic() + limit_s)
        for sink in self._sinks:
            sink.hurry(self._deadline)

    def abort(self) -> None:
        """Stop everything at once. A recording stays as its part file, which plays. Harmless after `end`."""
        self._stopping.set()
        self._backlog.close()
        self._process.kill()
        for sink in self._sinks:
            sink.abort()
        self._thread.join()
        for sink in self._sinks:
            sink.join(SLACK_S)

    def statistics(self) -> tuple[SinkStatistics, ...]:
        """What is known of each output now, in the order in which they were given."""
        return tuple(sink.statistics() for sink in self._sinks)

    def __enter__(self) -> LiveEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _sink(self, target: Target, comment: str, overwrite: bool, stdout: int, resumed: bool) -> Sink:
        recording = None
        if target.kind == "file":
            assert target.path is not None
            recording = Recording(target.path, overwrite)
        elif target.kind == "hls":
            assert target.path is not None
            clear_folder(target.path, but_ours=resumed)
        how = _sending(target, self._fps, comment)
        how = after_restart(how) if resumed else how
        if how.exposed:
            self._tell(
                f"{target.shown}: this ffmpeg takes the address only on its command line, "
                "where other users of this machine can see it"
            )
        limits = SinkLimits(self._policy.queue_s, self._policy.stall_s, self._policy.retry_s)
        if target.kind == "stdout":
            return Sink(target, how, limits, self._tell, stdout=stdout)

        def follow(before: Target) -> tuple[Target, Sending, Recording]:
            assert before.path is not None
            path = next_name(before.path)
            after = replace(before, path=path, shown=shown(path))
            return after, _sending(after, self._fps, comment), Recording(path, overwrite=False)

        return Sink(
            target, how, limits, self._tell, recording=recording, follow=follow if recording else None
        )

    def _check(self) -> None:
        if self._stopping.is_set():
            raise OutputError("the outputs were closed")
        if self._failure:
            raise OutputError(self._failure)
        if self._sinks and all(sink.has_failed for sink in self._sinks):
            last = self._sinks[-1].statistics()
            raise OutputError(f"{last.shown}: {last.last_error}; no output is left")

    def _run(self) -> None:
        """Units from one encoder after the other to the sinks."""
        try:
            fruitless, backoff = 0, Backoff(random.Random(), RESTART_S)
            while fruitless < MOST_FRUITLESS:
                before, began = self._backlog.coded_frames, time.monotonic()
                for tag in self._process.tags(self._policy.stall_s):
                    self._send(tag)
                why = self._process.close()
                self._whole = self._backlog.ended and self._backlog.coded_frames == self._backlog.n_frames
                if self._whole or self._stopping.is_set():
                    return
                fruitless = 0 if self._backlog.coded_frames > before else fruitless + 1
                self._start_again(why, backoff.wait_s(time.monotonic() - began))
            self._failure = f"the encoder ended {fruitless} times ({why}); flashtalk doctor checks ffmpeg"
        except Exception as error:  # else the caller would wait for ever
            log.debug("the encoder's thread", exc_info=True)
            self._failure = f"the encoder cannot go on ({error}); flashtalk doctor checks ffmpeg"
        finally:
            self._backlog.close()
            self._process.kill()

    def _start_again(self, why: str, wait_s: float) -> None:
        self._tell(f"the encoder ended ({why}); it is started again and no frame is lost")
        self._stopping.wait(wait_s)
        self.encoder_restarts += 1
        self._process = EncoderProcess(self._coding, self._backlog)
        if self._stopping.is_set():
            self._process.kill()

    def _send(self, tag: Tag) -> None:
        if tag.is_config:
            self._configs[tag.is_video] = tag.data
            if len(self._configs) == 2 and self._form is None:
                height_px, width_px, _ = self._frame_shape
                avc, aac = self._configs[True], self._configs[False]
                self._form = StreamFormat(width_px, height_px, self._fps, self._n_channels, avc, aac)
                for sink in self._sinks:
                    sink.begin(self._form)
            return
        if tag.is_video:
            time_us = frame_time_us(self._backlog.coded_frames, self._fps)
        else:
            time_us = packet_time_us(self._backlog.coded_packets)
        self._backlog.note_coded(tag.is_video)
        unit = Unit(tag.is_video, tag.is_key, time_us, tag.data)
        for sink in self._sinks:
            sink.put(unit)


def _sending(target: Target, fps: int, comment: str) -> Sending:
    part = part_path(target.path) if target.kind == "file" and target.path is not None else None
    return sending(target, fps, comment, part)

"""The one ffmpeg that encodes, fed from a backlog so that nothing is lost when it dies.

What was handed over stays in the backlog until it came out coded. A new process is given what the old one
still owed, from the exact frame and packet on; times come from counts, so they go on by themselves.
"""

from __future__ import annotations

import collections
import logging
import os
import select
import subprocess
import threading
from collections.abc import Callable, Iterator

import numpy as np

from flashtalk_cli.media.ffmpeg import cause
from flashtalk_cli.media.live.commands import Coding, encoder_command
from flashtalk_cli.media.live.units import AAC_SAMPLES, SAMPLE_RATE_HZ, FlvReader, Tag

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
KEPT_LINES = 20
DYING_S = 5.0
PREROLL_PACKETS = 2  # a new process's first packets: one that fills its memory, one to overlap with


class Backlog:
    """Frames uint8 [H, W, 3] and the samples to them, float32 [n, channels], from the oldest still owed on.

    `room_frames` may be owed before `add` waits. All methods may be called from any thread.
    """

    def __init__(self, fps: int, room_frames: int) -> None:
        self._samples_per_frame = SAMPLE_RATE_HZ // fps
        self._room_frames = room_frames
        self._frames: collections.deque[np.ndarray] = collections.deque()
        self._sounds: collections.deque[np.ndarray] = collections.deque()  # one piece for each frame
        self._first_sound = 0  # frame to which the first piece belongs
        self._changed = threading.Condition()
        self.n_frames = 0  # ever added
        self.coded_frames = 0
        self.coded_packets = 0
        self.ended = False
        self.closed = False

    def add(self, frames: np.ndarray, samples: np.ndarray, limit_s: float | None) -> bool:
        """Append frames [T, H, W, 3] and their samples; False, and nothing added, if there was no room."""
        with self._changed:
            has_room = self._changed.wait_for(lambda: not self.is_full() or self.closed, limit_s)
            if not has_room or self.closed:
                return False
            self._frames.extend(frames)
            self._sounds.extend(samples.reshape(len(frames), self._samples_per_frame, -1))
            self.n_frames += len(frames)
            self._changed.notify_all()
            return True

    def is_full(self) -> bool:
        """Whether the encoder is behind by as much as it may be."""
        return self.n_frames - self.coded_frames >= self._room_frames

    def note_coded(self, is_video: bool) -> None:
        """One more frame or packet came out: let go of what is not owed any more."""
        with self._changed:
            if is_video:
                self.coded_frames += 1
                self._frames.popleft()
            else:
                self.coded_packets += 1
            needed_from = self.packets_from() * AAC_SAMPLES // self._samples_per_frame
            while self._first_sound < needed_from and len(self._sounds) > 1:
                self._sounds.popleft()
                self._first_sound += 1
            self._changed.notify_all()

    def packets_from(self) -> int:
        """The packet that a new process begins with, counted over the whole stream."""
        return max(0, self.coded_packets - PREROLL_PACKETS)

    def frames_from(self, first: int, stops: Callable[[], bool]) -> Iterator[np.ndarray]:
        """Frames from `first` on as they come, until the end or until `stops`."""
        index = first
        while self._wait_beyond(index, stops):
            with self._changed:
                # What came out meanwhile was fed before, so the next one is always still held.
                frame = self._frames[index - self.coded_frames]
            yield frame
            index += 1

    def samples_from(self, first: int, stops: Callable[[], bool]) -> Iterator[np.ndarray]:
        """Samples from `first` on as they come, in pieces [n, channels], until the end or until `stops`."""
        index, skip = divmod(first, self._samples_per_frame)
        while self._wait_beyond(index, stops):
            with self._changed:
                piece = self._sounds[index - self._first_sound]
            yield piece[skip:]
            index, skip = index + 1, 0

    def end(self) -> None:
        """Nothing more will be added."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing can be added any more, and nobody waits."""
        with self._changed:
            self.closed = self.ended = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Have everyone who waits look again."""
        with self._changed:
            self._changed.notify_all()

    def _wait_beyond(self, index: int, stops: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.n_frames > index or self.ended or stops())
            return self.n_frames > index and not stops()


class EncoderProcess:
    """ffmpeg from the backlog's oldest frame on; `OSError` when it cannot be started."""

    def __init__(self, coding: Coding, backlog: Backlog) -> None:
        self._backlog = backlog
        self._broken = threading.Event()
        self._stalled = ""
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        first_packet = backlog.packets_from()
        self._skip_packets = backlog.coded_packets - first_packet
        sound_end, sound = os.pipe()
        try:
            self._process = subprocess.Popen(
                encoder_command(coding, sound_end),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=(sound_end,),
            )
        except BaseException:
            os.close(sound)
            raise
        finally:
            os.close(sound_end)
        assert self._process.stdin is not None
        stdin = os.dup(self._process.stdin.fileno())
        self._process.stdin.close()
        stops = self._broken.is_set
        pictures = backlog.frames_from(backlog.coded_frames, stops)
        sounds = backlog.samples_from(first_packet * AAC_SAMPLES, stops)
        self._threads = [
            threading.Thread(target=self._feed, args=(stdin, pictures), name="encoder-frames", daemon=True),
            threading.Thread(target=self._feed, args=(sound, sounds), name="encoder-sound", daemon=True),
            threading.Thread(target=self._drain, name="encoder-stderr", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id of ffmpeg."""
        return self._process.pid

    def tags(self, stall_s: float) -> Iterator[Tag]:
        """What comes out, without the packets that an earlier process had made, until ffmpeg ends.

        It is ended here when nothing came for `stall_s` seconds although it has all that it could wait for.
        """
        assert self._process.stdout is not None
        stdout, reader, poll = self._process.stdout.fileno(), FlvReader(), select.poll()
        poll.register(stdout, select.POLLIN)
        while True:
            if not poll.poll(stall_s * 1000):
                if self._backlog.is_full() or self._backlog.ended:
                    self._stalled = f"nothing came out for {stall_s:.0f} s"
                    self.kill()
                continue
            data = os.read(stdout, READ_BYTES)
            if not data:
                return
            for tag in reader.tags(data):
                if not tag.is_video and not tag.is_config and self._skip_packets:
                    self._skip_packets -= 1
                    continue
                yield tag

    def close(self) -> str:
        """Let go of it after its output ended: why it ended, in a few words; it is killed if it still runs."""
        try:
            self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._broken.set()
        self._backlog.wake()
        for thread in self._threads:
            thread.join(DYING_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._stalled or cause(self._process.wait(), list(self._lines))

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def _feed(self, pipe: int, pieces: Iterator[np.ndarray]) -> None:
        try:
            for piece in pieces:
                rest = memoryview(np.ascontiguousarray(piece).data).cast("B")
                while len(rest):
                    rest = rest[os.write(pipe, rest) :]
        except OSError as error:
            log.debug("the encoder takes no more: %s", error)
        finally:
            os.close(pipe)

    def _drain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                text = line.decode(errors="replace").rstrip()
                log.debug("ffmpeg: %s", text)
                self._lines.append(text)

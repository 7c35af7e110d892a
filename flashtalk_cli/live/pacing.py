"""When to begin a chunk, and when to send a frame: decisions as functions of values and of monotonic time.

Media time is a count of frames. The frame n is due n / fps after the first one was sent, and each frame
carries the sound under it, so picture and sound cannot drift apart, whatever the clocks of the world do.

What is late costs delay and never sync: a frame that is not there when it is due is made up for by the one
before it, with silence. The delay that this adds is taken back while the person pauses (`repeat`), at
once by leaving out sound not yet spoken (`drop`), or ends the stream when it lasts (`fail`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

JUMP_S = 1.0  # further behind, the schedule starts anew: a suspended machine owes nobody an hour of frames
EPSILON_FRAMES = 1e-6  # a wait that ends a rounding error early has ended
SHORTEST_WAIT_S = 0.001  # no clock and no sound is so exact that less were worth waiting for
ARRIVING_S = 0.25  # a source silent for longer has paused: what it gave is spoken without waiting for more


@dataclass(frozen=True)
class Rules:
    """What the user chose. Times in seconds of video, which are seconds of the clock."""

    fps: int
    chunk_s: float  # video that a chunk adds
    lookahead_s: float  # sound that a chunk would like to hear beyond its own
    start_buffer_s: float  # video held in reserve, for chunks that take longer than usual
    latency_target_s: float
    late: Literal["repeat", "drop", "fail"]
    fail_after_s: float = 2.0  # of repeated frames on end, with `fail`

    @property
    def need_s(self) -> float:
        """Sound that a chunk waits for while there is time."""
        return self.chunk_s + self.lookahead_s


# Sending


@dataclass(frozen=True)
class Air:
    """What has been sent. `anchor_s` is when the first frame since the last jump was due; None: not on air."""

    anchor_s: float | None = None
    sent_frames: int = 0  # since the anchor, repeated ones included
    repeated_frames: int = 0  # on end, until now
    jumps: int = 0


@dataclass(frozen=True)
class Wait:
    """Nothing is due until then; None: until something is queued."""

    until_s: float | None


@dataclass(frozen=True)
class Send:
    """So many of the queued frames are due: one, or more after a stall."""

    frames: int


@dataclass(frozen=True)
class Repeat:
    """A frame is due and none is there: send the last one again, with silence."""


@dataclass(frozen=True)
class Fail:
    """Late for too long, with `late = fail`."""

    late_s: float


Decision = Wait | Send | Repeat | Fail


def decide(rules: Rules, air: Air, queued_frames: int, ending: bool, now_s: float) -> tuple[Decision, Air]:
    """What to send at `now_s`, and the state after that was done.

    `ending`: no more frames will come, so none is repeated in their place.
    """
    if air.anchor_s is None:
        enough = 1 if ending else max(1, round(rules.start_buffer_s * rules.fps))
        if queued_frames < enough:
            return Wait(None), air
        air = replace(air, anchor_s=now_s)
    air = _after_jump(rules, air, now_s)
    assert air.anchor_s is not None
    due_frames = 1 + math.floor((now_s - air.anchor_s) * rules.fps + EPSILON_FRAMES)
    behind_frames = due_frames - air.sent_frames
    if behind_frames <= 0:
        return Wait(air.anchor_s + air.sent_frames / rules.fps), air
    if queued_frames:
        n = min(behind_frames, queued_frames)
        return Send(n), replace(air, sent_frames=air.sent_frames + n, repeated_frames=0)
    if ending:
        return Wait(None), air
    late_s = (air.repeated_frames + 1) / rules.fps
    if rules.late == "fail" and late_s > rules.fail_after_s:
        return Fail(late_s), air
    repeated = replace(air, sent_frames=air.sent_frames + 1, repeated_frames=air.repeated_frames + 1)
    return Repeat(), repeated


def _after_jump(rules: Rules, air: Air, now_s: float) -> Air:
    """The schedule moved to now when it lies too far behind."""
    assert air.anchor_s is not None
    if now_s - (air.anchor_s + air.sent_frames / rules.fps) <= JUMP_S:
        return air
    return replace(air, anchor_s=now_s, sent_frames=0, jumps=air.jumps + 1)


# Hearing


@dataclass(frozen=True)
class Outlook:
    """What is known when the next chunk could begin."""

    unspoken_s: float  # sound that arrived and was not spoken
    ended: bool  # no more sound will come
    ahead_s: float  # video that waits to be sent
    first_frame_s: float  # what a chunk takes to its first frame
    silent_before: bool  # whether the person was silent when the chunk before ended
    since_arrival_s: float = math.inf  # since sound arrived last
    on_air: bool = True
    may_wait_s: float = 0.0  # before going on air: how long the source may take to begin
    queued_s: float = 0.0  # as `ahead_s`, with what is overdue because the outputs take nothing


def spare_s(rules: Rules, outlook: Outlook) -> float:
    """How long the next chunk could still wait without a frame being late; negative when it is late."""
    if not outlook.on_air:
        return outlook.may_wait_s
    return outlook.ahead_s - outlook.first_frame_s - rules.start_buffer_s


def wait_s(rules: Rules, outlook: Outlook) -> float:
    """How long to wait for more sound before the chunk begins; 0: begin.

    Also waits when more video is made than is wanted in advance: what was said cannot be unsaid. While the outputs
    take nothing, one chunk more is made for them.
    """
    wanted_s = max(rules.chunk_s, outlook.first_frame_s + rules.start_buffer_s)
    advance_s = max(outlook.ahead_s, outlook.queued_s - rules.chunk_s) - wanted_s
    if outlook.on_air and advance_s > SHORTEST_WAIT_S:
        return advance_s
    if outlook.ended or outlook.unspoken_s >= rules.need_s - SHORTEST_WAIT_S:
        return 0.0
    seconds = spare_s(rules, outlook)
    return seconds if seconds > SHORTEST_WAIT_S else 0.0


def silence_before_s(rules: Rules, outlook: Outlook) -> float:
    """Silence to put before the unspoken sound, when a chunk begins with less sound than it needs.

    Sound that just began and goes on arriving as it is spoken is held back for as long as it takes to speak
    it without a gap: until a whole chunk of it, and what that chunk hears beyond, is there in time. Else
    the silence comes after, where the sound ends or stalled.
    """
    missing_s = rules.need_s - outlook.unspoken_s
    arriving = outlook.since_arrival_s < ARRIVING_S
    if missing_s <= 0 or outlook.ended or not outlook.silent_before or not arriving:
        return 0.0
    late_s = max(0.0, -spare_s(rules, outlook)) if outlook.on_air else 0.0
    return min(rules.chunk_s, missing_s + late_s)


def skip_s(rules: Rules, outlook: Outlook, delay_s: float) -> float:
    """How much sound to leave out so that the delay comes down to its target, as far as that is possible.

    `delay_s` is what the next sound to be spoken will have waited when it is sent. Only what arrived in
    excess of the chunk's need can go, and only if the reserve of video outlasts it: where the machine
    sets the limit there is no excess, and a target below that limit does no harm.
    """
    excess_s = outlook.unspoken_s - rules.need_s
    return max(0.0, min(delay_s - rules.latency_target_s, excess_s + min(0.0, spare_s(rules, outlook))))

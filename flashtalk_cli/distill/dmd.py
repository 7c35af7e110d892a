"""Stage 2: distribution matching on the student's own rollouts.

Three networks of one architecture, all beginning as stage 1's. The *student* makes a chunk in a few
steps without guidance. The *teacher* is frozen, and steered by guidance. The *critic* learns, by
flow matching, what the student's chunks look like. Noise a chunk of the student's: where teacher
and critic take it for different clean chunks, the student is moved towards the teacher's.

What is scored is the last of k chunks that the student made one after another on its own output
(rollout.py); k, the step that keeps its gradient, and what the first chunk continues are drawn
once for all ranks, so that all do equal work. Teacher and critic look at times inside that
step's interval.

K chunks are seconds, and some faults take minutes to show. So a share of the rollouts (`carry`) may begin
where an earlier one had come to, with the same people saying the same again: its cost is that of any
rollout, and its past grows by k - 1 chunks each time. That is an addition to the paper's method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from flashtalk_cli.config import Sampling
from flashtalk_cli.distill import losses
from flashtalk_cli.distill.adapt import ALONE, passes, velocity_of
from flashtalk_cli.distill.config import Distill
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.pool import Bucket, People, Pool, Talk
from flashtalk_cli.distill.rollout import Rollout, roll_out
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.pipeline.sampler import Predict, hold_motion
from flashtalk_cli.pipeline.schedule import times

CARRIED_UPDATES = 16  # at most, whose rollouts wait to be gone on with


@dataclass(frozen=True)
class Carried:
    """A rollout that is not over."""

    people: People
    motion: Tensor  # [B, 16, m, h, w]: what its next chunk continues


@dataclass(frozen=True)
class Course:
    """What is drawn once for an update, the same on all ranks."""

    bucket: Bucket
    n_chunks: int
    kept: int  # the denoising step that keeps its gradient
    from_picture: bool
    carried: tuple[Carried, ...] = ()  # one for each pass; none: new rollouts begin


@dataclass(frozen=True)
class Noised:
    """A chunk of the student's at random times, as teacher and critic see it."""

    clean: Tensor  # with the motion latents that they are shown
    noise: Tensor
    time: Tensor  # [B]
    x: Tensor
    weight: Tensor  # 1 where latents are not given: [B, 1, T, 1, 1]


def predictor(dit: DiT, talk: Talk, chunk: int) -> Predict:
    """The student on one chunk of a talk; its conditions are embedded now, under the gradient mode of now."""
    context = dit.condition(talk.text, talk.tokens)
    heard = dit.hear(talk.windows[chunk])

    def predict(x: Tensor, time: float) -> Tensor:
        return dit(x, torch.full((len(x),), time * 1000, device=x.device), talk.y, context, heard, ALONE)

    return predict


def guided(teacher: DiT, guidance: losses.Guidance, noised: Noised, talk: Talk, chunk: int) -> Tensor:
    """The teacher's velocity with guidance: three evaluations in one."""
    windows, silent = talk.windows[chunk], torch.zeros_like(talk.windows[chunk])
    unsaid = torch.zeros_like(talk.text)
    velocity = velocity_of(
        teacher,
        noised.x.repeat(3, 1, 1, 1, 1),
        noised.time.repeat(3),
        talk.y.repeat(3, 1, 1, 1, 1),
        torch.cat([talk.text, unsaid, unsaid]),
        talk.tokens.repeat(3, 1, 1),
        torch.cat([windows, windows, silent]),
    )
    return guidance.combine(*velocity.chunk(3))


class DistillStage:
    """Stage 2 as the trainer drives it."""

    name = "distill"

    def __init__(
        self,
        student: Trained,
        critic: Trained,
        teacher: DiT,
        vae: Vae,
        pool: Pool,
        stage: Distill,
        sampling: Sampling,
        world: int,
        shared: Generator,
        own: Generator,
    ) -> None:
        self.student, self.critic, self.teacher, self.vae = student, critic, teacher, vae
        self.pool, self.stage, self.sampling = pool, stage, sampling
        self.shared, self.own = shared, own
        self.accumulated, self.per_pass = passes(stage.batch, stage.micro_batch, world)
        self.points = times(sampling.steps, stage.shift)
        self.guidance = losses.Guidance(stage.text_guidance, stage.audio_guidance)
        self.carried: deque[tuple[int, tuple[Carried, ...]]] = deque(maxlen=CARRIED_UPDATES)  # by bucket

    @property
    def steps(self) -> int:
        """Student updates of a whole run."""
        return self.stage.steps

    @property
    def step_count(self) -> int:
        """Student updates done."""
        return self.student.step_count

    def step(self) -> dict[str, Tensor]:
        """The critic's updates and one of the student's; what to log, on the device."""
        n_critic = self.stage.critic_updates + (self.stage.critic_warmup if self.step_count == 0 else 0)
        found: dict[str, Tensor] = {}
        for _ in range(n_critic):
            found = self.update_critic()
        return found | self.update_student()

    def update_critic(self) -> dict[str, Tensor]:
        """Flow matching on what the student makes now."""
        course = self.draw_course()
        total = torch.zeros((), device=self.own.device)
        begun = []
        for start in self.starts(course):
            talk = course.bucket.talk_of(start.people, course.n_chunks)
            with torch.no_grad():
                made = self.roll_out(course, talk, start.motion)
            begun.append(Carried(start.people, made.motion))
            seen = self.noised(made, talk, course)
            chunk = course.n_chunks - 1
            velocity = velocity_of(
                self.critic.dit, seen.x, seen.time, talk.y, talk.text, talk.tokens, talk.windows[chunk]
            )
            loss = losses.flow_matching(velocity, seen.clean, seen.noise, seen.weight) / self.accumulated
            loss.backward()
            total += loss.detach()
        self.carry_on(course, begun)
        return {"critic_loss": total, "critic_gradient_norm": self.critic.update()}

    def update_student(self) -> dict[str, Tensor]:
        """One step of distribution matching."""
        course = self.draw_course()
        distance = torch.zeros((), device=self.own.device)
        begun = []
        for start in self.starts(course):
            talk = course.bucket.talk_of(start.people, course.n_chunks)
            made = self.roll_out(course, talk, start.motion)
            begun.append(Carried(start.people, made.motion))
            with torch.no_grad():
                seen = self.noised(made, talk, course)
                real, fake = self.guesses(seen, talk, course.n_chunks - 1)
            loss, rms = losses.distribution_matching(made.clean, real, fake, seen.weight)
            (loss / self.accumulated).backward()
            distance += rms / self.accumulated
        self.carry_on(course, begun)
        chunks = torch.tensor(float(course.n_chunks), device=distance.device)
        return {"distance": distance, "gradient_norm": self.student.update(), "chunks": chunks}

    def guesses(self, seen: Noised, talk: Talk, chunk: int) -> tuple[Tensor, Tensor]:
        """What the teacher and the critic take a noised chunk for: clean latents each."""
        t = seen.time.view(-1, 1, 1, 1, 1)
        real = guided(self.teacher, self.guidance, seen, talk, chunk)
        fake = velocity_of(
            self.critic.dit, seen.x, seen.time, talk.y, talk.text, talk.tokens, talk.windows[chunk]
        )
        return seen.x - t * real, seen.x - t * fake

    def draw_course(self) -> Course:
        """How long the rollout is, where it starts, and which step is scored."""
        n_chunks = 1 + self._draw(self.stage.chunks)
        kept = self._draw(len(self.points) - 1)
        coin = self._draw(2) == 0
        from_picture = {"picture": True, "real": False, "mixed": coin}[self.stage.first_motion]
        goes_on = float(torch.rand((), generator=self.shared)) < self.stage.carry
        if goes_on and self.carried:
            place, carried = self.carried.popleft()
            return Course(self.pool.buckets[place], n_chunks, kept, from_picture, carried)
        longest = self.longest(n_chunks)
        bucket = self.pool.choose(self.shared, lambda bucket: len(bucket.chains_of(longest)))
        return Course(bucket, n_chunks, kept, from_picture)

    def longest(self, n_chunks: int) -> int:
        """Chunks that those must talk for who are drawn for n_chunks, and may be gone on with for K."""
        return self.stage.chunks if self.stage.carry else n_chunks

    def starts(self, course: Course) -> Iterator[Carried]:
        """Whom each pass shows, and what its first chunk continues."""
        if course.carried:
            yield from course.carried
            return
        for _ in range(self.accumulated):
            people = course.bucket.draw_people(self.per_pass, self.longest(course.n_chunks), self.own)
            talk = course.bucket.talk_of(people, 1)
            yield Carried(people, talk.picture_latent if course.from_picture else talk.real[0])

    def carry_on(self, course: Course, begun: list[Carried]) -> None:
        """Keep what was begun, to be gone on with."""
        if self.stage.carry:
            self.carried.append((self.pool.buckets.index(course.bucket), tuple(begun)))

    def roll_out(self, course: Course, talk: Talk, motion: Tensor) -> Rollout:
        """The student's k chunks; the last with gradient through one step, unless gradients are off."""
        return roll_out(
            lambda chunk: predictor(self.student.dit, talk, chunk),
            self.vae,
            motion,
            talk.colour,
            course.n_chunks,
            course.kept,
            self.points,
            self.sampling,
            self.own,
        )

    def noised(self, made: Rollout, talk: Talk, course: Course) -> Noised:
        """The scored chunk, noised to times inside its step's interval, its motion latents as the options say.

        align_motion: teacher and critic continue what the student continued; else what was really
        there in the clip. clean_motion: they see it clean, as in their own training; else noised.
        """
        motion = made.motion
        if not self.stage.align_motion and motion.shape[2] > 1:
            motion = talk.real[course.n_chunks - 1]
        clean = hold_motion(made.clean.detach(), motion)
        noise = torch.randn(clean.shape, generator=self.own, device=self.own.device)
        low, high = made.interval
        time = losses.draw_times(len(clean), self.stage.shift, self.own, low, high)
        x = losses.noised(clean, noise, time)
        if self.stage.clean_motion:
            x = hold_motion(x, motion)
        held = torch.full((len(clean),), motion.shape[2], device=clean.device)
        return Noised(clean, noise, time, x, losses.free_mask(clean, held))

    def probe(self) -> dict[str, Tensor]:
        """Nothing besides."""
        return {}

    def _draw(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.shared))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        carried = [
            (place, [(one.people.window, one.people.picture, one.motion) for one in begun])
            for place, begun in self.carried
        ]
        return {"student": self.student.state(), "critic": self.critic.state(), "carried": carried}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.student.load(state["student"])
        self.critic.load(state["critic"])
        self.carried.clear()
        for place, begun in state["carried"]:
            self.carried.append(
                (place, tuple(Carried(People(window, picture), motion) for window, picture, motion in begun))
            )

    def weights(self) -> tuple[list[str], list[Tensor]]:
        """What the stage is for: names and tensors of the student's moving average."""
        return self.student.names, self.student.average or self.student.parameters

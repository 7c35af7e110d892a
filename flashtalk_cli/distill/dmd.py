"""Stage 2: distribution matching on the student's own rollouts.

Three networks of one architecture, all beginning as stage 1's. The *student* makes a chunk in a few
steps without guidance. The *teacher* is frozen, and steered by guidance. The *critic* learns, by
flow matching, what the student's chunks look like. Noise a chunk of the student's: where teacher
and critic take it for different clean chunks, the student is moved towards the teacher's.

What moves the student is the last of k chunks that it made one after another on its own output
(rollout.py), by one of its steps. k, that step, and what the first chunk continues are drawn once for
all ranks, so that all do equal work. Teacher and critic look at times inside the step's interval.

A rollout costs many times what an update does, so the critic learns from the same one before, from
each of its chunks in turn, the last first: whatever it has seen then is the student's of this moment.

K chunks are seconds, and some faults take longer to show. So a share of the rollouts (`carry`) may begin
where an earlier one had come to, with the same people saying the same again: its cost is that of any
rollout, and its past grows by k - 1 chunks each time. That is an addition to the paper's method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from flashtalk_cli.config import Sampling
from flashtalk_cli.distill import losses
from flashtalk_cli.distill.adapt import ALONE, around_mouth, passes, velocity_of
from flashtalk_cli.distill.config import Distill
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.pool import Bucket, People, Pool, Talk
from flashtalk_cli.distill.rollout import Made, guess, roll_out
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.pipeline.sampler import Predict, hold_motion
from flashtalk_cli.pipeline.schedule import times

CARRIED_ROLLOUTS = 8  # at most, that wait to be gone on with


@dataclass(frozen=True)
class Carried:
    """A rollout that is not over."""

    people: People
    motion: Tensor  # [B, 16, m, h, w]: what its next chunk continues


@dataclass(frozen=True)
class Course:
    """What is drawn once for a rollout, the same on all ranks."""

    bucket: Bucket
    n_chunks: int
    from_picture: bool
    carried: tuple[Carried, ...] = ()  # one for each pass; none: new rollouts begin


@dataclass(frozen=True)
class Rolled:
    """A rollout of some people."""

    people: People
    talk: Talk
    chunks: tuple[Made, ...]


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
        self.points = times(sampling.steps, sampling.shift)  # those of use
        self.guidance = losses.Guidance(stage.text_guidance, stage.audio_guidance)
        self.carried: deque[tuple[int, tuple[Carried, ...]]] = deque(maxlen=CARRIED_ROLLOUTS)  # by bucket

    @property
    def n_steps(self) -> int:
        """In which the student makes a chunk."""
        return len(self.points) - 1

    @property
    def steps(self) -> int:
        """Student updates of a whole run."""
        return self.stage.steps

    @property
    def step_count(self) -> int:
        """Student updates done."""
        return self.student.step_count

    def step(self) -> dict[str, Tensor]:
        """A rollout, the critic's updates and one of the student's; what to log, on the device."""
        if self.step_count == 0:
            for _ in range(self.stage.critic_warmup):
                self.update_critic(self.roll_out(self.draw_course()))
        rolled = self.roll_out(self.draw_course())
        return self.update_critic(rolled) | self.update_student(rolled)

    def update_critic(self, rolled: list[Rolled]) -> dict[str, Tensor]:
        """Flow matching on what the student makes now: an update from each chunk in turn, the last first."""
        total, norm = (torch.zeros((), device=self.own.device) for _ in range(2))
        n_chunks = len(rolled[0].chunks)
        for index in range(self.stage.critic_updates):
            chunk, kept = n_chunks - 1 - index % n_chunks, self._draw(self.n_steps)
            total.zero_()
            for one in rolled:
                seen = self.noised(one, chunk, kept)
                velocity = self.velocity(self.critic.dit, seen, one.talk, chunk)
                loss = losses.flow_matching(velocity, seen.clean, seen.noise, seen.weight) / self.accumulated
                loss.backward()
                total += loss.detach()
            norm = self.critic.update()
        return {"critic_loss": total, "critic_gradient_norm": norm}

    def update_student(self, rolled: list[Rolled]) -> dict[str, Tensor]:
        """One step of distribution matching."""
        chunk, kept = len(rolled[0].chunks) - 1, self._draw(self.n_steps)
        distance = torch.zeros((), device=self.own.device)
        for one in rolled:
            made, time = one.chunks[chunk], float(self.points[kept])
            predict = predictor(self.student.dit, one.talk, chunk)
            clean = guess(predict, made.noisy[kept], time, made.motion)
            with torch.no_grad():
                seen = self.noised(one, chunk, kept)
                real, fake = self.guesses(seen, one.talk, chunk)
            loss, rms = losses.distribution_matching(clean, real, fake, seen.weight)
            if self.stage.mouth_weight:
                loss = loss + self.stage.mouth_weight * self.mouth_error(predict, one.talk, chunk, time)
            (loss / self.accumulated).backward()
            distance += rms / self.accumulated
        chunks = torch.tensor(float(chunk + 1), device=distance.device)
        return {"distance": distance, "gradient_norm": self.student.update(), "chunks": chunks}

    def mouth_error(self, predict: Predict, talk: Talk, chunk: int, time: float) -> Tensor:
        """How far the student's guess of the real chunk, noised to a step's time, is from it around the mouth: a scalar.

        DMD's own regression (Yin et al. 2023, section 3.3), on clips in place of pairs: matching distributions asks for
        lips that could have been meant by what is heard, this for the likeliest.
        """
        real, motion = talk.clip[chunk], talk.motion[chunk]
        noise = torch.randn(real.shape, generator=self.own, device=self.own.device)
        times = torch.full((len(real),), time, device=real.device)
        held = torch.full((len(real),), motion.shape[2], device=real.device)
        clean = guess(predict, hold_motion(losses.noised(real, noise, times), motion), time, motion)
        weight = around_mouth(talk.box, losses.free_mask(real, held), real.shape).expand_as(real)
        return (weight * (clean - real).square()).sum() / weight.sum()

    def velocity(self, dit: DiT, seen: Noised, talk: Talk, chunk: int) -> Tensor:
        """What a network makes of a noised chunk, in that chunk's speech."""
        windows = talk.windows[chunk]
        return velocity_of(dit, seen.x, seen.time, talk.y, talk.text, talk.tokens, windows)

    def guesses(self, seen: Noised, talk: Talk, chunk: int) -> tuple[Tensor, Tensor]:
        """What the teacher and the critic take a noised chunk for: clean latents each."""
        t = seen.time.view(-1, 1, 1, 1, 1)
        real = guided(self.teacher, self.guidance, seen, talk, chunk)
        fake = self.velocity(self.critic.dit, seen, talk, chunk)
        return seen.x - t * real, seen.x - t * fake

    def draw_course(self) -> Course:
        """How long the rollout is, and where it starts."""
        n_chunks = 1 + self._draw(self.stage.chunks)
        coin = self._draw(2) == 0
        from_picture = {"picture": True, "real": False, "mixed": coin}[self.stage.first_motion]
        goes_on = float(torch.rand((), generator=self.shared)) < self.stage.carry
        if goes_on and self.carried:
            place, carried = self.carried.popleft()
            return Course(self.pool.buckets[place], n_chunks, from_picture, carried)
        longest = self.longest(n_chunks)
        bucket = self.pool.choose(self.shared, lambda bucket: len(bucket.chains_of(longest)))
        return Course(bucket, n_chunks, from_picture)

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
            yield Carried(people, talk.picture_latent if course.from_picture else talk.motion[0])

    def roll_out(self, course: Course) -> list[Rolled]:
        """The student's k chunks, for each pass; they are kept, to be gone on with."""
        rolled = []
        for start in self.starts(course):
            talk = course.bucket.talk_of(start.people, course.n_chunks)
            chunks = roll_out(
                partial(predictor, self.student.dit, talk),
                self.vae,
                start.motion,
                talk.colour,
                course.n_chunks,
                self.points,
                self.sampling,
                self.own,
            )
            rolled.append(Rolled(start.people, talk, chunks))
        if self.stage.carry:
            begun = tuple(Carried(one.people, one.chunks[-1].motion) for one in rolled)
            self.carried.append((self.pool.buckets.index(course.bucket), begun))
        return rolled

    def noised(self, rolled: Rolled, chunk: int, kept: int) -> Noised:
        """A chunk as a step guessed it, noised to times inside that step's interval, its motion latents as
        the options say.

        align_motion: teacher and critic continue what the student continued; else what was really
        there in the clip. clean_motion: they see it clean, as in their own training; else noised.
        """
        made = rolled.chunks[chunk]
        motion = made.motion
        if not self.stage.align_motion and motion.shape[2] > 1:
            motion = rolled.talk.motion[chunk]
        clean = hold_motion(made.guesses[kept], motion)
        noise = torch.randn(clean.shape, generator=self.own, device=self.own.device)
        high, low = self.points[kept : kept + 2].tolist()
        time = losses.draw_times(len(clean), self.sampling.shift, self.own, low, high)
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
        """From a checkpoint, whose tensors are mapped from files."""
        self.student.load(state["student"])
        self.critic.load(state["critic"])
        self.carried.clear()
        for place, begun in state["carried"]:
            here = [[tensor.to(self.own.device, copy=True) for tensor in one] for one in begun]
            self.carried.append(
                (place, tuple(Carried(People(window, picture), motion) for window, picture, motion in here))
            )

    def weights(self) -> tuple[list[str], list[Tensor]]:
        """What the stage is for: names and tensors of the student's moving average."""
        return self.student.names, self.student.average or self.student.parameters

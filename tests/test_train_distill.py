"""Stage 2 on a toy: who is moved by what, guidance, options, rollouts and draws as told (contracts); the student
comes to the teacher (property)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_stages import LATENT_PX, distill_stage, make_toy

from flashtalk_cli import presets
from flashtalk_cli.distill import adapt, dmd
from flashtalk_cli.distill.config import TrainPreset
from flashtalk_cli.distill.rollout import Made
from flashtalk_cli.errors import ConfigError
from flashtalk_cli.models.dit import DitParams
from flashtalk_cli.pipeline.schedule import times


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainPreset, DitParams]:
    return make_toy(tmp_path_factory.mktemp("toy"))


def test_stage_2_moves_the_student_alone_by_its_updates(toy) -> None:
    """An update of the critic leaves the student as it is and the other way round; the teacher never moves."""
    stage = distill_stage(toy)

    def copies() -> list[list[torch.Tensor]]:
        return [[p.detach().clone() for p in dit.parameters()] for dit in
                (stage.student.dit, stage.critic.dit, stage.teacher)]  # fmt: skip

    def moved(before: list[list[torch.Tensor]]) -> list[bool]:
        return [
            any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            for old, new in zip(before, copies(), strict=True)
        ]

    before = copies()
    rolled = stage.roll_out(stage.draw_course())
    assert moved(before) == [False, False, False]
    stage.update_critic(rolled)
    assert moved(before) == [False, True, False]
    before = copies()
    stage.update_student(rolled)
    assert moved(before) == [True, False, False]


def test_stage_2_brings_the_student_to_the_teacher(toy) -> None:
    """The distance between teacher and critic on the student's chunks shrinks, as does that of their heads."""
    rates = {"learning_rate": 1e-2, "beta1": 0.0, "beta2": 0.99, "warmup_steps": 0, "weight_decay": 0.0}
    stage = distill_stage(toy, chunks=1, critic_updates=4, student=rates, critic=rates, audio_guidance=1.0, mouth_weight=0.0,
                          text_guidance=1.0, batch=4, micro_batch=4)  # fmt: skip

    def miss() -> float:
        """Error of the student's one-step guess against the teacher's."""
        bucket = stage.pool.buckets[0]
        talk = bucket.talk_of(bucket.draw_people(8, 1, torch.Generator().manual_seed(3)), 1)
        x = torch.randn(8, 16, 4, LATENT_PX, LATENT_PX, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            guesses = [dmd.predictor(dit, talk, 0)(x, 0.9) for dit in (stage.student.dit, stage.teacher)]
        return (guesses[0] - guesses[1]).square().mean().item()

    before = miss()
    for _ in range(40):
        stage.step()
    assert miss() < 0.8 * before


def test_the_mouth_error_is_of_the_mouth_alone(toy) -> None:
    """0 whatever is wrong outside the box or in given latents; the square of what is wrong inside; everywhere without a box."""
    stage = distill_stage(toy)
    bucket = stage.pool.buckets[0]
    talk = bucket.talk_of(bucket.draw_people(2, 1, torch.Generator().manual_seed(0)), 1)
    inside = slice(2, 6)  # of the toy's box of 16..48 px, in latents of 8 px

    def error(shown: dmd.Talk, wrong: torch.Tensor) -> float:
        """Of a student that guesses the clip and adds `wrong`, whatever it is given."""
        return stage.mouth_error(lambda x, time: (x - shown.clip[0] - wrong) / time, shown, 0, 0.9).item()

    outside = torch.ones_like(talk.clip[0])
    outside[:, :, 2:, inside, inside] = 0
    assert error(talk, 7 * outside) == pytest.approx(0, abs=1e-9)
    assert error(talk, torch.full_like(outside, 0.5)) == pytest.approx(0.25, rel=1e-4)
    assert error(replace(talk, box=torch.zeros(2, 4)), 7 * outside) > 10


def test_a_weight_on_the_mouth_brings_lips_to_the_clips(toy) -> None:
    """The error that it counts falls further than by distribution matching alone, with the same draws."""

    def final(weight: float) -> float:
        rates = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "warmup_steps": 0, "weight_decay": 0.0}
        stage = distill_stage(toy, chunks=1, student=rates, batch=4, micro_batch=4, mouth_weight=weight)
        for _ in range(20):
            stage.step()
        bucket = stage.pool.buckets[0]
        talk = bucket.talk_of(bucket.draw_people(8, 1, torch.Generator().manual_seed(3)), 1)
        with torch.no_grad():
            return stage.mouth_error(dmd.predictor(stage.student.dit, talk, 0), talk, 0, 1.0).item()

    assert final(1.0) < 0.8 * final(0.0)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("align", [True, False])
def test_motion_options(toy, clean: bool, align: bool) -> None:
    """What teacher and critic are shown of the motion: clean or noised, the student's or the clip's own."""
    stage = distill_stage(toy, clean_motion=clean, align_motion=align, first_motion="picture", chunks=2,
                          batch=2, micro_batch=2)  # fmt: skip
    (rolled,) = stage.roll_out(dmd.Course(stage.pool.buckets[0], 2, from_picture=True))
    made, kept = rolled.chunks[1], 1
    seen = stage.noised(rolled, 1, kept)
    wanted = made.motion if align else rolled.talk.motion[1]
    assert torch.equal(seen.clean[:, :, :2], wanted)
    assert torch.equal(seen.x[:, :, :2], wanted) == clean
    assert torch.equal(seen.clean[:, :, 2:], made.guesses[kept][:, :, 2:])
    assert seen.weight[:, 0, :, 0, 0].tolist() == [[0, 0, 1, 1]] * 2
    low, high = stage.points[2].item(), stage.points[1].item()
    assert low - 1e-5 <= seen.time.min()
    assert seen.time.max() <= high + 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_those_of_use(toy, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and what teacher and critic look at are shifted as rendering is."""
    stage = distill_stage(toy, shift=shift, chunks=1, batch=2, micro_batch=2)
    assert torch.equal(stage.points, times(stage.sampling.steps, shift))
    drawn: list[float] = []
    draw_times = dmd.losses.draw_times

    def noted(n: int, shift: float, *more: Any) -> torch.Tensor:
        drawn.append(shift)
        return draw_times(n, shift, *more)

    monkeypatch.setattr(dmd.losses, "draw_times", noted)
    (rolled,) = stage.roll_out(dmd.Course(stage.pool.buckets[0], 1, from_picture=True))
    stage.noised(rolled, 0, 0)
    assert drawn == [shift]


def test_stage_2_has_no_shift_of_its_own() -> None:
    """Fault: a preset that would train for times that nobody uses is refused."""
    asked = presets.Override("distill.shift", 3, "--set")
    with pytest.raises(ConfigError, match=r"unknown key 'distill\.shift'"):
        presets.load("mini", [asked], presets.Kind(TrainPreset, "train"))


def test_what_is_carried_goes_to_the_device(toy) -> None:
    """A checkpoint is on the host: people who wait to be gone on with are moved to where rollouts are made."""
    stage = distill_stage(toy, carry=0.6)
    stage.roll_out(stage.draw_course())
    state = stage.state()
    stage.own = SimpleNamespace(device=torch.device("meta"))  # type: ignore[assignment]
    stage.load(state)
    ((_, begun),) = stage.carried
    assert all(
        one.motion.is_meta and one.people.window.is_meta and one.people.picture.is_meta for one in begun
    )
    assert all(not parameter.is_meta for parameter in stage.student.parameters)


def test_rollouts_go_on_where_earlier_ones_had_come_to(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `carry` the same people come again with what they had come to; what waits is bounded; without, nobody."""
    began: list[torch.Tensor] = []  # what each pass of each rollout continued, and came to
    came_to: list[torch.Tensor] = []

    def at_once(*given: object) -> tuple[Made, ...]:
        """A rollout without networks: it comes to a motion of its own."""
        began.append(given[2])  # type: ignore[arg-type]
        came_to.append(torch.randn(1, 16, 2, LATENT_PX, LATENT_PX))
        return (Made(came_to[-1], torch.empty(0), (), ()),)

    monkeypatch.setattr(dmd, "roll_out", at_once)
    stage = distill_stage(toy, chunks=2, batch=2, micro_batch=1)
    stage.roll_out(stage.draw_course())
    assert not stage.carried
    stage = distill_stage(toy, chunks=2, carry=0.8, batch=2, micro_batch=1)
    courses = [stage.draw_course()]
    for _ in range(20):
        people = [one.people for one in stage.roll_out(courses[-1])]
        if courses[-1].carried:
            assert people == [one.people for one in courses[-1].carried]
            pairs = zip(courses[-1].carried, began[-2:], strict=True)
            assert all(one.motion is motion for one, motion in pairs)
            assert all(any(motion is made for made in came_to) for motion in began[-2:])
        courses.append(stage.draw_course())
    again = sum(bool(course.carried) for course in courses[:-1])
    assert 10 <= again < 20
    waiting = len(stage.carried) + bool(courses[-1].carried)
    assert waiting == min(dmd.CARRIED_ROLLOUTS, 20 - again)


def test_the_critic_learns_from_every_chunk_of_a_rollout(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last first, in as many updates as were asked for; the student from the last alone, at its own weights."""
    stage = distill_stage(toy, chunks=2, critic_updates=5, batch=2, micro_batch=2)
    rolled = stage.roll_out(dmd.Course(stage.pool.buckets[0], 2, from_picture=True))
    scored: list[int] = []
    noised = stage.noised

    def noted(one: dmd.Rolled, chunk: int, kept: int) -> dmd.Noised:
        scored.append(chunk)
        return noised(one, chunk, kept)

    monkeypatch.setattr(stage, "noised", noted)
    before = stage.critic.step_count
    stage.update_critic(rolled)
    assert scored == [1, 0, 1, 0, 1]
    assert stage.critic.step_count == before + 5
    stage.update_student(rolled)
    assert scored[5:] == [1]


def test_guidance_of_one_is_the_teacher_itself(toy) -> None:
    """And the three evaluations are those of one network with something left out."""
    stage = distill_stage(toy, batch=2, micro_batch=2)
    (rolled,) = stage.roll_out(dmd.Course(stage.pool.buckets[0], 1, from_picture=True))
    talk = rolled.talk
    with torch.no_grad():
        seen = stage.noised(rolled, 0, 0)

        def plain(text: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
            return adapt.velocity_of(stage.teacher, seen.x, seen.time, talk.y, text, talk.tokens, windows)

        full = plain(talk.text, talk.windows[0])
        unsaid = plain(0 * talk.text, talk.windows[0])
        neither = plain(0 * talk.text, 0 * talk.windows[0])
        one = dmd.guided(stage.teacher, dmd.losses.Guidance(1.0, 1.0), seen, talk, 0)
        strong = dmd.guided(stage.teacher, dmd.losses.Guidance(3.0, 4.0), seen, talk, 0)
    torch.testing.assert_close(one, full, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        strong, neither + 4 * (unsaid - neither) + 3 * (full - unsaid), rtol=1e-4, atol=1e-4
    )


def test_draws_of_a_course_cover_what_they_may(toy) -> None:
    """k from 1 to K, both beginnings; the same from the same shared generator."""
    stage, other = (
        distill_stage(toy, chunks=2, first_motion="mixed"),
        distill_stage(toy, chunks=2, first_motion="mixed"),
    )
    other.own.manual_seed(77)
    drawn = [stage.draw_course() for _ in range(60)]
    assert {c.n_chunks for c in drawn} == {1, 2}
    assert {c.from_picture for c in drawn} == {True, False}
    again = [other.draw_course() for _ in range(60)]
    assert [(c.n_chunks, c.from_picture) for c in drawn] == [(c.n_chunks, c.from_picture) for c in again]

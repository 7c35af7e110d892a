"""Examples, held to rendering: what training sees is what a session would compute from the same
frames and sound (parity); pictures come from outside the frames to be made, chains of windows follow
each other (properties); folders of another model, or broken ones, are refused in one line (faults)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from toy_training import SIDE_PX, load_presets, write_bank, write_presets

from flashtalk_cli.config import SAMPLE_RATE_HZ
from flashtalk_cli.distill import panel, people_data, shards
from flashtalk_cli.distill.encoding import (
    Clip,
    Encoders,
    colour_of,
    origin_of,
    picture_frames,
    window_starts,
)
from flashtalk_cli.distill.evaluate import loudness_of
from flashtalk_cli.distill.people import clips
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM
from flashtalk_cli.distill.people_data import Cast, draw_plan, merged
from flashtalk_cli.distill.pool import Pool, Rows, open_pool
from flashtalk_cli.distill.shards import windows_of
from flashtalk_cli.errors import InputError
from flashtalk_cli.models import weights
from flashtalk_cli.models.folder import find
from flashtalk_cli.pipeline import chunks
from flashtalk_cli.pipeline.session import Models, prepare

CPU = torch.device("cpu")
N_CHUNKS = 4


def invented_clip(seed: int, n_frames: int) -> Clip:
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (n_frames, SIDE_PX, SIDE_PX, 3), dtype=np.uint8))
    samples = rng.normal(0, 0.1, 640 * (n_frames + 20)).astype(np.float32)
    return Clip(frames, samples, origin=640 * 3, box=(16.0, 16.0, 48.0, 48.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoders, list[Clip], Pool]:
    """A folder of two clips of different length, what encoded it, and the pool that reads it."""
    folder = tmp_path_factory.mktemp("data")
    _, base = load_presets(write_presets(folder / "presets"))
    encoders = Encoders(find(base.model.name), base, CPU)
    lengths = [5 + 8 * N_CHUNKS, 5 + 8 * 2]
    clips = [invented_clip(i, n) for i, n in enumerate(lengths)]
    origin = origin_of(encoders.folder, base, 256, ["A person."])
    shards.write_texts(folder, encoders.encode_prompts(origin.prompts))
    for number, clip in enumerate(clips):
        shards.write_shard(folder, (SIDE_PX, SIDE_PX), number, encoders.encode([clip], 2))
    shards.write_origin(folder, origin.model_copy(update={"clips": 2}))
    pool = open_pool(folder, 5, 8, CPU, "never")
    return folder, encoders, clips, pool


def test_a_chunk_hears_in_training_what_it_hears_in_use(made) -> None:
    """Stored rows, unfolded, are the windows that rendering gathers for the same chunk."""
    _, encoders, clips, pool = made
    sampling, hearing = encoders.base.sampling, encoders.base.hearing
    stored = windows_of(pool.buckets[0].rows["heard"].take(torch.arange(N_CHUNKS)))
    for index, start in enumerate(window_starts(5 + 8 * N_CHUNKS, 13, 8)):
        heard = chunks.heard_from(start, sampling, hearing)
        clip = clips[0]
        sound = np.zeros(heard.stop_sample - heard.start_sample, np.float32)
        first = clip.origin + heard.start_sample
        inside = slice(max(0, -first), min(len(sound), len(clip.samples) - first))
        sound[inside] = clip.samples[first + inside.start : first + inside.stop]
        features = encoders.speech.encode(torch.from_numpy(sound), heard.n_frames)
        wanted = chunks.windows(features, heard, sampling.chunk_frames)
        torch.testing.assert_close(stored[index][None].float(), wanted, rtol=2e-3, atol=2e-3)


def test_the_first_window_of_a_video_is_its_first_chunk() -> None:
    """Chunk i begins where `heard_from` is given the i-th start, moved by the motion frames."""
    _, base = _mini()
    for index in range(3):
        start = index * base.sampling.new_frames - base.sampling.motion_frames
        assert chunks.heard_by(index, base.sampling, base.hearing) == chunks.heard_from(
            start, base.sampling, base.hearing
        )


def test_conditions_are_those_of_a_session(made) -> None:
    """y, picture tokens, colour and the first chunk's motion latent, of the same picture."""
    _, encoders, clips, pool = made
    folder = encoders.folder
    dit = weights.load_dit(folder, CPU, torch.float32)
    models = Models(dit, encoders.vae, encoders.base.sampling, CPU, sequence=None)  # type: ignore[arg-type]
    picture = clips[0].frames[0].permute(2, 0, 1).float() / 127.5 - 1
    tokens = encoders.image.encode(picture)
    conditions = prepare(models, picture, torch.zeros(2, 32), tokens)
    bucket = pool.buckets[0]
    y, stored_tokens = bucket._picture(torch.tensor([0]))
    close = {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(y, conditions.y, **close)
    torch.testing.assert_close(stored_tokens.float(), tokens, **close)
    torch.testing.assert_close(y[:, 4:, :1], conditions.picture_latent, **close)
    colour = colour_of(bucket.colour[:1])
    torch.testing.assert_close(colour.mean, conditions.colour.mean)
    torch.testing.assert_close(colour.std, conditions.colour.std)


def test_a_windows_first_latents_are_its_motion_latents(made) -> None:
    """The VAE is causal: the first frame alone, and the first five alone, give the window's beginning."""
    _, encoders, clips, pool = made
    window = pool.buckets[0].rows["latents"].take(torch.tensor([1])).float()
    frames = clips[0].frames[8:13].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    motion, _ = encoders.vae.encode(frames)
    first, _ = encoders.vae.encode(frames[:, :, :1])
    torch.testing.assert_close(window[:, :, :2], motion, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(window[:, :, :1], first, rtol=2e-3, atol=2e-3)


def test_pictures_come_from_outside_the_frames_to_be_made(made) -> None:
    """Every later-chunk example has a picture that is not in its window; first-chunk ones their own first frame."""
    *_, pool = made
    bucket = pool.buckets[0]
    own = torch.Generator().manual_seed(0)
    pictures = bucket.rows["picture"].take(torch.arange(4)).float()
    seen = set()
    for _ in range(30):
        batch = bucket.draw(4, 0.5, own)
        for i in range(4):
            shown = next(p for p in range(4) if torch.equal(pictures[p], batch.y[i, 4:]))
            is_own = torch.equal(batch.y[i, 4:, :1], batch.latents[i, :, :1])
            assert is_own == (batch.held[i] == 1)
            seen.add((int(batch.held[i]), shown))
    assert {held for held, _ in seen} == {1, 2}
    assert len(seen) > 4, "several pictures are used"


def test_talks_follow_each_other(made) -> None:
    """A chain of k chunks is k neighbouring windows of one clip; no clip is too long for its chain."""
    folder, _, _, pool = made
    bucket = pool.buckets[0]
    assert sorted(bucket.run.tolist(), reverse=True) == [4, 3, 2, 2, 1, 1]
    talk = bucket.talk_of(bucket.draw_people(8, 3, torch.Generator().manual_seed(0)), 3)
    latents = bucket.rows["latents"].take(torch.arange(6)).float()
    for i in range(8):
        places = [
            next(n for n in range(6) if torch.equal(latents[n][:, :2], real[i])) for real in talk.motion
        ]
        assert places == [places[0], places[0] + 1, places[0] + 2]
    pool.check_chains(folder, 4)
    with pytest.raises(InputError, match=r"longest clip.* 4 chunks, rollouts need 5"):
        pool.check_chains(folder, 5)


@pytest.mark.parametrize("n_frames", [33, 34, 61, 200])
def test_window_starts_fill_a_clip(n_frames: int) -> None:
    """Windows are chunks on end, none hangs over; pictures are first frames of windows."""
    starts = window_starts(n_frames, 33, 28)
    assert starts[0] == 0
    assert n_frames - 28 < starts[-1] + 33 <= n_frames
    shown = picture_frames(starts, 3)
    assert set(shown) <= set(starts)
    assert len(shown) == min(3, len(starts))


def test_rows_read_alike_from_files_and_from_the_device() -> None:
    parts = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 14.0).view(4, 2)]
    index = torch.tensor([6, 0, 3, 2, 2])
    mapped, resident = (Rows(parts, CPU, on_device).take(index) for on_device in (False, True))
    assert torch.equal(mapped, resident)
    assert torch.equal(mapped, torch.cat(parts)[index])


def test_generated_clips_are_repeatable_and_heard_around_their_ends(tmp_path: Path) -> None:
    """A clip follows from its number; its sound reaches beyond its frames on both sides where it is a cut."""
    write_bank(tmp_path)
    preset, base = load_presets(write_presets(tmp_path / "presets"))
    bank = SpeechBank(tmp_path, "train")
    cast = Cast.of(preset, base, 3, held_out=False)
    origins = set()
    for number in range(6):
        plan, again = draw_plan(number, bank, cast), draw_plan(number, bank, cast)
        assert np.array_equal(plan.samples, again.samples)
        assert np.array_equal(plan.performance.curves, again.performance.curves)
        assert len(plan.performance) == cast.n_frames
        assert len(plan.samples) >= plan.origin + 640 * (cast.n_frames + 3)
        origins.add(plan.origin)
    assert origins == {0, 640 * cast.before_frames}
    assert (
        draw_plan(0, bank, Cast.of(preset, base, 3, held_out=True)).spec.seed
        != draw_plan(0, bank, cast).spec.seed
    )


@pytest.mark.parametrize("module", [people_data, clips, panel])
def test_held_out_people_perform_like_nobody_in_training(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manners follow from the person: those of held-out clip n are not those of training clip n."""
    write_bank(tmp_path)
    preset, base = load_presets(write_presets(tmp_path / "presets"))
    bank = SpeechBank(tmp_path, "held_out")
    seeds: list[int] = []

    class Seen(Exception):
        pass

    def noted(*_: object, seed: int) -> NoReturn:
        seeds.append(seed)
        raise Seen

    monkeypatch.setattr(module, "perform", noted)
    encoders: Any = SimpleNamespace(base=base)
    draws: dict[ModuleType, Callable[[bool], object]] = {
        people_data: lambda held_out: draw_plan(3, bank, Cast.of(preset, base, 3, held_out)),
        clips: lambda held_out: clips.draw_plan(3, bank, clips.Drawing(held_out=held_out)),
        panel: lambda held_out: panel.draw_panel(encoders, tmp_path, preset.evaluation),
    }
    for held_out in (False, True):
        with pytest.raises(Seen):
            draws[module](held_out)
    whoever = HELD_OUT_FROM + panel.FIRST_PERSON
    assert seeds == ([whoever] * 2 if module is panel else [3, HELD_OUT_FROM + 3])


def test_shards_put_together_number_their_clips_on() -> None:
    part = {"clip": torch.tensor([0, 0, 1]), "picture_clip": torch.tensor([0, 1]), "start": torch.arange(3)}
    assert merged([part, part])["clip"].tolist() == [0, 0, 1, 2, 2, 3]


def test_examples_of_another_model_are_refused(made, tmp_path: Path) -> None:
    """By the encoder that differs, or the setting; a folder that is none, by what makes one."""
    folder, encoders, _, _ = made
    found = shards.read_origin(folder)
    wanted = origin_of(encoders.folder, encoders.base, 256, found.prompts)
    shards.check_origin(folder, found, wanted)
    other = wanted.model_copy(update={"encoders": {**wanted.encoders, "vae": "0" * 16}})
    with pytest.raises(InputError, match="another model's vae encoder"):
        shards.check_origin(folder, found, other)
    with pytest.raises(InputError, match="chunk_frames 13, the preset has 33"):
        shards.check_origin(folder, found, wanted.model_copy(update={"chunk_frames": 33}))
    with pytest.raises(InputError, match="no folder of examples"):
        shards.read_origin(tmp_path)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(InputError, match="another format"):
        shards.read_origin(tmp_path)
    broken = tmp_path / "shard-64x64-00000.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="broken or cut off"):
        shards.read_shard(broken)


def _mini():
    from flashtalk_cli import presets
    from flashtalk_cli.distill.config import TrainPreset

    preset = presets.load("mini", (), presets.Kind(TrainPreset, "train"))
    return preset, presets.load(preset.render)


def test_loudness_follows_a_voice_frame_by_frame() -> None:
    """1 under the loudest frames, 0 where there is silence, and on time."""
    samples = np.zeros(4 * SAMPLE_RATE_HZ, np.float32)
    on = slice(SAMPLE_RATE_HZ, 2 * SAMPLE_RATE_HZ)
    samples[on] = 0.3 * np.sin(np.arange(SAMPLE_RATE_HZ) * 0.1)
    loud = loudness_of(samples, 25)
    assert loud[26:49].min() > 0.95
    assert loud[:24].max() == 0
    assert loud[52:].max() == 0

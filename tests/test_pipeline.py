"""Properties of the pipeline: times, windows of sound, colour, and sessions as values."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtalk_cli.config import Canvas, Hearing, Sampling
from flashtalk_cli.pipeline import chunks
from flashtalk_cli.pipeline.colour import Statistics, from_lab, match_colour, to_lab
from flashtalk_cli.pipeline.schedule import renoise, shift_time, times


@given(steps=st.integers(1, 60), shift=st.floats(0.5, 10))
def test_times_fall_from_noise_to_picture(steps: int, shift: float) -> None:
    """Strictly falling, from 1 to 0, one interval a step."""
    t = times(steps, shift)
    assert t.shape == (steps + 1,)
    assert t[0] == pytest.approx(1)
    assert t[-1] == 0
    assert (t.diff() < 0).all()


@given(u=st.floats(0, 1), shift=st.floats(0.5, 10))
def test_shift_keeps_the_ends(u: float, shift: float) -> None:
    """The shift maps 0..1 onto itself and is undone by the inverse shift."""
    shifted = shift_time(torch.tensor(u, dtype=torch.float64), shift)
    assert 0 <= shifted <= 1
    assert shift_time(shifted, 1 / shift) == pytest.approx(u, abs=1e-9)


def test_a_perfect_velocity_lands_on_the_picture() -> None:
    """With the true velocity of the path x = (1 - t) clean + t noise, the last step returns the clean latents."""
    clean, noise, fresh = torch.randn(3, 16, 3, 4, 5).double()
    time = 0.7
    x = (1 - time) * clean + time * noise
    torch.testing.assert_close(renoise(x, noise - clean, time, 0.0, fresh), clean)


SAMPLINGS = st.builds(
    lambda motion, more: Sampling(chunk_frames=1 + 4 * (motion + more), motion_frames=1 + 4 * motion),
    st.integers(0, 3),
    st.integers(1, 8),
)


@given(sampling=SAMPLINGS, lookahead=st.floats(0, 2), index=st.integers(0, 10**6))
def test_what_a_chunk_hears(sampling: Sampling, lookahead: float, index: int) -> None:
    """The row of every frame of a chunk is the row of the sound under it, for any look-ahead."""
    heard = chunks.heard_by(index, sampling, Hearing(context_s=8.0, lookahead_s=lookahead))
    assert heard.stop_sample - heard.start_sample == heard.n_frames * sampling.samples_per_frame
    first_frame_on_screen = index * sampling.new_frames - sampling.motion_frames
    assert heard.start_sample + heard.first_frame * sampling.samples_per_frame == (
        first_frame_on_screen * sampling.samples_per_frame
    )
    rows = torch.arange(heard.n_frames)[:, None, None]
    seen = chunks.windows(rows, heard, sampling.chunk_frames)[0, :, :, 0, 0]
    wanted = heard.first_frame + torch.arange(sampling.chunk_frames)
    assert (seen[:, 2] == wanted).all()
    assert (seen - (wanted[:, None] + torch.arange(-2, 3))).abs().max() <= 2
    assert seen.max() <= heard.n_frames - 1


def test_without_lookahead_the_last_frames_are_clamped() -> None:
    """The released live window: its last row stands in for the two that are not there yet."""
    sampling = Sampling()
    heard = chunks.heard_by(0, sampling, Hearing(lookahead_s=0.0))
    seen = chunks.windows(torch.arange(200)[:, None, None], heard, 33)[0, :, :, 0, 0]
    assert seen[-1].tolist() == [197, 198, 199, 199, 199]
    assert seen[0].tolist() == [165, 166, 167, 168, 169]
    assert heard.stop_sample == 28 * 640


@given(n_frames=st.integers(1, 10**6), sampling=SAMPLINGS)
def test_chunks_cover_the_video(n_frames: int, sampling: Sampling) -> None:
    """Enough chunks, and not one too many."""
    n = chunks.count(n_frames, sampling)
    assert (n - 1) * sampling.new_frames < n_frames <= n * sampling.new_frames


def test_lab_agrees_with_scikit_image() -> None:
    """Oracle: CIE Lab as scikit-image computes it."""
    colour = pytest.importorskip("skimage.color")
    rgb = np.random.default_rng(0).random((16, 12, 3))
    ours = to_lab(torch.from_numpy(rgb * 2 - 1).permute(2, 0, 1)[None, :, None])
    np.testing.assert_allclose(ours[0, :, 0].permute(1, 2, 0), colour.rgb2lab(rgb), atol=2e-3)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.05, 0.4))
def test_colour_is_there_and_back(seed: int, spread: float) -> None:
    """sRGB -> Lab -> sRGB is the identity, and matching a frame to itself changes nothing."""
    video = (torch.randn(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * spread).clamp(-1, 1)
    torch.testing.assert_close(from_lab(to_lab(video)), video, atol=2e-4, rtol=0)
    frame = video[:, :, :1]
    own = Statistics.of(to_lab(frame))
    torch.testing.assert_close(match_colour(frame, own, 1.0), frame, atol=2e-4, rtol=0)


def test_colour_of_a_flat_frame_is_finite() -> None:
    """No contrast to scale: the frame takes the target's mean colour and nothing divides by zero."""
    target = Statistics.of(to_lab(torch.rand(1, 3, 1, 8, 8) - 0.5))
    out = match_colour(torch.full((1, 3, 2, 8, 8), -1.0), target, 1.0)
    assert out.isfinite().all()
    torch.testing.assert_close(
        Statistics.of(to_lab(out)).mean[0, :, 0, 0, 0], target.mean.flatten(), atol=0.1, rtol=0
    )


@given(width=st.integers(32, 5000), height=st.integers(32, 5000))
def test_a_canvas_of_the_pictures_shape(width: int, height: int) -> None:
    """--size auto: sides divide by 16, the area stays near the preset's, the shape near the picture's."""
    canvas = Canvas(width_px=448, height_px=768).of_aspect(width, height)
    assert canvas.width_px % 16 == canvas.height_px % 16 == 0
    assert canvas.area_px == pytest.approx(448 * 768, rel=0.1)
    ratio = max(0.25, min(4, width / height))
    assert canvas.width_px / canvas.height_px == pytest.approx(ratio, rel=0.1)


@given(side=st.sampled_from([64, 4096]), width=st.integers(32, 5000), height=st.integers(32, 5000))
def test_a_canvas_of_the_pictures_shape_is_one_that_a_preset_may_have(
    side: int, width: int, height: int
) -> None:
    """Fault: the smallest and the largest canvas, of any picture's shape, pass the checks of a worker."""
    canvas = Canvas(width_px=side, height_px=side).of_aspect(width, height)
    assert Canvas.model_validate(canvas.model_dump()) == canvas


def collect(steps: object) -> tuple[Tensor, object]:
    """All the frames of a chunk, and the state after it."""
    frames = []
    while True:
        try:
            frames.append(next(steps))  # type: ignore[call-overload]
        except StopIteration as end:
            return torch.cat(frames, dim=2), end.value


@pytest.fixture(scope="module")
def tiny() -> dict:
    """A seeded model small enough to run many chunks."""
    from flashtalk_cli.models.dit import DiT, DitParams
    from flashtalk_cli.models.vae import Vae, VaeParams
    from flashtalk_cli.parallel.sequence import Sequence
    from flashtalk_cli.pipeline.session import Models, prepare

    torch.manual_seed(0)
    dit = DiT(
        DitParams(
            dim=32, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=16, text_dim=8, text_len=4,
            intermediate_dim=8, output_dim=8, context_tokens=2, audio_layers=2, audio_dim=6, image_dim=10,
        )
    ).eval()  # fmt: skip
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.05)
    vae = Vae(VaeParams(dim=4)).eval()
    models = Models(dit, vae, Sampling(steps=2), torch.device("cpu"), Sequence())
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    conditions = [prepare(models, p, torch.randn(3, 8), torch.randn(1, 5, 10)) for p in pictures]
    return {"models": models, "conditions": conditions, "windows": torch.randn(3, 1, 33, 5, 2, 6)}


def test_sessions_do_not_touch_each_other(tiny: dict) -> None:
    """Two sessions on one set of weights, interleaved, give what each gives alone; a state can be used twice."""
    from flashtalk_cli.pipeline.session import begin, step

    models, windows = tiny["models"], tiny["windows"]

    def alone(conditions: object) -> list[Tensor]:
        state = begin(conditions, 1)
        out = []
        for w in windows:
            video, state = collect(step(models, conditions, state, w))
            out.append(video)
        return out

    expected = [alone(c) for c in tiny["conditions"]]
    states = [begin(c, 1) for c in tiny["conditions"]]
    for i, w in enumerate(windows):
        for s, conditions in enumerate(tiny["conditions"]):
            again, _ = collect(step(models, conditions, states[s], w))
            video, states[s] = collect(step(models, conditions, states[s], w))
            assert torch.equal(video, expected[s][i])
            assert torch.equal(video, again)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_frames_come_before_the_chunk_ends(tiny: dict) -> None:
    """The first frames are handed out while later latents are still to be decoded; 28 in all."""
    from flashtalk_cli.pipeline.session import begin, step

    conditions = tiny["conditions"][0]
    sizes = [v.shape[2] for v in step(tiny["models"], conditions, begin(conditions, 1), tiny["windows"][0])]
    assert sizes == [4, 8, 8, 8]


@pytest.mark.parametrize(("chunk", "motion"), [(9, 5), (13, 9), (33, 1), (17, 13)])
def test_any_share_of_motion_frames(tiny: dict, chunk: int, motion: int) -> None:
    """Also chunks that add fewer frames than the next one continues: the rest of them is older."""
    from dataclasses import replace

    from flashtalk_cli.pipeline.session import begin, step

    models = replace(tiny["models"], sampling=Sampling(steps=1, chunk_frames=chunk, motion_frames=motion))
    conditions = replace(tiny["conditions"][0], y=tiny["conditions"][0].y[:, :, : 1 + (chunk - 1) // 4])
    state = begin(conditions, 1)
    for windows in tiny["windows"][:2]:
        video, state = collect(step(models, conditions, state, windows[:, :chunk]))
        assert video.shape[2] == chunk - motion
        assert state.motion.shape[2] == 1 + (motion - 1) // 4


@pytest.mark.parametrize("motion_frames", [5, 9])
@torch.no_grad()
def test_a_primed_decoder_shows_the_same(
    tiny: dict, motion_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Priming before there is sound: bit for bit what decoding a chunk's latents from the first, each alone, gives.

    Also after the motion was exchanged under a primed state, as a change of picture does.
    """
    from dataclasses import replace

    from flashtalk_cli.pipeline import session

    models = replace(tiny["models"], sampling=Sampling(steps=1, motion_frames=motion_frames))
    conditions, drawn = tiny["conditions"][0], []
    denoise = session.denoise
    monkeypatch.setattr(session, "denoise", lambda *given: drawn.append(denoise(*given)) or drawn[-1])
    monkeypatch.setattr(session, "latents_at_once", lambda *_: 1)
    state = session.begin(conditions, 1)
    for index, windows in enumerate(tiny["windows"]):
        if index == 2:
            state = replace(state, motion=conditions.picture_latent)
        video, state = collect(session.step(models, conditions, state, windows))
        expected = models.vae.decode(drawn.pop())[0][:, :, motion_frames:]
        assert torch.equal(video, match_colour(expected, conditions.colour, 1.0))


def test_seed_decides(tiny: dict) -> None:
    """The same seed gives the same frames, another seed others."""
    from flashtalk_cli.pipeline.session import begin, step, to_bytes

    conditions = tiny["conditions"][0]

    def frames(seed: int) -> Tensor:
        return to_bytes(
            collect(step(tiny["models"], conditions, begin(conditions, seed), tiny["windows"][0]))[0]
        )

    assert torch.equal(frames(1), frames(1))
    assert not torch.equal(frames(1), frames(2))
    assert frames(1).shape == (28, 64, 64, 3)
    assert frames(1).dtype == torch.uint8


@given(n=st.integers(1, 12), at_once=st.integers(1, 12))
def test_latents_in_pieces(n: int, at_once: int) -> None:
    """Property: all of them in order, the first alone, no piece larger than asked for, and no more than needed."""
    from flashtalk_cli.pipeline.session import in_pieces

    latents = torch.arange(n, dtype=torch.float32)[None, None, :, None, None]
    pieces = in_pieces(latents, at_once)
    assert torch.equal(torch.cat(pieces, dim=2), latents)
    assert pieces[0].shape[2] == 1
    assert max(piece.shape[2] for piece in pieces) <= max(1, at_once)
    assert len(pieces) == 1 + -(-(n - 1) // at_once)


@given(height=st.integers(16, 81), width=st.integers(16, 81), size=st.integers(1, 8), n=st.integers(1, 9))
def test_all_ranks_cut_a_chunk_alike(height: int, width: int, size: int, n: int) -> None:
    """Property: of any picture and any count of ranks, also where their tiles are of several sizes.

    Ranks exchange the borders of every piece: with other pieces their exchanges would not meet.
    """
    from flashtalk_cli.parallel.group import Group
    from flashtalk_cli.parallel.spatial import TileGrid
    from flashtalk_cli.parallel.split import choose_grid
    from flashtalk_cli.pipeline.session import in_pieces, latents_at_once

    latents = torch.empty(1, 16, n, 2 * height, 2 * width, device="meta")  # a GPU's rule, and no memory
    grid = choose_grid(size, 2 * height, 2 * width)
    cut = [TileGrid(grid, Group(size, rank)) for rank in range(size)]
    pieces = {
        tuple(piece.shape[2] for piece in in_pieces(tiles.cut(latents), latents_at_once(latents, tiles)))
        for tiles in cut
    }
    assert len(pieces) == 1


@torch.no_grad()
def test_several_latents_at_once_make_the_same_chunk(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: frames, and the state that the next chunk begins with."""
    from flashtalk_cli.pipeline import session

    conditions, windows = tiny["conditions"][0], tiny["windows"][0]
    expected, after = collect(session.step(tiny["models"], conditions, session.begin(conditions, 1), windows))
    monkeypatch.setattr(session, "latents_at_once", lambda *_: 3)
    video, state = collect(session.step(tiny["models"], conditions, session.begin(conditions, 1), windows))
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-3)  # an eighth of a level
    torch.testing.assert_close(state.motion, after.motion, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_speech_folded_once_makes_the_same_chunk(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: where it is not folded ahead each step does, and makes the very same frames."""
    from flashtalk_cli.models.dit import DiT
    from flashtalk_cli.pipeline import session

    conditions, windows = tiny["conditions"][0], tiny["windows"][0]
    fold, folded = DiT.fold, []
    monkeypatch.setattr(DiT, "fold", lambda *given: folded.append(fold(*given)) or folded[-1])
    once, _ = collect(session.step(tiny["models"], conditions, session.begin(conditions, 1), windows))
    assert len(folded) == 1
    monkeypatch.setattr(DiT, "fold", lambda _dit, heard, *_: heard)
    each, _ = collect(session.step(tiny["models"], conditions, session.begin(conditions, 1), windows))
    assert torch.equal(once, each)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_a_recorded_step_is_the_step(tiny: dict) -> None:
    """Parity: sessions whose steps are replayed and whose decoder is primed beside give the frames of others.

    Several chunks of two sessions in turn, so that recordings are made, replayed and made anew.
    """
    from dataclasses import replace

    from flashtalk_cli.parallel.beside import Beside
    from flashtalk_cli.pipeline.session import begin, prepare, step
    from flashtalk_cli.pipeline.streams import Graphs

    cuda = torch.device("cuda")
    dit, vae = deepcopy(tiny["models"].dit).to(cuda), deepcopy(tiny["models"].vae).to(cuda)
    plain = replace(tiny["models"], dit=dit, vae=vae, device=cuda)
    recorded = replace(plain, beside=Beside(cuda), graphs=Graphs())
    for seed in (0, 1):
        torch.manual_seed(seed)
        conditions = prepare(plain, torch.rand(3, 64, 64) * 2 - 1, torch.randn(3, 8), torch.randn(1, 5, 10))
        states = [begin(conditions, 1), begin(conditions, 1)]
        for windows in tiny["windows"]:
            (a, states[0]), (b, states[1]) = (
                collect(step(models, conditions, state, windows))
                for models, state in zip((plain, recorded), states, strict=True)
            )
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert recorded.graphs is not None
    assert recorded.graphs._recordings["step"].graph is not None

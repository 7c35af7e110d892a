"""Threads give way to other programs, and what is computed stays the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashtalk_cli.config import Sampling
from flashtalk_cli.models.device import choose_dtype
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.models.weights import load_dit, load_speech_encoder, load_vae
from flashtalk_cli.parallel.sequence import Sequence
from flashtalk_cli.pipeline import cores
from flashtalk_cli.pipeline.cores import FreeCores, Reading, threads_beside
from flashtalk_cli.pipeline.session import Models, begin, prepare, step

CPU = torch.device("cpu")


@given(st.floats(0, 64), st.floats(0, 64), st.integers(1, 64), st.integers(1, 64))
def test_threads_and_others_fit_the_cores(others: float, more: float, n_cores: int, most: int) -> None:
    found = threads_beside(others, n_cores, most)
    assert 1 <= found <= most
    assert found + others < n_cores + 1 or found == 1
    assert threads_beside(others + more, n_cores, most) <= found


@pytest.mark.parametrize(("others", "threads"), [(0.0, 2), (0.15, 2), (0.5, 1), (0.99, 1), (1.5, 1)])
def test_two_cores(others: float, threads: int) -> None:
    """ffmpeg beside us takes turns; a program that would keep a core busy gets it."""
    assert threads_beside(others, 2, 2) == threads


def test_others_are_all_but_this_process() -> None:
    """A busy process beside us counts, our own work does not; measured for half a second each."""
    allowed = (
        set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    )
    before = Reading.of(allowed)
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    after = Reading.of(allowed)
    assert after.all_s - before.all_s > 0.4
    assert after.ours_s - before.ours_s < 0.3
    lone = Reading(before.now_s, 10.0, 3.0)
    assert Reading(before.now_s + 2, 12.0, 5.0).others_since(lone) == 0
    assert Reading(before.now_s + 2, 13.0, 4.0).others_since(lone) == 1


def test_threads_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look while others are busy, one when they are done; two looks at once are one."""
    used = {"others": 0.0, "now": 0.0, "all": 0.0}

    def reading(_: set[int]) -> Reading:
        return Reading(used["now"], used["all"], 0.0)

    monkeypatch.setattr(Reading, "of", staticmethod(reading))
    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1, 2, 3})
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        fitting = FreeCores()
        for others, threads in ((0.0, 4), (2.0, 2), (9.0, 1), (1.0, 3), (0.0, 4)):
            used["now"] += 1.0
            used["all"] += others
            fitting.fit()
            assert torch.get_num_threads() == threads
            used["now"] += cores.LEAST_S / 2
            used["all"] += 4.0
            fitting.fit()
            assert torch.get_num_threads() == threads
            used["all"] -= 4.0
            used["now"] -= cores.LEAST_S / 2
    finally:
        torch.set_num_threads(before)


def test_who_sets_the_number_sets_the_most() -> None:
    """Contract: it is what containers and clusters set, and threads give way there too."""
    program = (
        "import torch\n"
        "from flashtalk_cli.pipeline.cores import free_cores\n"
        "assert free_cores(torch.device('cpu'))._most == 1\n"
        "assert free_cores(torch.device('cuda')) is None\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def with_threads(what: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What comes of it with one thread, two and three.

    Three are left out without AVX-512, where a convolution differs, and with AMX, where a product does.
    """
    before, outs = torch.get_num_threads(), []
    three = "AVX512" in torch.backends.cpu.get_cpu_capability() and not torch.cpu._is_amx_tile_supported()
    most = 3 if three else 2
    try:
        for threads in range(1, most + 1):
            torch.set_num_threads(threads)
            outs.append(what())
    finally:
        torch.set_num_threads(before)
    return outs


def test_the_number_of_threads_changes_no_bit_of_a_chunk() -> None:
    """The embedded networks in the precision that this machine takes, and the colours."""
    sampling, generator = Sampling(steps=1), torch.Generator().manual_seed(0)
    folder, dtype = resolve("mini"), choose_dtype("auto", CPU)
    dit, vae = load_dit(folder, CPU, dtype), load_vae(folder, CPU, dtype)
    models = Models(dit, vae, sampling, CPU, Sequence())
    weight = dit.params
    picture = torch.rand(3, 144, 144, generator=generator) * 2 - 1
    text = torch.randn(5, weight.text_dim, generator=generator)
    image = torch.randn(1, 17, weight.image_dim, generator=generator)
    heard = torch.randn(1, 33, 5, weight.audio_layers, weight.audio_dim, generator=generator)

    def frames() -> torch.Tensor:
        conditions = prepare(models, picture, text, image)
        return torch.cat(list(step(models, conditions, begin(conditions, 1), heard)), dim=2)

    one, *more = with_threads(frames)
    assert all(torch.equal(one, other) for other in more)


def test_the_number_of_threads_changes_no_bit_of_what_is_heard() -> None:
    """Among ten sounds of 8 s some have a mean whose float32 sum depends on it."""
    encoder = load_speech_encoder(resolve("mini"), CPU, torch.float32)
    sounds = torch.randn(10, 8 * 16_000, generator=torch.Generator().manual_seed(0))
    one, *more = with_threads(lambda: torch.stack([encoder.encode(sound, 200) for sound in sounds]))
    assert all(torch.equal(one, other) for other in more)

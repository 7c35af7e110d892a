"""The bench's arithmetic: counts of operations against known numbers and against torch's own counter (parity);
times between marks on several streams, with a device that does not exist; what is made of them; and one
bench of the embedded model, small, from its command line to its files."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashtalk_cli import presets
from flashtalk_cli.bench import projection, report, words
from flashtalk_cli.bench.fingerprint import commit
from flashtalk_cli.bench.parts import HOST, MAIN, Part
from flashtalk_cli.bench.sink import NullSink
from flashtalk_cli.bench.timers import ExchangeTimer, Timer
from flashtalk_cli.bench.work import Work, dit_step, dit_tokens, vae_decode, vae_encode
from flashtalk_cli.cli.app import run
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.vae import Vae, VaeParams
from flashtalk_cli.parallel.sequence import Sequence
from tests import tiny_model
from tests.bench_reports import job, make

CPU = torch.device("cpu")
LATENTS, HEIGHT, WIDTH = 9, 96, 56  # of a chunk of 33 frames at 448 x 768


def tera(work: Work) -> float:
    return work.total * 1e-12


# Counting operations


def test_the_released_models_work_is_what_was_counted_by_hand():
    params = DitParams()
    tokens = dit_tokens(params, LATENTS, HEIGHT, WIDTH)
    step = dit_step(params, tokens, image_tokens=257)
    assert tokens == 12_096
    assert step.gemm * 1e-12 == pytest.approx(339.9, abs=0.1)
    assert step.attention * 1e-12 == pytest.approx(119.9 + 7.6 + 0.3, abs=0.1)
    assert tera(step) == pytest.approx(467.7, abs=0.1)
    vae = VaeParams()
    assert tera(vae_decode(vae, LATENTS, HEIGHT, WIDTH)) == pytest.approx(97.1, abs=0.05)
    assert tera(vae_decode(vae, 2, HEIGHT, WIDTH)) == pytest.approx(15.4, abs=0.05)
    assert tera(vae_encode(vae, 2, HEIGHT, WIDTH)) == pytest.approx(9.3, abs=0.05)


def test_decoding_in_two_goes_is_the_same_work():
    vae = VaeParams()
    parts = vae_decode(vae, 2, HEIGHT, WIDTH) + vae_decode(vae, LATENTS, HEIGHT, WIDTH, first=2)
    assert parts.total == pytest.approx(vae_decode(vae, LATENTS, HEIGHT, WIDTH).total)


def counted(compute) -> dict[str, int]:
    """Operations of each module by torch's own counter; all of them together are `Global`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compute()
    return {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}


def test_a_dit_step_is_what_torch_counts():
    """But for the speech's attention, which is computed with fewer operations than the network defines."""
    params = DitParams.from_config(tiny_model.CONFIG)
    with torch.device("meta"):
        dit = DiT(params).eval()
        text, image = torch.zeros(3, params.text_dim), torch.zeros(1, 5, params.image_dim)
        windows = torch.zeros(1, 9, params.audio_window, params.audio_layers, params.audio_dim)
        x, y, t = torch.zeros(1, 16, 3, 8, 6), torch.zeros(1, 20, 3, 8, 6), torch.zeros(1)
        context, heard = dit.condition(text, image), dit.hear(windows)
        found = counted(lambda: dit(x, t, y, context, heard, Sequence()))
    audio = sum(count for name, count in found.items() if name.endswith("audio_cross_attn"))
    embedding = 2 * params.dim * (params.freq_dim + params.dim + 6 * params.dim)  # of the time: not by token
    tokens = dit_tokens(params, 3, 8, 6)
    defined = tokens * params.num_layers * (4 * params.dim**2 + 4 * params.context_tokens * params.dim)
    assert audio < defined
    work = dit_step(params, tokens, image_tokens=5)
    assert found["Global"] - audio - embedding == work.total - defined


def test_an_encoding_is_what_torch_counts():
    """Encoding is computed as it is defined; decoding is not (up-convolutions need fewer taps), so that its
    count is held by the known numbers alone."""
    params = VaeParams(dim=8)
    vae = Vae(params).eval()
    found = counted(lambda: vae.encode(torch.zeros(1, 3, 5, 32, 48)))["Global"]
    padding = found / vae_encode(params, 2, 4, 6).total
    assert 1.0 <= padding < 1.2  # stride 2 on a padded picture computes a row and a column too many


# Time between marks


class Stream:
    """A device's clock that a test moves by hand, and the streams that events are recorded in."""

    def __init__(self) -> None:
        self.now_ms, self.current, self.waits = 0.0, 1, 0

    def install(self, monkeypatch) -> None:
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at_ms = clock.now_ms

            def elapsed_time(self, later: Event) -> float:
                return later.at_ms - self.at_ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=self.current))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: setattr(self, "waits", self.waits + 1))


@pytest.fixture
def stream(monkeypatch) -> Stream:
    found = Stream()
    found.install(monkeypatch)
    return found


def test_parts_are_timed_on_the_stream_they_ran_on_and_nothing_waits_in_the_loop(stream):
    timer = Timer(torch.device("cuda"))
    waited = stream.waits
    for start_ms in (100.0, 200.0):
        stream.now_ms = start_ms
        timer.start()
        stream.now_ms += 10
        timer.mark("step")
        stream.current, stream.now_ms = 7, start_ms + 12
        timer.mark("")  # nothing before counts
        stream.now_ms += 5
        timer.mark("prime")
        stream.current, stream.now_ms = 1, start_ms + 30
        timer.mark("step")
    assert stream.waits == waited
    rounded = [(p.name, p.lane, round(p.start_s, 6), round(p.end_s, 6)) for p in timer.chunks()[1]]
    assert rounded == [
        ("step", MAIN, 0.0, 0.010),
        ("prime", "side 1", 0.012, 0.017),
        ("step", MAIN, 0.010, 0.030),
    ]
    assert timer.between_s(0) == pytest.approx(0.1)


def test_a_side_stream_must_say_where_it_begins(stream):
    timer = Timer(torch.device("cuda"))
    timer.start()
    stream.current = 7
    timer.mark("prime")
    assert timer.chunks() == [[]]


def test_the_hosts_own_time_is_placed_on_the_devices_clock(stream, monkeypatch):
    host_s = 50.0
    monkeypatch.setattr("flashtalk_cli.bench.timers.time", SimpleNamespace(perf_counter=lambda: host_s))
    timer = Timer(torch.device("cuda"))  # the device is at 0 ms when the host is at 50 s
    stream.now_ms = 1000.0
    timer.start()
    host_s = 51.5
    timer.mark_host("deliver", 51.25)
    [[part]] = timer.chunks()
    assert part.lane == HOST
    assert (part.start_s, part.end_s) == pytest.approx((0.25, 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_devices_streams_and_the_hosts_clock_agree():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    timer, side = Timer(device), torch.cuda.Stream(device)
    timer.start()
    x @ x
    timer.mark("step")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        timer.mark("")
        x @ x
        timer.mark("prime")
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    time.sleep(0.05)
    timer.mark_host("deliver", begun_s)
    step, prime, deliver = timer.chunks()[0]
    assert (step.lane, prime.lane, deliver.lane) == (MAIN, "side 1", HOST)
    assert 0 == step.start_s < step.end_s <= prime.start_s + 1e-4
    assert prime.end_s <= deliver.start_s + 1e-3  # what was waited for is over before the host goes on
    assert deliver.duration_s == pytest.approx(0.05, rel=0.2)


def test_on_a_cpu_delivery_is_part_of_the_one_lane():
    timer = Timer(CPU)
    timer.start()
    timer.mark("bytes")
    timer.mark_host("deliver", 0.0)
    [parts] = timer.chunks()
    assert [(part.name, part.lane) for part in parts] == [("bytes", MAIN), ("deliver", MAIN)]
    assert parts[1].start_s == pytest.approx(parts[0].end_s)
    assert parts[1].duration_s >= 0


def test_exchanges_are_summed_and_counted_chunk_by_chunk(stream):
    timer = ExchangeTimer(torch.device("cuda"))
    for spans in ([(0, 2), (5, 8)], []):
        timer.start()
        for begin_ms, end_ms in spans:
            stream.now_ms = begin_ms
            timer.begin()
            stream.now_ms = end_ms
            timer.end()
    assert timer.counts() == [2, 0]
    assert timer.totals_s() == pytest.approx([0.005, 0.0])


# What is made of it


def test_a_report_adds_up():
    found = make(noise=0.0)
    main_s = sum(part["time"]["p50_s"] for part in found["parts"] if part["lane"] == MAIN)
    assert found["chunk"]["p50_s"] == pytest.approx(main_s)
    assert sum(part["share"] for part in found["parts"] if part["share"]) == pytest.approx(1)
    made_s = 20 * main_s + found["speed"]["drain_s"]
    assert found["speed"]["fps"] == pytest.approx(20 * 28 / made_s)
    assert found["speed"]["realtime"] == pytest.approx(found["speed"]["fps"] / 25)
    step = next(part for part in found["parts"] if part["name"] == "step")
    assert len(step["each"]) == step["count"] == 4
    assert step["time"]["p50_s"] == pytest.approx(sum(each["p50_s"] for each in step["each"]))
    assert len(found["chunk"]["samples_s"]) == 20
    assert all(math.isfinite(value) for value in found["speed"].values())


def test_the_ceiling_of_attention_is_in_the_numbers_that_it_runs_in(monkeypatch: pytest.MonkeyPatch):
    """Contract: with a kernel of eight bits, operands that are quantised already; else a step beats its ceiling."""
    from dit_parts import SMALL, random_dit

    from flashtalk_cli.bench import ceiling
    from flashtalk_cli.models.attention import SDPA, AttentionKernel
    from flashtalk_cli.models.attention_fp8 import emulated

    monkeypatch.setattr(ceiling, "PROBE_S", 0.0)
    given = []

    def seen(*parts):
        given.append((parts[0].dtype, len(parts)))
        return emulated(*parts)

    dit = random_dit()
    for kernel, form in ((AttentionKernel("fa3-fp8", seen), "e4m3"), (SDPA, "float32")):
        dit.kernel = kernel
        _, attention = ceiling.probe_dit(dit, 20, 2, torch.device("cpu"), eight_bits=False)
        assert (
            attention.what
            == f"{kernel.name}, 20 tokens, {SMALL.num_heads // 2} heads of {SMALL.head_dim}, {form}"
        )
    assert set(given) == {(torch.float8_e4m3fn, 4)}


def test_rates_are_of_one_rank_and_the_ceiling_is_of_its_mix():
    """A step of 340 TFLOP at 700 and 128 at 650, on two ranks, in 350 ms each."""
    row = next(row for row in make(2, noise=0.0)["work"] if row["stage"] == "step")
    least_s = 170 / 700 + 64 / 650
    assert row["tflops"] == pytest.approx(234 / 0.35)
    assert row["ceiling_tflops"] == pytest.approx(234 / least_s)
    assert row["share"] == pytest.approx(least_s / 0.35)


def test_start_up_is_the_sound_and_then_the_first_frame():
    live = make(noise=0.0)["live"]
    sampling = job(1).preset.sampling
    assert live["audio_fill_s"] == sampling.new_frames / sampling.fps == 1.12
    heard_s = live["audio_fill_s"] + live["lookahead_s"]
    assert live["start_warm_s"] == pytest.approx(heard_s + live["first_frame"]["p50_s"])
    assert live["start_cold_s"] == pytest.approx(5 + 3 + 20 + 0.5 + live["first_frame"]["p50_s"])


def test_the_verdict_on_live():
    assert words.verdict(make(1)).startswith("not live: 0.3")
    enough = make(4, noise=0.0)
    assert words.verdict(enough).startswith("live: 1.4")
    assert f"{1.12 - enough['chunk']['p95_s']:.2f} s to spare" in words.verdict(enough)
    uneven = make(4, noise=0.5, slower=0.9)
    assert uneven["chunk"]["p95_s"] > 1.12
    assert words.verdict(uneven).startswith("live, with hitches")


def test_a_line_for_the_readme_is_one_row_of_a_table():
    line = words.readme_line(make(noise=0.0))
    assert line.startswith("| ")
    assert line.endswith(" |")
    assert "\n" not in line
    for said in ("9.2 fps", "0.37x real time", "2031-05-06", "soulx-14b 448x768", "1 x Imaginary"):
        assert said in line


def test_a_projection_divides_what_is_shared_and_keeps_the_rest():
    found = make(1, noise=0.0)
    points = {point.ranks: point.fps for point in projection.project(found)}
    assert points[1] == pytest.approx(28 / found["chunk"]["p50_s"], rel=1e-6)
    kept_s = 0.012 + 0.003 + 5 * 0.001
    assert 28 / points[8] - kept_s == pytest.approx((28 / points[1] - kept_s) / 8)
    assert not projection.counts_exchanges(found)


def test_a_projection_counts_exchanges_where_they_are_known():
    two = make(2, noise=0.0)
    points = {point.ranks: point.fps for point in projection.project(two)}
    assert points[2] == pytest.approx(28 / two["chunk"]["p50_s"], rel=1e-6)
    shared_s = two["chunk"]["p50_s"] - 0.020 - 0.06  # without what each does alone and what is exchanged
    sent = (7 / 64) / (1 / 4)
    assert 28 / points[8] == pytest.approx(shared_s * 2 / 8 + 0.020 + 0.06 * sent)
    assert projection.counts_exchanges(two)


def test_of_two_reports_of_a_count_the_later_one_is_shown():
    early, late = make(1, slower=2.0), make(1)
    assert projection.measured([early, late, make(2)])[0].fps == late["speed"]["fps"]


def test_what_runs_beside_a_chunk_for_the_next_one_is_not_waited_for():
    found = report.Measured(
        chunks=[
            [
                Part("step", MAIN, 0.0, 1.0),
                Part("to host", "side 1", 1.0, 1.2),
                Part("prime", "side 2", 1.0, 1.7),
            ]
        ]
        * 3,
        loop_s=0.0,
        drain_s=0.0,
        once=dict.fromkeys(("process", "inputs", "load", "prepare"), 0.0),
        ranks=[dict(rank=0, host="", peak_memory_gib=1, peak_reserved_gib=1, exchange_s=[0.0], exchanges=0)],
        work={},
        ceilings=[],
        fingerprint={},
        setting={"ranks": 1},
    )
    assert report.build(job(1), found)["chunk"]["p50_s"] == 1.2


# The whole of it


def test_frames_go_through_a_real_encoder():
    import numpy as np

    preset = presets.load("mini", [])
    frames = np.zeros((5, 160, 160, 3), np.uint8)
    with NullSink(preset) as sink:
        sink.write(frames)
        sink.finish()


def test_the_commit_is_that_of_this_program_or_none():
    found = commit()
    assert found is None or (12 <= len(found) <= 13 and int(found.rstrip("+"), 16) >= 0)


def test_a_bench_from_its_command_line_to_its_files(tmp_path, capsys):
    small = [f"--set={key}" for key in ("canvas.width_px=64", "canvas.height_px=64", "sampling.steps=2")]
    files = ["-o", str(tmp_path / "report.json"), "--html", str(tmp_path / "page.html")]
    assert run(["bench", "--weights", "random", "--chunks", "1", *small, *files]) == 0
    shown = capsys.readouterr()
    found = json.loads((tmp_path / "report.json").read_text())
    names = {part["name"] for part in found["parts"]}
    assert names == {
        *("speech", "keys", "noise", "step", "prime", "decode"),
        *("colour", "bytes", "to host", "deliver", "motion"),
    }
    assert len(next(part for part in found["parts"] if part["name"] == "step")["each"]) == 2
    assert {row["stage"] for row in found["work"]} == {"step", "prime", "decode", "motion"}
    assert all(0 < row["share"] < 1.5 for row in found["work"])  # noise may lift it a little over 1
    assert 0 < found["live"]["first_frame"]["p50_s"] < found["chunk"]["p50_s"]
    assert found["once"]["process"] > 0.1
    assert found["memory"]["peak_gib"] > 0.05
    assert "frames a second with everything counted" in shown.out
    assert words.readme_line(found) in shown.out
    assert "<svg" in (tmp_path / "page.html").read_text()

"""A step of the DiT at its full size with random weights: traces, and one change after another switched on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from measure import (
    BF16,
    DEVICE,
    DIT,
    LATENTS,
    ON_GPU,
    SMALL,
    H,
    Report,
    W,
    difference,
    draw,
    milliseconds,
    trace,
)
from torch import Tensor

from flashtalk_cli.models import dit as dit_module
from flashtalk_cli.models import weights
from flashtalk_cli.models.attention import KERNEL_NAMES, SDPA, choose_kernel, why_absent
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.parallel.beside import Beside
from flashtalk_cli.parallel.group import ALONE
from flashtalk_cli.parallel.sequence import UNDIVIDED, Exchange, Gathering, Sequence, Size
from flashtalk_cli.parallel.shelf import Shelf
from flashtalk_cli.parallel.split import span
from flashtalk_cli.pipeline.streams import Graphs

Step = Callable[[Tensor, Tensor], Tensor]


class OneShelf(Shelf):
    """A place for each of two ranks, whose other wrote random numbers (zeros would cost less power) and never comes."""

    kept: Tensor | None = None

    def room(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.kept is None:
            self.kept = draw(2, *shape, dtype=dtype)
        return self.kept

    def share(self, room: Tensor) -> None:
        pass


@dataclass(frozen=True)
class FirstOfTwo(Sequence):
    """What the first of two ranks computes, with nobody to wait for."""

    shelf: Shelf = field(default_factory=lambda: OneShelf(ALONE))

    def span(self, length: int) -> tuple[int, int]:
        return span(length, 2, 0)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        start, stop = self.span(x.shape[dim])
        return x.narrow(dim, start, stop - start)

    def exchange(self, size: Size) -> Exchange:
        return Gathering(size, 0, self.shelf, Beside())

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        return torch.cat([x, x], dim).narrow(dim, 0, length)


def network() -> DiT:
    """Random weights, drawn on the device; quantised nowhere."""
    if not SMALL:
        return weights.load_dit(resolve("soulx-14b", None, random=True), DEVICE, BF16, random=True)
    with torch.device("meta"):
        dit = DiT(DIT)
    weights.fill_random(dit, DEVICE, BF16, seed=0)
    dit.arrange(False)
    return dit.eval()


@contextlib.contextmanager
def plainly(*, ops: bool = False, apart: bool = False) -> Iterator[None]:
    """Without fused kernels, or with q, k, v one by one."""
    with contextlib.ExitStack() as stack:
        if ops:
            stack.enter_context(mock.patch.object(dit_module, "token_ops", return_value=PLAIN))
        if apart:
            each = mock.patch.object(dit_module, "linear_together", lambda x, *layers: [f(x) for f in layers])
            stack.enter_context(each)
        yield


@torch.no_grad()
def main() -> int:
    report = Report("dit")
    begun_s = time.perf_counter()
    dit = network()
    if ON_GPU:
        torch.cuda.synchronize()
    report.add("random weights", seconds=time.perf_counter() - begun_s, **{"blocks": len(dit.blocks)})
    dit.kernel = choose_kernel("auto", DEVICE, BF16)
    report.add("attention", kernel=dit.kernel.name, sizes=str(asdict(DIT)["dim"]))
    context = dit.condition(draw(8, DIT.text_dim), draw(1, 257, DIT.image_dim))
    frames = 1 + 4 * (LATENTS - 1)
    windows = draw(1, frames, DIT.audio_window, DIT.audio_layers, DIT.audio_dim)
    heard = dit.hear(windows)
    x, y = (draw(1, channels, LATENTS, H, W, dtype=torch.float32) for channels in (16, 20))
    t = torch.full((1,), 750.0, device=DEVICE)
    exact: list[Tensor] = []

    def step(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t, y, context, heard, UNDIVIDED)

    def timed(name: str, run: Step = step) -> None:
        out = run(x, t)
        exact.append(out.clone())
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(lambda: run(x, t), repeats=3, warm=1)
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
        report.add(name, step_ms=ms, difference=difference(out, exact[0]), peak_gib=peak_gib)

    def traced(name: str, run: Step = step) -> None:
        events = trace(name, lambda: run(x, t))
        report.add(name, kernels=sum(n for _, n, _ in events), device_ms=sum(ms for *_, ms in events))

    def without(**what: bool) -> Callable[[str], None]:
        def measure(name: str) -> None:
            with plainly(**what):
                timed(name)

        return measure

    def with_kernel(kernel_name: str) -> Callable[[str], None]:
        def measure(name: str) -> None:
            with mock.patch.object(dit, "kernel", choose_kernel(kernel_name, DEVICE, BF16)):
                timed(name)

        return measure

    def recorded(name: str) -> None:
        graphs = Graphs()
        timed(name, lambda x, t: graphs("step", dit, step, x, t))
        report.add("recorded", works=graphs.works)

    def eight_bits(name: str) -> None:
        nonlocal heard
        dit.arrange(True)
        heard = dit.fold(dit.hear(windows), (0, LATENTS * H * W // 4), H * W // 4)
        if ON_GPU:
            torch.cuda.empty_cache()
        timed(name)
        traced(name + ", trace")

    def attention_in_eight_bits(name: str) -> None:
        if (reason := why_absent("fa3-fp8", DEVICE, BF16)) is not None:
            report.add(name, absent=reason)
            return
        with mock.patch.object(dit, "kernel", choose_kernel("fa3-fp8", DEVICE, BF16)):
            timed(name)
            traced(name + ", trace")
            first = FirstOfTwo()
            half = dit.fold(dit.hear(windows), first.span(LATENTS * H * W // 4), H * W // 4)

            def of_two(x: Tensor, t: Tensor) -> Tensor:
                return dit(x, t, y, context, half, first)

            ms = milliseconds(lambda: of_two(x, t), repeats=5)
            report.add(name + ", what each of two has", step_ms=ms)
            traced(name + ", what each of two has, trace", of_two)

    others = [k for k in KERNEL_NAMES if k != dit.kernel.name and why_absent(k, DEVICE, BF16) is None]
    parts: list[tuple[str, Callable[[str], None]]] = [
        ("as it is, bf16", timed),
        ("as it is, bf16, trace", traced),
        ("in a CUDA graph", recorded) if ON_GPU else ("plain, no graph", timed),
        *((f"with attention {k}", with_kernel(k)) for k in others if k != SDPA.name or len(others) == 1),
        ("q, k, v apart", without(apart=True)),
        ("without fused kernels", without(ops=True)),
        ("fp8", eight_bits),
        ("fp8, attention too", attention_in_eight_bits),
    ]
    for name, measure in parts:
        report.trying(name, lambda name=name, measure=measure: measure(name))  # type: ignore[misc]
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())

"""The VAE at its full size with random weights: traces, time by layer, pieces of several latents."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from measure import (
    BF16,
    DEVICE,
    LATENTS,
    ON_GPU,
    SMALL,
    VAE,
    H,
    Report,
    W,
    difference,
    draw,
    milliseconds,
    trace,
)
from torch import Tensor, nn

from flashtalk_cli.models import vae_blocks, weights
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.models.vae import Vae

KNOWN = 1 if SMALL else 2  # latents that a chunk takes over from the one before


def network() -> Vae:
    """Random weights, drawn on the device."""
    if not SMALL:
        return weights.load_vae(resolve("soulx-14b", None, random=True), DEVICE, BF16, random=True)
    with torch.device("meta"):
        vae = Vae(VAE)
    weights.fill_random(vae, DEVICE, BF16, seed=0)
    return vae.eval()


@contextmanager
def layers_timed(vae: Vae, found: dict[str, float]) -> Iterator[None]:
    """Adds to `found` the milliseconds of each layer of the decoder, the head excepted."""
    layers: list[nn.Module] = [vae.decoder.conv1, *vae.decoder.middle, *vae.decoder.upsamples]
    spans, handles = [], []
    for index, layer in enumerate(layers):
        name = f"{index:2} {type(layer).__name__}"

        def begin(module: nn.Module, args: object, name: str = name) -> None:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            spans.append((name, begun, ended))

        def end(module: nn.Module, args: object, out: object) -> None:
            spans[-1][2].record()

        handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    yield
    torch.cuda.synchronize()
    for name, begun, ended in spans:
        found[name] = found.get(name, 0.0) + begun.elapsed_time(ended)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def main() -> int:
    report = Report("vae")
    vae = network()
    latents = draw(1, 16, LATENTS, H, W, dtype=torch.float32)
    exact: list[Tensor] = []
    _, primed = vae.decode(latents[:, :, :KNOWN])
    new = latents[:, :, KNOWN:]

    def timed(name: str, latents_at_once: int = 1) -> None:
        def run() -> Tensor:
            return vae.decode(new, primed, latents_at_once=latents_at_once)[0]

        exact.append(run())
        error = difference(exact[-1], exact[0])
        del exact[1:]
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(run, repeats=3, warm=1)
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
        report.add(name, decode_ms=ms, latents=new.shape[2], difference=error, peak_gib=peak_gib)

    def traced(name: str) -> None:
        events = trace(name, lambda: vae.decode(new[:, :, :1], primed))
        report.add(name, kernels=sum(n for _, n, _ in events), device_ms=sum(ms for *_, ms in events))

    def by_layer(name: str) -> None:
        found: dict[str, float] = {}
        vae.decode(new[:, :, :1], primed)
        with layers_timed(vae, found):
            vae.decode(new[:, :, :1], primed)
        report.add(name, **found)

    def plainly(name: str) -> None:
        with mock.patch.object(vae_blocks, "fused", return_value=False):
            timed(name)

    def tuned(name: str) -> None:
        torch.backends.cudnn.benchmark = True
        timed(name)
        traced(name + ", trace")
        by_layer(name + ", by layer") if ON_GPU else None
        timed(name + ", all latents at once", new.shape[2])
        torch.backends.cudnn.benchmark = False

    def encode(name: str) -> None:
        video = draw(1, 3, 5, 8 * H, 8 * W, dtype=torch.float32)
        report.add(name, encode_ms=milliseconds(lambda: vae.encode(video), repeats=3, warm=1))
        trace(name, lambda: vae.encode(video), rows=25)

    parts: list[tuple[str, Callable[[str], None]]] = [
        ("one latent at a time", timed),
        ("one latent, trace", traced),
        *([("one latent, by layer", by_layer)] if ON_GPU else []),
        ("three at once", lambda name: timed(name, 3)),
        ("all latents at once", lambda name: timed(name, new.shape[2])),
        ("cudnn.benchmark", tuned),
        ("encode 5 frames", encode),
        ("without fused passes", plainly),
    ]
    for name, measure in parts:
        report.trying(name, lambda name=name, measure=measure: measure(name))  # type: ignore[misc]
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())

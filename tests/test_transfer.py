"""Another speech encoder for a trained motion network: the layers that read it give what they gave (property), and the
model that is written is whole (contract)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_components import ToneBank

from flashtalk_cli.distill.components import speech, transfer
from flashtalk_cli.errors import InputError
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.verify import verify_folder


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), n_frames=st.integers(1, 4), bigger=st.integers(0, 3))
def test_an_encoder_that_hears_the_same_is_read_the_same(seed: int, n_frames: int, bigger: int) -> None:
    """Property: features that are mixed, shifted and spread over more numbers make no difference to what is read of
    windows that were not seen."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    layer = transfer.Layer(n_frames, draw(5, n_frames * 6), draw(5))
    mix, shift = torch.linalg.qr(draw(6 + bigger, 6 + bigger))[0][:6], draw(6 + bigger)

    def new_of(old: torch.Tensor) -> torch.Tensor:
        return (old.flatten(2) @ mix + shift).unflatten(2, (1, -1))

    for _ in range(3):
        old = draw(4, 40, 2, 3)
        layer.see(old, new_of(old))
    weight, bias = layer.fitted()
    asked = draw(2, 20, 2, 3)
    was = layer.gives(asked)
    off = transfer.rows(new_of(asked), n_frames) @ weight.T + bias - was
    assert off.square().mean().sqrt() < 0.01 * was.std()


def test_rows_are_the_windows_of_the_network() -> None:
    """Parity: five frames in a row as the audio projector flattens a window of five."""
    features = torch.arange(2 * 7 * 3 * 4, dtype=torch.float32).view(2, 7, 3, 4)
    assert torch.equal(transfer.rows(features, 5)[1], features[0, 1:6].flatten())
    assert transfer.rows(features, 5).shape == (2 * 3, 5 * 3 * 4)


def test_a_model_is_written_whole_with_its_new_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract: it verifies, only what reads sound is changed, and a folder that is there is left alone."""

    class Bank(ToneBank):
        def keep(self, wanted: Any) -> None:
            assert wanted("espeak:en:1.00:1.00")
            assert not wanted("kokoro:af_sky:1.00:1.00")

    monkeypatch.setattr(transfer, "SpeechBank", lambda *_: Bank())
    before = tiny_model.write(tmp_path / "model")["dit"]
    speech.save_weights(speech.build_trainable(speech.MINI, 0), tmp_path / "speech.safetensors")
    paths = (tmp_path / "bank", str(tmp_path / "model"), tmp_path / "speech.safetensors", tmp_path / "out")
    kept = transfer.write(*paths, windows=4, engines=("espeak", "flite"))
    assert set(kept) == {"audio_proj.proj1", "audio_proj.proj1_vf"}
    out = find(str(tmp_path / "out"))
    assert [report.problem for report in verify_folder(out)] == [""] * 5
    assert out.config()["audio_dim"] == 192
    after = load_file(out.files("dit")[0])
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.{part}" for name in kept for part in ("weight", "bias")}
    with pytest.raises(InputError, match="is there already"):
        transfer.write(*paths, windows=4)

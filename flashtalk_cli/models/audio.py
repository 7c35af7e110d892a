"""From speech features to the audio tokens of each latent frame.

Every video frame comes with a window of speech features around it. A latent frame stands for
one video frame (the first) or for `vae_scale` of them (each other), so its tokens are made of
one whole window, or of the parts of several windows that belong to it: with the released
sizes, a window of 5 and 4 frames, the first frame gives the first 3 of its window, the two
in the middle give their centre, and the last gives its last 3, which are 8 in all.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class AudioProjector(nn.Module):
    """Speech windows -> `context_tokens` tokens of `output_dim` for every latent frame."""

    def __init__(
        self,
        *,
        audio_window: int,
        vae_scale: int,
        audio_layers: int,
        audio_dim: int,
        intermediate_dim: int,
        output_dim: int,
        context_tokens: int,
    ) -> None:
        super().__init__()
        self.vae_scale = vae_scale
        self.centre = audio_window // 2
        self.context_tokens = context_tokens
        features = audio_layers * audio_dim
        self.proj1 = nn.Linear(audio_window * features, intermediate_dim)
        self.proj1_vf = nn.Linear((audio_window + vae_scale - 1) * features, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, context_tokens * output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def forward(self, windows: Tensor) -> Tensor:
        """[B, F, audio_window, audio_layers, audio_dim] -> [B, 1 + (F - 1) / vae_scale, tokens, output_dim]."""
        first = self.proj1(rearrange(windows[:, :1], "b f w l d -> b f (w l d)"))
        later = self.proj1_vf(self._belonging(windows[:, 1:]))
        hidden = F.relu(torch.cat([first, later], dim=1))
        hidden = F.relu(self.proj2(hidden))
        tokens = rearrange(self.proj3(hidden), "b t (n c) -> b t n c", n=self.context_tokens)
        return self.norm(tokens)

    def _belonging(self, windows: Tensor) -> Tensor:
        """What each group of `vae_scale` frames hears: [B, F, w, l, d] -> [B, F / vae_scale, features]."""
        groups = rearrange(windows, "b (t s) w l d -> b t s w l d", s=self.vae_scale)
        first = groups[:, :, 0, : self.centre + 1]
        middle = groups[:, :, 1:-1, self.centre]
        last = groups[:, :, -1, self.centre :]
        return rearrange(torch.cat([first, middle, last], dim=2), "b t w l d -> b t (w l d)")

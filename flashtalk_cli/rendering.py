"""One clip, from its job to its file, on one of the ranks that make it together.

All ranks make the video together, a tile of it each; rank 0 encodes picture, prompt and sound for all
(one copy of the encoders, and what they give is small), writes the file and reports.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashtalk_cli import __version__
from flashtalk_cli.config import VAE_STRIDE_PX, ClipJob, PictureJob, PresetJob, RenderJob, Sampling
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, DeviceError
from flashtalk_cli.events import Emitter
from flashtalk_cli.media.audio import read_samples
from flashtalk_cli.media.image import load_picture
from flashtalk_cli.media.loudness import gain_to
from flashtalk_cli.media.video_file import VideoFile
from flashtalk_cli.models import fp8, weights
from flashtalk_cli.models.attention import choose_kernel
from flashtalk_cli.models.device import choose_dtype
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.models.image import ImageEncoder
from flashtalk_cli.models.speech import SpeechEncoder
from flashtalk_cli.parallel.beside import Beside
from flashtalk_cli.parallel.mesh import kernels_of, make_mesh
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.split import Split, split
from flashtalk_cli.pipeline import chunks
from flashtalk_cli.pipeline.cores import free_cores
from flashtalk_cli.pipeline.delivery import Delivery
from flashtalk_cli.pipeline.marks import Mark, unmarked
from flashtalk_cli.pipeline.session import Conditions, Models, prepare, talk, to_bytes
from flashtalk_cli.pipeline.streams import Graphs


class Worker:
    """What all parts of a job need: the job, the model's folder, the ranks, the device, and a way to report."""

    def __init__(self, job: PresetJob, ranks: Ranks, emitter: Emitter) -> None:
        self.job = job
        self.preset = job.preset
        self.ranks = ranks
        self.emitter = emitter
        self.random = job.preset.model.weights == "random"
        self.device = ranks.device
        self.offload = job.preset.compute.offload
        if self.offload and self.device.type != "cuda":
            raise DeviceError("--offload saves memory of a GPU and this run uses the CPU: leave it out")
        choice = job.preset.model
        self.folder = resolve(choice.name, choice.speech_encoder, random=self.random)
        if not self.random and (notice := self.folder.config().get("_notice")):
            emitter.emit("warning", message=notice)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Picture [3, H, W] in [-1, 1], text rows, picture tokens: on the CPU, the same on every rank."""
        return self.ranks.from_leader(self._encode_inputs() if self.ranks.leads else None)

    def _encode_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, made here."""
        self.emitter.emit("stage", name="encode", detail="picture and prompt")
        assert isinstance(self.job, PictureJob)
        rows = self.encode_prompt(self.preset.sampling.prompt)
        picture, tokens = self.encode_picture(self.job.picture)
        return picture, rows, tokens

    def encode_prompt(self, prompt: str) -> Tensor:
        """Rows of a prompt, on the CPU. The encoder is loaded for it and freed again."""
        return self.encode_prompts([prompt])[prompt]

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rows of each prompt, on the CPU. The encoder is loaded once, and freed again."""
        text = weights.load_text_encoder(self.folder, self.device, self._encoder_dtype, random=self.random)
        return {prompt: text.encode(prompt).cpu() for prompt in prompts}

    def encode_picture(self, path: Path) -> tuple[Tensor, Tensor]:
        """A picture [3, H, W] in [-1, 1] and its tokens, on the CPU."""
        pixels = torch.tensor(load_picture(path, self.preset.canvas))
        picture = pixels.permute(2, 0, 1).float() / 127.5 - 1
        return picture, self.image_encoder().encode(picture).cpu()

    def image_encoder(self) -> ImageEncoder:
        """Made anew; freed when the caller lets it go."""
        return weights.load_image_encoder(self.folder, self.device, self._encoder_dtype, random=self.random)

    def speech_encoder(self) -> SpeechEncoder:
        """Made anew."""
        encoder = weights.load_speech_encoder(self.folder, self.device, torch.float32, random=self.random)
        if self.device.type == "cuda" and not self.offload:  # a recording keeps its memory
            encoder.run = Graphs()  # Python takes longer to launch it than a GPU to compute it
        return encoder

    @property
    def _encoder_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def load_models(self) -> Models:
        """The networks that run in every chunk."""
        self.emitter.emit("stage", name="weights", detail=f"{self.folder.path} on {self.device}")
        precision, options = self.preset.precision, {"random": self.random}
        dit_dtype, vae_dtype = (choose_dtype(name, self.device) for name in (precision.dit, precision.vae))
        compute = self.preset.compute
        split = self.split()
        kernel = choose_kernel(compute.attention, self.device, dit_dtype, kernels_of(split, compute.engine))
        mesh = make_mesh(self.ranks, split, compute.engine, kernel.name)
        eight_bits = precision.dit == "fp8"
        if eight_bits:
            fp8.check_device(self.device)
        dit = weights.load_dit(
            self.folder,
            self.device,
            dit_dtype,
            kernel=kernel,
            offload=self.offload,
            eight_bits=eight_bits,
            **options,
        )
        models = Models(
            dit=dit,
            vae=weights.load_vae(self.folder, self.device, vae_dtype, **options),
            sampling=self.preset.sampling,
            device=self.device,
            sequence=mesh.sequence,
            tiles=mesh.tiles,
            # Several ranks exchange in both: in one order, so in one stream.
            beside=Beside(self.device if self.ranks.size == 1 else None),
            graphs=self._graphs(compute.engine),
            cores=free_cores(self.device),
        )
        # The libraries' objects live as long as this process. To walk all of them, as Python's collector of
        # garbage does now and then, would hold up a chunk by 0.2 s.
        gc.collect()
        gc.freeze()
        return models

    def _graphs(self, engine: str) -> Graphs | None:
        """What records steps; None where that cannot be: blocks that are moved about, another library's exchanges."""
        if self.device.type != "cuda" or self.offload or (self.ranks.size > 1 and engine != "torch"):
            return None
        graphs = Graphs(self.ranks.traffic.count, self.ranks.any) if self.ranks.size > 1 else Graphs()
        self.ranks.before_leaving.append(graphs.clear)
        return graphs

    def split(self) -> Split:
        """How this preset's video is spread over the ranks."""
        compute, canvas = self.preset.compute, self.preset.canvas
        latents = (canvas.height_px // VAE_STRIDE_PX, canvas.width_px // VAE_STRIDE_PX)
        return split(self.ranks.size, self.folder.heads(random=self.random), *latents, compute.ulysses)

    def hearing(self, mark: Mark = unmarked) -> Callable[[int], Tensor]:
        """A function from a chunk's index to what it hears: windows [1, frames, 5, layers, dim].

        Rank 0 encodes, and the others get its rows: less than 2 MB a chunk. `mark` is called when they are there.
        """
        sampling, hearing = self.preset.sampling, self.preset.hearing
        encode = self._speech_features(mark) if self.ranks.leads else None

        def windows(index: int) -> Tensor:
            if index:
                self.ranks.pulse.round()  # whoever asks for a chunk has finished the one before
            heard = chunks.heard_by(index, sampling, hearing)
            features = self.ranks.from_leader(encode(heard) if encode else None)
            return chunks.windows(features, heard, sampling.chunk_frames)

        return windows

    def _speech_features(self, mark: Mark) -> Callable[[chunks.Heard], Tensor]:
        """A function from what is heard to its feature rows [n_frames, layers, dim]."""
        assert isinstance(self.job, ClipJob)
        speech = self.job.speech
        encoder = self.speech_encoder()
        # Rows for other ranks are wanted on the host, which need not wait for what the GPU still does for the chunk
        # before: its own stream has nothing of that to wait for.
        several = self.ranks.size > 1 and self.device.type == "cuda"
        apart = torch.cuda.Stream(self.device) if several else None
        if apart is not None:
            # Once: the encoder's weights are being made.
            apart.wait_stream(torch.cuda.current_stream(self.device))
        gain = gain_to(speech.loudness_lufs, self.preset.hearing.loudness_lufs)

        def features(heard: chunks.Heard) -> Tensor:
            samples = read_samples(speech, heard.start_sample, heard.stop_sample) * np.float32(gain)
            with torch.cuda.stream(apart):
                if apart is not None:
                    mark("")
                rows = encoder.encode(torch.from_numpy(samples), heard.n_frames)
                mark("speech")
                return rows if self.ranks.size == 1 else rows.cpu()

        return features

    def comment(self) -> str:
        """What the file says of itself: that it shows nobody who spoke, and how it was made."""
        untrained = ", random weights" if self.random else ""
        return (
            f"Synthetic media: generated by flashtalk {__version__}, preset {self.preset.name}, "
            f"model {self.preset.model.name}{untrained}, seed {self.preset.sampling.seed}"
        )


def render(worker: Worker, job: RenderJob, stop: threading.Event, stdout: int) -> int:
    """Render the job's video; the exit code."""
    worker.ranks.pulse.anew()
    picture, text, image = worker.inputs()
    models = worker.load_models()
    hear = worker.hearing()
    pieces = make_frames(worker, models, prepare(models, picture, text, image), hear, job.n_frames, stop)
    if worker.ranks.leads:
        return write(worker, job, pieces, stdout, stop)
    assert not list(pieces), "frames go to rank 0"
    return 0


def make_frames(
    worker: Worker,
    models: Models,
    conditions: Conditions,
    hear: Callable[[int], Tensor],
    n_frames: int,
    stop: threading.Event,
) -> Iterator[Tensor]:
    """The first n_frames frames, uint8 [T, H, W, 3] in host memory a piece, as they decode; on rank 0 alone.

    Ends early, on all ranks after the same piece, once any of them was asked to stop.
    """
    left = n_frames
    delivery = Delivery(worker.device)
    for video in talk(models, conditions, hear, chunks.count(n_frames, models.sampling)):
        if worker.ranks.any(stop.is_set()):
            break
        ready = delivery.push(models.tiles.collect(to_bytes(video[:, :, :left])))
        left -= min(left, video.shape[2])
        if ready is not None:
            with worker.ranks.pulse.resting():  # who takes them may be slow
                yield ready
        if not left:
            break
    last = delivery.flush()
    if last is not None:
        with worker.ranks.pulse.resting():
            yield last


def write(
    worker: Worker, job: RenderJob, pieces: Iterator[Tensor], stdout: int, stop: threading.Event
) -> int:
    """Write frames to the job's file as they come; the exit code."""
    canvas, sampling = job.preset.canvas, job.preset.sampling
    video_file = VideoFile(
        job.output,
        width_px=canvas.width_px,
        height_px=canvas.height_px,
        fps=sampling.fps,
        n_frames=job.n_frames,
        audio=job.audio,
        encoding=job.preset.encoding,
        comment=worker.comment(),
        overwrite=job.overwrite,
        stdout=stdout,
        stop=stop,
    )
    worker.emitter.emit("stage", name="render", detail=f"{job.n_frames} frames")
    started_s = time.perf_counter()
    with video_file as file:
        progress = Progress(worker.emitter, job.n_frames, sampling, started_s)
        for frames in pieces:
            file.write(frames.numpy())
            progress.report(file.frames_written)
        whole = file.frames_written == job.n_frames
        with worker.ranks.pulse.resting():  # the other ranks may wait for the next clip already
            path = file.finish() if whole else file.abort()
        if not whole:
            worker.emitter.emit("interrupted", path=path, frames=file.frames_written)
            return INTERRUPTED_EXIT_CODE
    worker.emitter.emit(
        "done",
        path=path,
        frames=job.n_frames,
        duration_s=job.n_frames / sampling.fps,
        elapsed_s=time.perf_counter() - started_s,
    )
    return 0


class Progress:
    """Reports each chunk once, when its last frame is written."""

    def __init__(self, emitter: Emitter, n_frames: int, sampling: Sampling, started_s: float) -> None:
        self.emitter = emitter
        self.n_frames = n_frames
        self.sampling = sampling
        self.started_s = started_s

    def report(self, frames_done: int) -> None:
        """Say how far it is, if a chunk has just ended."""
        if frames_done % self.sampling.new_frames and frames_done < self.n_frames:
            return
        elapsed_s = time.perf_counter() - self.started_s
        fps = frames_done / elapsed_s
        self.emitter.emit(
            "chunk",
            index=(frames_done - 1) // self.sampling.new_frames,
            chunks=chunks.count(self.n_frames, self.sampling),
            frames_done=frames_done,
            frames_total=self.n_frames,
            fps=fps,
            realtime=fps / self.sampling.fps,
            elapsed_s=elapsed_s,
            eta_s=(self.n_frames - frames_done) / fps,
        )

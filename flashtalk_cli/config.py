"""What a run is, as frozen values: presets, and the jobs that commands hand to workers.

A default lives here or in a preset file, never in both and never in a function's
signature further down. Derived sizes are properties, so nobody computes them twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SAMPLE_RATE_HZ = 16_000  # what wav2vec2 hears
VAE_STRIDE_PX = 8  # latent pixels are 8 x 8 picture pixels
VAE_STRIDE_FRAMES = 4  # a latent frame is 4 frames, the first one excepted
LEAST_PX, MOST_PX = 64, 4096  # sides of a picture
PATCH_PX = 16  # VAE stride times the DiT's 2 x 2 patch: a side must divide by it

DEFAULT_PROMPT = (
    "A person is talking. Only the foreground characters are moving, the background remains static."
)


class Frozen(BaseModel):
    """Immutable, strict, finite and closed: an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


class ModelChoice(Frozen):
    """Which weights, and where the speech encoder lies when it is not inside the model folder."""

    name: str = "mini"
    speech_encoder: str | None = None
    weights: Literal["released", "random"] = "released"


class Canvas(Frozen):
    """The picture that is rendered, in pixels."""

    width_px: int = Field(448, ge=LEAST_PX, le=MOST_PX)
    height_px: int = Field(768, ge=LEAST_PX, le=MOST_PX)
    fit: Literal["crop", "pad"] = "crop"
    background: str = Field("#808080", pattern=r"^#[0-9a-fA-F]{6}$", description="#RRGGBB, such as #336699")

    @field_validator("width_px", "height_px")
    @classmethod
    def _divides_by_patch(cls, side_px: int) -> int:
        if side_px % PATCH_PX:
            raise ValueError(f"{side_px} does not divide by {PATCH_PX}")
        return side_px

    @property
    def area_px(self) -> int:
        """Pixels in a frame."""
        return self.width_px * self.height_px

    def of_aspect(self, width_px: int, height_px: int) -> Canvas:
        """A canvas of about this one's area whose aspect ratio is nearest to the given picture's."""
        ratio = max(0.25, min(4.0, width_px / height_px))
        ideal_width_px = min((self.area_px * ratio) ** 0.5, MOST_PX, MOST_PX * ratio)

        def snap(side_px: float) -> int:
            return min(MOST_PX, max(LEAST_PX, PATCH_PX * round(side_px / PATCH_PX)))

        width = snap(ideal_width_px)
        return self.model_copy(update={"width_px": width, "height_px": snap(width / ratio)})


class Sampling(Frozen):
    """How frames are drawn. The defaults are the released model's."""

    steps: int = Field(4, ge=1, le=1000)
    shift: float = Field(5.0, gt=0)
    seed: int = Field(42, ge=0, lt=2**63)
    prompt: str = DEFAULT_PROMPT
    fps: int = Field(25, ge=1, le=60)
    chunk_frames: int = Field(33, ge=5)
    motion_frames: int = Field(5, ge=1)
    colour_strength: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _whole_latents(self) -> Sampling:
        for name in ("chunk_frames", "motion_frames"):
            frames = getattr(self, name)
            if (frames - 1) % VAE_STRIDE_FRAMES:
                raise ValueError(f"{name} {frames} is not 1 + a multiple of {VAE_STRIDE_FRAMES}")
        if self.motion_frames >= self.chunk_frames:
            raise ValueError(f"motion_frames {self.motion_frames} leaves no new frame of {self.chunk_frames}")
        if SAMPLE_RATE_HZ % self.fps:
            raise ValueError(f"fps {self.fps} does not divide the sample rate {SAMPLE_RATE_HZ}")
        return self

    @property
    def new_frames(self) -> int:
        """Frames a chunk adds to the video."""
        return self.chunk_frames - self.motion_frames

    @property
    def chunk_latents(self) -> int:
        """Latent frames of a chunk."""
        return 1 + (self.chunk_frames - 1) // VAE_STRIDE_FRAMES

    @property
    def samples_per_frame(self) -> int:
        """Audio samples under one video frame."""
        return SAMPLE_RATE_HZ // self.fps

    @property
    def new_s(self) -> float:
        """Seconds of video a chunk adds."""
        return self.new_frames / self.fps


class Hearing(Frozen):
    """What the model hears of the sound around a chunk."""

    context_s: float = Field(8.0, ge=2, le=60)
    lookahead_s: float = Field(0.4, ge=0, le=4)
    loudness_lufs: float = Field(-23.0, ge=-70, le=0)


class Precision(Frozen):
    """Number formats of the two heavy networks; `auto`: bfloat16 where the machine is faster with it.

    fp8: the DiT's large matrix products in e4m3, the rest of it in bfloat16.
    """

    dit: Literal["auto", "float32", "bfloat16", "fp8"] = "bfloat16"
    vae: Literal["auto", "float32", "bfloat16"] = "bfloat16"


class Compute(Frozen):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "fa3", "fa3-fp8", "flash", "cudnn", "sdpa"] = "auto"
    gpus: Annotated[int, Field(ge=1, le=1024)] | Literal["all"] = 1  # with device cpu: processes
    ulysses: int | None = Field(None, ge=1)  # GPUs that share attention heads; None: see parallel/split.py
    engine: Literal["torch", "xfuser"] = "torch"  # whose exchanges self-attention uses on several GPUs
    offload: bool = False  # keep the DiT's blocks in host memory, and copy each to the GPU when it is needed


class Encoding(Frozen):
    """How the video file is written."""

    codec: str = "auto"
    crf: int = Field(18, ge=0, le=63)


class Live(Frozen):
    """How a live stream is paced: see live/pacing.py."""

    latency_target_s: float = Field(3.0, ge=0.2, le=60)  # delay that a pause in the speech is shortened for
    start_buffer_s: float = Field(0.2, ge=0.04, le=10)  # video held in reserve
    lookahead_s: float = Field(0.2, ge=0, le=4)  # sound waited for beyond a chunk; a file's is there anyway
    backlog_s: float = Field(30.0, ge=5, le=600)  # sound kept that is not yet spoken
    late: Literal["repeat", "drop", "fail"] = "repeat"
    away: Literal["go-on", "pause"] = "go-on"  # what the person does while no server takes the stream


class Preset(Frozen):
    """Everything about a run except its inputs and outputs: one YAML file under `presets/`."""

    name: str
    description: str
    model: ModelChoice = ModelChoice()
    canvas: Canvas = Canvas()
    sampling: Sampling = Sampling()
    hearing: Hearing = Hearing()
    precision: Precision = Precision()
    compute: Compute = Compute()
    encoding: Encoding = Encoding()
    live: Live = Live()

    @model_validator(mode="after")
    def _hears_its_chunk(self) -> Preset:
        fps, chunk_frames, hearing = self.sampling.fps, self.sampling.chunk_frames, self.hearing
        if round(hearing.context_s * fps) < chunk_frames + round(hearing.lookahead_s * fps):
            needed_s = chunk_frames / fps + hearing.lookahead_s
            raise ValueError(
                f"hearing.context_s {hearing.context_s:g} is shorter than a chunk and its look-ahead, {needed_s:g} s"
            )
        return self


class Speech(Frozen):
    """A sound made ready for the model: 16 kHz mono float32 samples, raw in a file, and what was measured."""

    samples_path: Path
    n_samples: int = Field(ge=1)
    loudness_lufs: float | None  # None: silence, or too short to measure; then no gain is applied

    @property
    def duration_s(self) -> float:
        """Length of the sound."""
        return self.n_samples / SAMPLE_RATE_HZ


class PresetJob(Frozen):
    """What every job is given."""

    preset: Preset


class PictureJob(PresetJob):
    """A job of one picture. Paths are absolute."""

    picture: Path


class ClipJob(PictureJob):
    """A job whose sound is known from beginning to end."""

    speech: Speech


class RenderJob(ClipJob):
    """One video to render. Written as JSON for the worker."""

    kind: Literal["render"] = "render"
    audio: Path  # what the video's sound is copied from
    output: Path | None  # None: standard output
    overwrite: bool = False

    @property
    def n_frames(self) -> int:
        """Frames of the video: as long as the sound, rounded up to a whole frame."""
        return -(-self.speech.n_samples // self.preset.sampling.samples_per_frame)


class BenchJob(ClipJob):
    """Time chunks of a video that nobody sees."""

    kind: Literal["bench"] = "bench"
    launched_unix_s: float = 0.0  # when the worker was asked for
    chunks: int = Field(20, ge=1)
    warmup_chunks: int = Field(2, ge=0)


class ServeJob(PresetJob):
    """Clips one after another with networks loaded once: RenderJobs, a line of JSON each, on standard input."""

    kind: Literal["serve"] = "serve"
    prompts: tuple[str, ...]  # of all clips: the text encoder is loaded for them together


class PcmFormat(Frozen):
    """Raw samples as they arrive: `s16le:16000:1` on the command line."""

    encoding: Literal["s16le", "s16be", "s32le", "f32le", "u8"] = "s16le"
    rate_hz: int = Field(16_000, ge=8_000, le=192_000)
    channels: int = Field(1, ge=1, le=8)


class SoundSource(Frozen):
    """Where a live stream's sound comes from."""

    kind: Literal["file", "stdin", "microphone", "url", "listen"]
    where: str = ""  # a path, a device ("": the default one), a URL, HOST:PORT
    pcm: PcmFormat = PcmFormat()  # of stdin and listen
    loop: bool = False  # of a file: from the beginning again, without end
    start_s: float = Field(0.0, ge=0)  # of a file: where to begin
    token: str | None = None  # of listen: what a client must show


class StreamJob(PictureJob):
    """A live stream."""

    kind: Literal["stream"] = "stream"
    source: SoundSource
    targets: tuple[tuple[str, str], ...] = Field(min_length=1)  # kind and place, as media/live reads them
    overwrite: bool = False
    keep_alive: bool = False  # idle after the sound has ended
    restarts: int = Field(0, ge=0)  # how often it was started again after its worker died
    control: Path  # a Unix socket to make
    metrics: str | None = None  # HOST:PORT
    preview: str | None = None  # HOST:PORT


Job = Annotated[RenderJob | BenchJob | ServeJob | StreamJob, Field(discriminator="kind")]

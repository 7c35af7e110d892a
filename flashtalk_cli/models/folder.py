"""Model folders: where they are, what the released layout holds, fetching and checking them.

    MODEL/config.json                               sizes of the DiT, and ours of what shapes cannot tell
    MODEL/diffusion_pytorch_model*.safetensors      DiT (with an .index.json when in shards)
    MODEL/Wan2.1_VAE.pth                            video VAE
    MODEL/models_t5_umt5-xxl-enc-bf16.pth           text encoder
    MODEL/google/umt5-xxl/                          its tokenizer
    MODEL/models_clip_open-clip-...-huge-14.pth     image encoder
    chinese-wav2vec2-base/                          speech encoder: in MODEL, beside it, or in the home folder

That is what `Soul-AILab/SoulX-FlashTalk-14B` and `TencentGameMate/chinese-wav2vec2-base` are on the
Hugging Face Hub. A .pth may be a .safetensors of the same stem instead, which the embedded model uses.
A model is named by path or by name; named ones lie in the home folder, FLASHTALK_HOME.

No torch here: the command line asks for models before any is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flashtalk_cli.errors import ModelError

Component = Literal["dit", "vae", "text", "image", "speech"]
COMPONENTS: tuple[Component, ...] = ("dit", "vae", "text", "image", "speech")

CONFIG = "config.json"
DIT_STEM = "diffusion_pytorch_model"
DIT_INDEX = f"{DIT_STEM}.safetensors.index.json"
STEMS: dict[str, str] = {
    "vae": "Wan2.1_VAE",
    "text": "models_t5_umt5-xxl-enc-bf16",
    "image": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}
TOKENIZER = "google/umt5-xxl"
RELEASED_HEADS = 40
SPEECH_FOLDER = "chinese-wav2vec2-base"
SPEECH_FILES = ("model.safetensors", "pytorch_model.bin")

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class KnownModel:
    """A model with a name: part of this package, or on the Hub."""

    name: str
    repository: str | None  # None: part of this package
    download_bytes: int = 0


KNOWN: dict[str, KnownModel] = {
    known.name: known
    for known in (
        KnownModel("mini", None),
        KnownModel("soulx-14b", "Soul-AILab/SoulX-FlashTalk-14B", download_bytes=55_000_000_000),
    )
}
SPEECH_REPOSITORY = "TencentGameMate/chinese-wav2vec2-base"


def home() -> Path:
    """Where named models lie: FLASHTALK_HOME, or `flashtalk` in the platform's folder for caches."""
    if given := os.environ.get("FLASHTALK_HOME"):
        return Path(given).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flashtalk"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashtalk"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it is absent, broken, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; an object {{...}} was expected")
    return value


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. Nothing says that its files are there: see `missing`."""

    name: str
    path: Path
    speech_path: Path  # the first place that has one, else where it was expected

    @property
    def tokenizer(self) -> Path:
        """Folder of the text encoder's tokenizer."""
        return self.path / TOKENIZER

    def config(self) -> dict[str, Any]:
        """What config.json holds. Raises ModelError when it is absent or broken."""
        return read_json(self.path / CONFIG)

    def heads(self, *, random: bool) -> int:
        """Attention heads of the DiT. Raises ModelError when config.json is needed and does not tell.

        Random weights of the released sizes need no config.json.
        """
        config = {} if random and not (self.path / CONFIG).is_file() else self.config()
        heads = config.get("num_heads", RELEASED_HEADS)
        if not isinstance(heads, int) or heads < 1:
            raise ModelError(f"{self.path / CONFIG}: num_heads is {heads!r} and no count of attention heads")
        return heads

    def files(self, component: Component) -> list[Path]:
        """Files with a component's tensors, in order; empty when there are none.

        Raises ModelError when the index of a sharded DiT is broken; a shard that it names is
        listed though it may be absent.
        """
        if component == "dit":
            return self._dit_files()
        if component == "speech":
            candidates = [self.speech_path / name for name in SPEECH_FILES]
        else:
            candidates = [self.path / f"{STEMS[component]}{suffix}" for suffix in (".safetensors", ".pth")]
        return [path for path in candidates if path.is_file()][:1]

    def _dit_files(self) -> list[Path]:
        index = self.path / DIT_INDEX
        if not index.is_file():
            return sorted(self.path.glob(f"{DIT_STEM}*.safetensors"))
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index} names files outside its folder: {names[0]}")
        return [self.path / name for name in names]

    def missing(self) -> list[str]:
        """What a complete folder would have besides, as names for a message."""
        wanted = [self.path / CONFIG, self.tokenizer]
        absent = [str(path.relative_to(self.path)) for path in wanted if not path.exists()]
        for component in COMPONENTS:
            files = self.files(component)
            absent += [path.name for path in files if not path.is_file()]
            if not files:
                absent.append(self._wanted_name(component))
        if not (self.speech_path / CONFIG).is_file():
            absent.append(f"{self.speech_path.name}/{CONFIG}")
        return absent

    def _wanted_name(self, component: Component) -> str:
        if component == "dit":
            return f"{DIT_STEM}*.safetensors"
        if component == "speech":
            return f"{self.speech_path.name}/{SPEECH_FILES[-1]}"
        return f"{STEMS[component]}.pth"

    def size_bytes(self) -> int:
        """Bytes of the files in the model's folder."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


def find(name_or_path: str | Path, speech_encoder: str | Path | None = None) -> ModelFolder:
    """The folder of a model, complete or not.

    name_or_path: `mini`, `soulx-14b`, the name of a folder in `home()`, or a path.
    speech_encoder: a wav2vec folder, or the name of one in `home()`; None: inside the model's
    folder, beside it, or in `home()`.
    Raises ModelError naming the places where it looked.
    """
    text = str(name_or_path)
    known = KNOWN.get(text)
    if known:
        places = [ASSETS / text] if known.repository is None else [home() / text]
    else:
        places = [Path(text).expanduser().absolute(), home() / text]
    path = next((place for place in places if place.is_dir()), None)
    if path is None and os.path.isfile(places[0]):
        raise ModelError(f"{places[0]} is a file, and a model is a folder; flashtalk models lists those here")
    if path is None:
        looked = " and ".join(str(place) for place in dict.fromkeys(places))
        if known and known.repository:
            mend = f"flashtalk models pull {text} fetches it ({known.download_bytes / 1e9:.0f} GB)"
        elif known:
            mend = "it is part of the package: install flashtalk again"
        else:
            mend = f"known names are {', '.join(KNOWN)}; flashtalk models pull NAME fetches one"
        raise ModelError(f"no model {text!r} (looked at {looked}): {mend}")
    return ModelFolder(path.name if not known else text, path, _speech_path(path, speech_encoder))


def _speech_path(model: Path, given: str | Path | None) -> Path:
    if given is not None:
        places = [Path(given).expanduser().absolute(), home() / str(given)]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise ModelError(f"no speech encoder {str(given)!r} (looked at {places[0]} and {places[1]})")
        return found
    places = [model / SPEECH_FOLDER, model.parent / SPEECH_FOLDER, home() / SPEECH_FOLDER]
    return next((place for place in places if place.is_dir()), places[-1])


def resolve(
    name_or_path: str | Path, speech_encoder: str | Path | None = None, *, random: bool = False
) -> ModelFolder:
    """The folder of a model, with every file there; for random weights it may be incomplete or absent.

    Raises ModelError with where it looked, or what is missing, and how to get it. See `find`.
    """
    if random and str(name_or_path) in KNOWN:
        path = (
            home() / str(name_or_path) if KNOWN[str(name_or_path)].repository else ASSETS / str(name_or_path)
        )
        return ModelFolder(str(name_or_path), path, _speech_path(path, speech_encoder))
    folder = find(name_or_path, speech_encoder)
    if not random and (missing := folder.missing()):
        pull = f"flashtalk models pull {folder.name}" if folder.name in KNOWN else "flashtalk models verify"
        raise ModelError(
            f"the model folder {folder.path} is incomplete, {len(missing)} missing: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}; "
            f"{pull} {'fetches what is missing' if folder.name in KNOWN else 'tells more'}"
        )
    return folder


@dataclass(frozen=True)
class ModelEntry:
    """A line of the list of models."""

    name: str
    source: str  # "packaged", "huggingface.co/...", or "local"
    path: Path
    state: Literal["ready", "incomplete", "absent"]
    size_bytes: int
    missing: list[str] = field(default_factory=list)


def list_models() -> list[ModelEntry]:
    """Known models, present or not, then every other model folder in `home()`."""
    entries = []
    for known in KNOWN.values():
        source = f"huggingface.co/{known.repository}" if known.repository else "packaged"
        path = home() / known.name if known.repository else ASSETS / known.name
        entries.append(_entry(known.name, source, path))
    others = sorted(home().glob(f"*/{CONFIG}")) if home().is_dir() else []
    for config in others:
        folder = config.parent
        if folder.name not in KNOWN and any(folder.glob(f"{DIT_STEM}*.safetensors")):
            entries.append(_entry(folder.name, "local", folder))
    return entries


def _entry(name: str, source: str, path: Path) -> ModelEntry:
    if not path.is_dir() or not any(path.iterdir()):
        return ModelEntry(name, source, path, "absent", 0)
    folder = ModelFolder(name, path, _speech_path(path, None))
    try:
        missing = folder.missing()
    except ModelError as error:
        missing = [str(error)]
    return ModelEntry(name, source, path, "incomplete" if missing else "ready", folder.size_bytes(), missing)


def pull(name: str, progress: type | None = None) -> ModelFolder:
    """Fetch a known model and the speech encoder into `home()`; what is there already is kept.

    An interrupted download goes on where it ended. progress: a class like `tqdm.tqdm` to show it,
    None for the Hub client's own bars on stderr. Raises ModelError for an unknown name, a full
    disk or a network that fails.
    """
    known = KNOWN.get(name)
    pullable = [known.name for known in KNOWN.values() if known.repository]
    if known is None or known.repository is None:
        reason = "is part of the package" if known else "is not a known name"
        raise ModelError(f"{name!r} {reason}; flashtalk models pull fetches: {', '.join(pullable)}")
    target = home() / name
    _check_space(known, target)
    files = [CONFIG, f"{DIT_STEM}*", *(f"{stem}.*" for stem in STEMS.values()), f"{TOKENIZER}/*", "LICENSE*"]
    _snapshot(known.repository, target, files, progress)
    _snapshot(SPEECH_REPOSITORY, home() / SPEECH_FOLDER, [CONFIG, *SPEECH_FILES], progress)
    return resolve(name)


def _check_space(known: KnownModel, target: Path) -> None:
    existing = next(path for path in (target, *target.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    have_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    needed_bytes = known.download_bytes - have_bytes
    if free_bytes < needed_bytes:
        raise ModelError(
            f"{known.name} needs {needed_bytes / 1e9:.0f} GB more in {target}, {free_bytes / 1e9:.0f} GB are "
            "free; set FLASHTALK_HOME to another folder"
        )


def _snapshot(repository: str, target: Path, files: list[str], progress: type | None) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, local_dir=target, allow_patterns=files, tqdm_class=progress)
    except Exception as error:  # the client's, its HTTP library's and the system's: a long and moving list
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ModelError(
            f"cannot fetch {repository} from huggingface.co to {target}: {reason}; "
            "the same command run again goes on where this one ended"
        ) from error

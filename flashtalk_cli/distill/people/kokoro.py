"""Kokoro's voices: a small neural synthesiser (Kokoro-82M, Apache-2.0) that sounds like people.

It runs through ONNX from two files of the kokoro-onnx project's release `model-files-v1.0`, which are looked for in
the folder named by FLASHTALK_KOKORO: `kokoro-v1.0.int8.onnx` and `voices-v1.0.bin`. It reads IPA, which espeak-ng makes
of the text, and decides itself how long each letter lasts: that is an inner value of its graph, which is made an output here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flashtalk_cli.errors import InputError

FOLDER = "FLASHTALK_KOKORO"
MODEL, VOICES = "kokoro-v1.0.int8.onnx", "voices-v1.0.bin"
RELEASE = "https://github.com/thewh1teagle/kokoro-onnx/releases/tag/model-files-v1.0"
RATE_HZ = 24_000
DURATIONS, DURATION_S = "/encoder/Clip_output_0", 600 / RATE_HZ
EARLY_S = 0.055  # by so much letters are heard before their times, as loudness and hiss of 7 voices show
MAX_LETTERS = 509  # a voice has a row for every length

# a voice's first letter -> its language, as in `sentences` and of espeak-ng
ACCENTS = {
    "a": ("en", "en-us"),
    "b": ("en", "en-gb"),
    "e": ("es", "es"),
    "f": ("fr", "fr"),
    "h": ("hi", "hi"),
    "i": ("it", "it"),
    "p": ("pt", "pt-br"),
}
HELD_OUT = ("af_heart", "am_michael")  # those of the packaged speeches: training never hears them
SPEAKERS = (
    *("af_alloy", "af_aoede", "af_bella", "af_jessica", "af_kore", "af_nicole", "af_nova"),
    *("af_river", "af_sarah", "af_sky", "am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam"),
    *("am_onyx", "am_puck", "am_santa", "bf_alice", "bf_emma", "bf_isabella", "bf_lily"),
    *("bm_daniel", "bm_fable", "bm_george", "bm_lewis", "ef_dora", "em_alex", "em_santa", "ff_siwis"),
    *("hf_alpha", "hf_beta", "hm_omega", "hm_psi", "if_sara", "im_nicola", "pf_dora", "pm_alex", "pm_santa"),
)

# number of the first -> letters it reads, one number after another
_LETTERS = {
    **{1: ";:,.!?", 9: "—", 16: " ", 24: "AI", 31: "O", 33: "Q", 39: "W", 41: "Y", 43: "abcdef"},
    **{
        50: "hijklmnopqrstuvwxyzɑɐɒæ",
        75: "βɔɕç",
        80: "ɖðʤə",
        85: "ɚɛɜ",
        90: "ɟ",
        92: "ɡ",
        99: "ɥ",
        101: "ɨɪʝ",
    },
    **{110: "ɯɰŋɳɲɴø", 118: "ɸθœ", 123: "ɹ", 125: "ɾɻ", 128: "ʁɽʂʃʈʧ", 135: "ʊʋ", 138: "ʌɣɤ", 142: "χʎ"},
    **{147: "ʒʔ", 156: "ˈˌː", 177: "ᵻ"},
}
NUMBERS = {letter: first + i for first, run in _LETTERS.items() for i, letter in enumerate(run)}
# what it was taught to read as one letter, in the order in which they are looked for
JOINED = {"tʃ": "ʧ", "dʒ": "ʤ", "eɪ": "A", "aɪ": "I", "oʊ": "O", "əʊ": "Q", "aʊ": "W", "ɔɪ": "Y"}
_APART = {one: two for two, one in JOINED.items()}
_SILENT, _STRESS = ";:,.!?—", "ˈˌ"


def speak(name: str, text: str, speed: float) -> tuple[np.ndarray, int, list[tuple[str, float]]]:
    """Samples, their rate, and the sounds in IPA in order with the second at which each ends; "_" is silence.

    name: one of `SPEAKERS`, or two with a + between, who become one voice between them. Raises InputError
    when espeak-ng, onnx, onnxruntime or the model's files are missing.
    """
    letters = _read(text, ACCENTS[name[0]][1])[:MAX_LETTERS]
    session, voices = _loaded()
    style = np.mean([voices[part][len(letters)] for part in name.split("+")], axis=0, dtype=np.float32)
    given = {
        "tokens": np.asarray([[0, *(NUMBERS[letter] for letter in letters), 0]]),
        "style": style.reshape(1, -1),
        "speed": np.asarray([speed], np.float32),
    }
    samples, durations = session.run(["audio", DURATIONS], given)
    return samples.reshape(-1), RATE_HZ, timed(letters, durations.reshape(-1) * DURATION_S)


def timed(letters: str, durations_s: np.ndarray) -> list[tuple[str, float]]:
    """Sounds and their ends, of letters and how long each lasts, with silence's before and after them.

    A mark of stress belongs to what follows, one of length and the end of a word to what came before.
    """
    ends_s = np.cumsum(durations_s)
    ends_s[:-1] = np.maximum(ends_s[:-1] - EARLY_S, 0)
    said = [("_", float(ends_s[0]))]
    for letter, end_s in zip(letters, ends_s[1:-1].tolist(), strict=True):
        if letter in _STRESS:
            continue
        if letter in " ː":
            said[-1] = (said[-1][0], end_s)
        else:
            said.append(("_" if letter in _SILENT else _APART.get(letter, letter), end_s))
    return [*said, ("_", float(ends_s[-1]))]


def _read(text: str, accent: str) -> str:
    program = shutil.which("espeak-ng")
    if program is None:
        raise InputError("espeak-ng is not installed: apt-get install espeak-ng")
    pieces = []
    for piece in text.replace("?", ".").replace("!", ".").split("."):  # espeak-ng drops the marks between
        if piece.strip():
            phrases = [_ipa(program, phrase, accent) for phrase in piece.split(",") if phrase.strip()]
            pieces.append(", ".join(phrases) + ("?" if "?" in text else "."))
    letters = " ".join(pieces)
    for two, one in JOINED.items():
        letters = letters.replace(two, one)
    return "".join(letter for letter in letters if letter in NUMBERS)


def _ipa(program: str, text: str, accent: str) -> str:
    done = subprocess.run(
        [program, "-q", "--ipa", "-v", accent, "--", text], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"espeak-ng could not read {text!r}: {done.stderr.strip()[:200]}")
    return " ".join(done.stdout.split())


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any, Any]:
    """The network, its durations given out, and the voices by name, each float32 [510, 1, 256]."""
    folder = Path(os.environ.get(FOLDER, ""))
    for name in (MODEL, VOICES):
        if FOLDER not in os.environ or not (folder / name).is_file():
            raise InputError(f"{name} of {RELEASE} is missing: put it into a folder and set {FOLDER} to that")
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'flashtalk[voices]'") from error
    model = onnx.load(folder / MODEL)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(DURATIONS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # several processes speak at a time
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session, np.load(folder / VOICES)

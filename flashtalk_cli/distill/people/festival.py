"""Festival's voices: who they are, how they write their sounds, and the program that speaks.

They are recordings of people cut into pieces (one, `upc_ca_ona_hts`, is a model of them), with the
sounds' times. Each voice reads one language in one encoding and has the phones of that language;
`SPEAKERS` says which, `TABLES` what the phones are in IPA.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from flashtalk_cli.distill.people.phonemes import FLITE
from flashtalk_cli.errors import InputError


def _table(pairs: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in pairs.split())


_FINNISH = _table(
    "#=_ ##=_ a=ɑ e=e i=i o=o u=u y=y @=æ 7=ø &=ə p=p t=t k=k b=b d=d g=g f=f T=θ D=ð s=s z=z S=ʃ Z=ʒ"
    " h=h v=ʋ m=m n=n N=ŋ l=l L=l r=r j=j w=w"
)
_INDIC = _table(
    "pau=_ x=_ a=ə @=a aa=a ih=ɪ iy=i uh=ʊ uw=u eh=e ee=e ay=aɪ oh=o oo=o aw=aʊ w=w"
    " p=p b=b bh=b m=m f=f v=ʋ th=t tth=t dh=d ddh=d td=ʈ T=ʈ D=ɖ n=n N=ɳ s=s sh=ʃ zh=ʒ ch=tʃ j=dʒ"
    " k=k kh=k g=g gh=g ksh=kʃ sri=ʃɾi h=h y=j r=ɾ R=ɾ l=l L=ɭ"
)

# phone set -> phone -> IPA letters
TABLES = {
    "radio": {**FLITE, "h#": "_", "brth": "_"},
    "czech": _table(
        "#=_ _=ʔ a=a a:=a e=ɛ e:=ɛ i=ɪ i:=i o=o o:=o u=u u:=u p=p b=b m=m f=f v=v t=t d=d n=n"
        " t~=c d~=ɟ n~=ɲ n*=ŋ k=k g=ɡ c=ts dz=dz c~=tʃ dz~=dʒ s=s z=z s~=ʃ z~=ʒ ch=x h=ɦ j=j l=l"
        " r=r r~=rʒ r~*=rʃ"
    ),
    "finnish": _FINNISH | {f"{phone}:": letters for phone, letters in _FINNISH.items() if letters != "_"},
    "italian": _table(
        "#=_ i=i e=e E=ɛ a=a o=o O=ɔ u=u i1=i e1=e E1=ɛ a1=a o1=o O1=ɔ u1=u j=j w=w p=p b=b m=m"
        " f=f v=v t=t d=d n=n J=ɲ ng=ŋ nf=ɱ k=k g=ɡ s=s z=z S=ʃ Z=ʒ ts=ts tS=tʃ dz=dz dZ=dʒ l=l L=ʎ r=r"
    ),
    "catalan": _table(
        "pau=_ _=_ #=_ ax=ə a=a a1=a e=e e1=e E=ɛ E1=ɛ i=i i1=i o=o o1=o O=ɔ O1=ɔ u=u u1=u j=j w=w"
        " p=p b=b m=m f=f t=t d=d n=n J=ɲ k=k g=ɡ s=s z=z S=ʃ Z=ʒ l=l L=ʎ r=ɾ rr=r"
    ),
    "russian": _table(
        "pau=_ ii=i yy=ɨ uu=u ee=ɛ oo=o aa=a a=ɐ e=e i=ɪ y=ɨ u=ʊ ae=ə ay=ə ur=ʊ p=p pp=p b=b bb=b"
        " m=m mm=m f=f ff=f v=v vv=v t=t tt=t d=d dd=d n=n nn=n k=k kk=k g=ɡ gg=ɡ c=ts ch=tʃ s=s ss=s"
        " z=z zz=z sh=ʂ sch=ʃ zh=ʐ h=x hh=x l=l ll=l r=r rr=r j=j"
    ),
    "indic": _INDIC,
}


@dataclass(frozen=True)
class Speaker:
    """What a voice reads (`language` as in `sentences`), in which encoding, and its phone set."""

    language: str
    coding: str
    phones: str


SPEAKERS = {
    "kal_diphone": Speaker("en", "ascii", "radio"),
    "ked_diphone": Speaker("en", "ascii", "radio"),
    "czech_dita": Speaker("cs", "iso-8859-2", "czech"),
    "czech_krb": Speaker("cs", "iso-8859-2", "czech"),
    "czech_machac": Speaker("cs", "iso-8859-2", "czech"),
    "czech_ph": Speaker("cs", "iso-8859-2", "czech"),
    "suo_fi_lj_diphone": Speaker("fi", "iso-8859-15", "finnish"),
    "hy_fi_mv_diphone": Speaker("fi", "iso-8859-15", "finnish"),
    "lp_diphone": Speaker("it", "iso-8859-1", "italian"),
    "pc_diphone": Speaker("it", "iso-8859-1", "italian"),
    "upc_ca_ona_hts": Speaker("ca", "iso-8859-15", "catalan"),
    "msu_ru_nsh_clunits": Speaker("ru", "utf-8", "russian"),
    "hindi_NSK_diphone": Speaker("hi", "utf-8", "indic"),
    "marathi_NSK_diphone": Speaker("mr", "utf-8", "indic"),
    "telugu_NSK_diphone": Speaker("te", "utf-8", "indic"),
}

# a voice cut from recordings takes its speed from the stretch, a model from the engine's parameter
_SCRIPT = """(voice_{name})
(Parameter.set 'Duration_Stretch (* {stretch:.4f} (Parameter.get 'Duration_Stretch)))
(defvar hts_engine_params nil)
(set! hts_engine_params (append hts_engine_params (list (list "-r" {speed:.4f}))))
(set! spoken (utt.synth (Utterance Text "{text}")))
(utt.save.segs spoken "{folder}/speech.lab")
(utt.save.wave spoken "{folder}/speech.wav" 'riff)
"""


def speak(name: str, text: str, speed: float) -> tuple[np.ndarray, int, list[tuple[str, float]]]:
    """Samples, their rate, and the phones in order with the second at which each ends.

    What the voice's encoding lacks is left out; `msu_ru_nsh_clunits` keeps its own speed. Raises
    InputError when festival or the voice is not installed, or when it fails.
    """
    program = shutil.which("festival")
    if program is None:
        raise InputError("festival is not installed: apt-get install festival")
    speaker = SPEAKERS[name]
    quoted = re.sub(r'(["\\])', r"\\\1", text)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        script = _SCRIPT.format(name=name, stretch=1 / speed, speed=speed, text=quoted, folder=folder)
        (folder / "speech.scm").write_bytes(script.encode(speaker.coding, "ignore"))
        command = [program, "--batch", str(folder / "speech.scm")]
        done = subprocess.run(command, capture_output=True, check=False)
        if not (folder / "speech.wav").exists() or not (folder / "speech.lab").exists():
            raise InputError(
                f"festival failed with voice {name} on {text!r} (is the voice installed?): "
                + done.stderr.decode(errors="replace").strip()[:200]
            )
        samples, rate_hz = soundfile.read(folder / "speech.wav", dtype="float32")
        lines = (folder / "speech.lab").read_text().split("\n")
    entries = [line.split() for line in lines[lines.index("#") + 1 :]]
    return samples, rate_hz, [(entry[2], float(entry[0])) for entry in entries if len(entry) == 3]

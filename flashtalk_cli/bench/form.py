"""Reading a report from its file, and whether it has the form that report.py documents.

A form is given by example: a mapping needs these keys, a list has one row or more of this form, and a value is
of this kind. A key with ? behind it may be left out. More keys than are asked for do no harm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashtalk_cli.bench.report import SCHEMA
from flashtalk_cli.errors import InputError

NUMBER, TEXT, TRUTH = "a number", "a text", "true or false"
NUMBER_OR_NULL, TEXT_OR_NULL = "a number or null", "a text or null"

SPREAD = {**dict.fromkeys(("p50_s", "p95_s", "p99_s", "mean_s"), NUMBER), "samples_s": [NUMBER]}
FORM = {
    "fingerprint": {
        **dict.fromkeys(("date", "flashtalk", "device", "torch"), TEXT),
        **dict.fromkeys(("commit", "driver", "cuda"), TEXT_OR_NULL),
        "device_memory_gib": NUMBER_OR_NULL,
        "threads": NUMBER,
    },
    "setting": {
        **dict.fromkeys(("preset", "model", "weights", "canvas", "attention", "dit_dtype"), TEXT),
        **dict.fromkeys(("steps", "fps", "chunk_frames", "new_frames", "ranks", "chunks"), NUMBER),
        "precision": {"dit": TEXT},
        "offload": TRUTH,
    },
    "speed": dict.fromkeys(("fps", "realtime", "drain_s"), NUMBER),
    "chunk": SPREAD,
    "parts": [
        {
            **dict.fromkeys(("name", "lane"), TEXT),
            "count": NUMBER,
            "time": SPREAD,
            "share": NUMBER_OR_NULL,
            "each?": [SPREAD],
        }
    ],
    "once": dict.fromkeys(("process", "inputs", "load", "prepare", "warm_up"), NUMBER),
    "live": {
        **dict.fromkeys(("audio_fill_s", "lookahead_s", "start_warm_s", "start_cold_s", "spare_s"), NUMBER),
        "first_frame": SPREAD,
        "holds": TRUTH,
    },
    "work": [{"stage": TEXT, **dict.fromkeys(("tflop", "tflops", "ceiling_tflops", "share"), NUMBER)}],
    "ceilings": [{"kind": TEXT, "what": TEXT, "tflops": NUMBER}],
    "ranks": [
        {
            **dict.fromkeys(("rank", "peak_memory_gib", "exchanges"), NUMBER),
            "host": TEXT,
            "peak_reserved_gib": NUMBER_OR_NULL,
            "exchange": SPREAD,
        }
    ],
    "memory": {"peak_gib": NUMBER},
    "timeline": [{"name": TEXT, "lane": TEXT, "start_s": NUMBER, "end_s": NUMBER}],
}


def read(path: Path) -> dict[str, Any]:
    """A report from its file. Raises InputError for anything else, and for one of another version or form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is no report of flashtalk bench (not JSON)") from None
    version = found.get("schema") if isinstance(found, dict) else None
    if version != SCHEMA:
        raise InputError(
            f"{path}: is no bench report of version {SCHEMA} (its schema is {version!r}); measure again"
        )
    if wrong := fault(found):
        raise InputError(f"{path}: is no whole report of flashtalk bench ({wrong}); measure again")
    return dict(found)


def fault(found: Any, form: Any = FORM, place: str = "") -> str | None:
    """The first thing that is not of the form, such as "chunk.p50_s is missing"; None for a report."""
    if isinstance(form, dict):
        return _fault_of_mapping(found, form, place)
    if isinstance(form, list):
        if not isinstance(found, list) or not found:
            return f"{place} is no list with something in it"
        faults = (fault(row, form[0], f"{place}[{index}]") for index, row in enumerate(found))
        return next(filter(None, faults), None)
    return None if _is(found, form) else f"{place} is not {form}"


def _fault_of_mapping(found: Any, form: Mapping[str, Any], place: str) -> str | None:
    if not isinstance(found, dict):
        return f"{place} has no keys"
    for asked, inner in form.items():
        key = asked.removesuffix("?")
        where = f"{place}.{key}" if place else key
        if key not in found:
            if key == asked:
                return f"{where} is missing"
        elif wrong := fault(found[key], inner, where):
            return wrong
    return None


def _is(value: Any, kind: str) -> bool:
    if kind in (NUMBER_OR_NULL, TEXT_OR_NULL) and value is None:
        return True
    if kind == TRUTH:
        return isinstance(value, bool)
    if kind in (TEXT, TEXT_OR_NULL):
        return isinstance(value, str)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf

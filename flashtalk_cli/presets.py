"""Presets: YAML files, and what a command line changes in them, to a `Preset`.

A preset is named (`mini`: a file of `presets/`, which travels inside the wheel) or given by
its path. An override is a dotted path and a value: `--set sampling.steps=2`. Everything wrong
is a `ConfigError` of one line: where it stands, what was given, what would be accepted.

What a preset is depends on its `Kind`: those for rendering unless another is named.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flashtalk_cli.config import Preset
from flashtalk_cli.errors import ConfigError

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Override:
    """A value for one key of a preset, and the option that asked for it (for messages)."""

    path: str  # dotted: sampling.steps
    value: Any
    origin: str  # --set, --steps, ...


Loaded = TypeVar("Loaded", bound=BaseModel)


@dataclass(frozen=True)
class Kind(Generic[Loaded]):
    """A kind of preset: the class that says what it holds, and the folder under `presets/` where they lie."""

    schema: type[Loaded]
    folder: str = ""


RENDER: Kind[Preset] = Kind(Preset)


def names(kind: Kind[Any] = RENDER) -> list[str]:
    """Names of the presets of a kind that came with the program, sorted."""
    files = (path.name for path in _folder(kind).iterdir())
    return sorted(name.rsplit(".", 1)[0] for name in files if name.endswith(SUFFIXES))


def load(name: str, overrides: Sequence[Override] = (), kind: Kind[Loaded] = RENDER) -> Loaded:  # type: ignore[assignment]
    """The preset of that name or in that file, with the overrides applied in order.

    A file that does not say its name is called like itself, and it need not describe itself.
    Raises `ConfigError` for an unknown preset, an unreadable file, an unknown key or a wrong value.
    """
    label, text = _read(name, kind)
    data = {"name": Path(name).stem, "description": "", **_parse(text, label, kind.schema)}
    origins = {}
    for override in overrides:
        _put(data, override, kind.schema)
        origins[override.path] = override.origin
    try:
        return kind.schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, kind.schema, label, origins)) from None


def parse_set(text: str, kind: Kind[Any] = RENDER) -> Override:
    """`a.b=c` as an override. The value is read as YAML; a key that takes text takes it as it stands.

    So `--set sampling.prompt="Look: left"` and `--set canvas.background=#ffffff` need no second quoting.
    """
    path, equals, raw = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ConfigError(f"--set {_shown(text)}: expected KEY=VALUE, such as sampling.steps=2")
    kinds = _kinds(_find(path, "--set", kind.schema).annotation)
    try:
        value = yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError as error:
        if str not in kinds:
            raise ConfigError(f"--set {path}: {_shown(raw)} is not a YAML value ({_reason(error)})") from None
        value = raw
    if str in kinds and not isinstance(value, str) and (value is not None or type(None) not in kinds):
        value = raw
    return Override(path, value, "--set")


def dump(preset: BaseModel) -> str:
    """The preset as YAML, every value written out: `load` of it gives the same preset."""
    return yaml.dump(
        preset.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def dotted_keys(kind: Kind[Any] = RENDER) -> list[str]:
    """Every dotted key that an override may name."""
    return list(_leaves(kind.schema, ""))


# Reading


def _folder(kind: Kind[Any]) -> Any:
    """Where the packaged presets lie: in the wheel, or next to the package in a source tree."""
    package = resources.files("flashtalk_cli")
    inside = package / "presets_data"
    folder = inside if inside.is_dir() else Path(str(package)).parent / "presets"
    return folder / kind.folder if kind.folder else folder


def _read(name: str, kind: Kind[Any]) -> tuple[str, str]:
    """(what messages call it, its text)."""
    if name.endswith(SUFFIXES) or "/" in name:
        source, label = Path(name), name
    else:
        known = names(kind)
        if name not in known:
            hint = _did_you_mean(name, known)
            raise ConfigError(
                f"no preset named {_shown(name)}{hint}; there are {', '.join(known)}, or give a .yaml file"
            )
        source, label = _folder(kind) / f"{name}.yaml", f"preset {name}"
    try:
        return label, source.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{label}: no such preset file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{label}: not a preset, which is YAML in UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read ({error.strerror})") from None


def _parse(text: str, label: str, schema: type[BaseModel]) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not valid YAML ({_reason(error)})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{label}: a preset is keys and values ({_choices(schema)}), not {_shown(data)}")
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no preset has such a key: the parent class complains
            if key.value in seen:
                problem = f"key {key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would otherwise read as a number, or as the end of a line."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text; where it holds the one line break that is written plain, double quotes make it an escape."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)

_EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


# Overriding


def _put(data: dict[str, Any], override: Override, schema: type[BaseModel]) -> None:
    """Write the override's value into the raw data of a preset, in place."""
    _find(override.path, override.origin, schema)
    *sections, key = override.path.split(".")
    for depth, section in enumerate(sections):
        inner = data.setdefault(section, {})
        if inner is None:  # `sampling:` with nothing below it
            inner = data[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(sections[: depth + 1])} is {_shown(inner)}, not keys and values")
        data = inner
    data[key] = override.value


def _find(path: str, origin: str, schema: type[BaseModel]) -> FieldInfo:
    """The field at that dotted path; `ConfigError` when there is none or it is a whole section."""
    model = schema
    walked: list[str] = []
    for key in path.split("."):
        if key not in model.model_fields:
            raise ConfigError(f"{origin}: {_unknown(walked, key, model)}")
        field = model.model_fields[key]
        walked.append(key)
        section = _section(field)
        if section is None:
            if len(walked) <= path.count("."):
                raise ConfigError(
                    f"{origin}: unknown key {_shown(path)}; {'.'.join(walked)} has no keys below it"
                )
            return field
        model = section
    raise ConfigError(f"{origin}: {path} is not one value; name one of its keys: {_choices(model)}")


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            yield prefix + name
        else:
            yield from _leaves(section, f"{prefix}{name}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, when it is one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


# Explaining


def _explain(error: ValidationError, schema: type[BaseModel], label: str, origins: Mapping[str, str]) -> str:
    """One line for the first thing that is wrong, and how many more there are."""
    first, *more = error.errors()
    path = _path_of(first["loc"], schema)
    where = next((origin for key, origin in origins.items() if (key + ".").startswith(path + ".")), label)
    others = {_path_of(detail["loc"], schema) for detail in more} - {path}
    rest = f" (and {len(others)} more)" if others else ""
    return f"{where}: {_complaint(path, first, schema)}{rest}"


def _path_of(place: Sequence[object], schema: type[BaseModel]) -> str:
    """The dotted path of an error's place; where a value may be of several types, without the type tried."""
    model: type[BaseModel] | None = schema
    walked: list[str] = []
    for key in map(str, place):
        if model is None:
            break
        walked.append(key)
        model = _section(model.model_fields[key]) if key in model.model_fields else None
    return ".".join(walked)


def _complaint(path: str, detail: Any, schema: type[BaseModel]) -> str:
    *sections, key = path.split(".")
    model = schema
    for section in sections:
        if section not in model.model_fields:
            break
        model = _section(model.model_fields[section]) or model
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown(sections, key, model)
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}" if path else str(detail["ctx"]["error"])
    field = model.model_fields[key]
    section_model = _section(field)
    accepted = f"keys and values: {_choices(section_model)}" if section_model else _accepted(field)
    return f"{path} is {_shown(detail['input'])}; accepted: {accepted}"


def _unknown(sections: Sequence[str], key: str, model: type[BaseModel]) -> str:
    inside = f"{'.'.join(sections)} has" if sections else "a preset has"
    hint = _did_you_mean(key, list(model.model_fields))
    dotted = ".".join([*sections, key])
    return f"unknown key {_shown(dotted)}{hint}; {inside} {_choices(model)}"


def _choices(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types an annotation allows: `str | None` -> (str, NoneType)."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _accepted(field: FieldInfo) -> str:
    """What a field takes, in words: its own where it has any."""
    return field.description or " or ".join(
        _in_words(kind, field.metadata) for kind in _kinds(field.annotation)
    )


def _in_words(kind: Any, limits: Sequence[object]) -> str:
    """One of the types that a field takes, with its limits."""
    if get_origin(kind) is Literal:
        return ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        limits = [limit for note in notes for limit in getattr(note, "metadata", [note])]
    if kind is type(None):
        return "null"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    text = words.get(kind, str(kind))
    bounds = {name: value for limit in limits for name, value in _limits(limit).items()}
    if "ge" in bounds and "le" in bounds:
        return f"{text} from {bounds['ge']} to {bounds['le']}"
    phrases = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return text + "".join(f" {phrase} {bounds[name]}" for name, phrase in phrases.items() if name in bounds)


def _limits(bound: object) -> dict[str, object]:
    """`ge`, `lt`, ... of a piece of a field's metadata, whatever class carries it."""
    found = {name: getattr(bound, name, None) for name in ("ge", "gt", "le", "lt")}
    return {name: value for name, value in found.items() if value is not None}


def _did_you_mean(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given.lower(), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _shown(value: Any) -> str:
    """A value as a short piece of one line; text in quotes, so that "8" and 8 look different."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + str(getattr(error, "problem", None) or error).splitlines()[0]

"""Presets, held to: whatever is written comes back the same, every valid override lands where it
points and changes nothing else (properties); every mistake is one line with its dotted path and
what would be accepted; the packaged presets load and mean what their files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flashtalk_cli import presets
from flashtalk_cli.config import Preset
from flashtalk_cli.errors import ConfigError
from flashtalk_cli.presets import Override

ROOT = Path(__file__).parent.parent

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
sides = st.integers(4, 256).map(lambda n: 16 * n)
finite = {"allow_nan": False, "allow_infinity": False}
VALUES = {
    "name": text,
    "description": text,
    "model.name": text,
    "model.speech_encoder": st.none() | text,
    "model.weights": st.sampled_from(["released", "random"]),
    "canvas.width_px": sides,
    "canvas.height_px": sides,
    "canvas.fit": st.sampled_from(["crop", "pad"]),
    "canvas.background": st.from_regex(r"#[0-9a-f]{6}", fullmatch=True),
    "sampling.steps": st.integers(1, 1000),
    "sampling.shift": st.floats(1e-3, 1e6) | st.integers(1, 100),
    "sampling.seed": st.integers(0, 2**63 - 1),
    "sampling.prompt": text,
    "sampling.fps": st.sampled_from([20, 25, 32, 40, 50]),
    "sampling.chunk_frames": st.integers(2, 15).map(lambda n: 1 + 4 * n),
    "sampling.motion_frames": st.sampled_from([1, 5]),
    "sampling.colour_strength": st.floats(0, 1),
    "hearing.context_s": st.floats(7.1, 60),  # a chunk and its look-ahead, the longest of these
    "hearing.lookahead_s": st.floats(0, 4),
    "hearing.loudness_lufs": st.floats(-70, 0),
    "precision.dit": st.sampled_from(["float32", "bfloat16", "fp8"]),
    "precision.vae": st.sampled_from(["float32", "bfloat16"]),
    "compute.device": st.sampled_from(["auto", "cpu", "cuda"]),
    "compute.attention": st.sampled_from(["auto", "fa3", "fa3-fp8", "flash", "cudnn", "sdpa"]),
    "compute.gpus": st.just("all") | st.integers(1, 1024),
    "compute.ulysses": st.none() | st.integers(1, 64),
    "compute.engine": st.sampled_from(["torch", "xfuser"]),
    "compute.offload": st.booleans(),
    "encoding.codec": text,
    "encoding.crf": st.integers(0, 63),
    "live.latency_target_s": st.floats(0.2, 60),
    "live.start_buffer_s": st.floats(0.04, 10),
    "live.lookahead_s": st.floats(0, 4),
    "live.backlog_s": st.floats(5, 600),
    "live.late": st.sampled_from(["repeat", "drop", "fail"]),
    "live.away": st.sampled_from(["go-on", "pause"]),
}


def value_at(preset: Preset, path: str) -> object:
    found: object = preset
    for key in path.split("."):
        found = getattr(found, key)
    return found


def written(tmp_path: Path, content: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    return str(path)


def complaint_lines(argument: str) -> int:
    """Lines of the complaint about `--set argument`; 0 when it is accepted."""
    try:
        presets.load("mini", [presets.parse_set(argument)])
    except ConfigError as error:
        return len(str(error).splitlines())
    return 0


def test_a_context_shorter_than_a_chunk_is_told_before_anything_is_loaded():
    with pytest.raises(
        ConfigError, match=r"context_s 2 is shorter than a chunk and its look-ahead, 5\.32 s$"
    ):
        presets.load(
            "mini", [presets.parse_set(f"hearing.{key}") for key in ("context_s=2", "lookahead_s=4")]
        )


# Properties


@settings(max_examples=80)
@given(st.fixed_dictionaries({}, optional=VALUES))
@example({"name": "\x85", "sampling.prompt": "a\u2028b\x85 c\r\n\ufeff"})
def test_a_preset_written_out_and_read_again_is_the_same(tmp_path_factory, values):
    # chunk_frames 9 leaves room for both motion_frames
    preset = presets.load("mini", [Override(path, value, "--set") for path, value in values.items()])
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(presets.dump(preset), encoding="utf-8")
    assert presets.load(str(path)) == preset


@settings(max_examples=80)
@given(st.data())
def test_an_override_lands_where_it_points_and_nowhere_else(data):
    path = data.draw(st.sampled_from(sorted(VALUES)))
    value = data.draw(VALUES[path])
    plain = presets.load("mini")
    changed = presets.load("mini", [Override(path, value, "--set")])
    assert value_at(changed, path) == value
    for other in presets.dotted_keys():
        if other != path:
            assert value_at(changed, other) == value_at(plain, other)


@settings(max_examples=80)
@given(st.data())
def test_set_reads_back_what_yaml_writes(data):
    path = data.draw(st.sampled_from(sorted(VALUES)))
    value = data.draw(VALUES[path])
    assume(not isinstance(value, str) or not value or value.splitlines() == [value])  # YAML folds line breaks
    shown = (
        yaml.dump(value, Dumper=presets._Dumper, allow_unicode=True, width=10**6)
        .removesuffix("...\n")
        .strip()
    )
    assert presets.parse_set(f"{path}={shown}").value == value


def test_the_properties_above_know_every_key():
    assert sorted(VALUES) == sorted(presets.dotted_keys())


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_any_set_is_an_override_or_one_line(argument):
    for given_text in (argument, f"sampling.steps={argument}", f"sampling.{argument}=1"):
        assert complaint_lines(given_text) <= 1


@settings(max_examples=60)
@given(st.text(max_size=60) | st.binary(max_size=40))
def test_any_file_is_a_preset_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError) as caught:
        presets.load(str(path))
    assert len(str(caught.value).splitlines()) == 1


# What values look like


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sampling.shift=8", 8.0),  # a whole number where any number goes
        ("sampling.shift=1e-1", 0.1),
        ("sampling.prompt=He says: yes", "He says: yes"),
        ("sampling.prompt=yes", "yes"),
        ("sampling.prompt=12", "12"),
        ("sampling.prompt='quoted'", "quoted"),
        ("sampling.prompt=a=b", "a=b"),
        ("sampling.prompt=", ""),
        ("canvas.background=#ffffff", "#ffffff"),
        ("model.speech_encoder=null", None),
        ("model.speech_encoder=/a b", "/a b"),
    ],
)
def test_set_values(argument, value):
    override = presets.parse_set(argument)
    assert value_at(presets.load("mini", [override]), override.path) == value


def test_the_last_override_wins():
    overrides = [presets.parse_set("sampling.steps=2"), Override("sampling.steps", 3, "--steps")]
    assert presets.load("mini", overrides).sampling.steps == 3


# Mistakes: (what is set, what the one line must contain)

MISTAKES = [
    (
        "sampling.step=2",
        "--set: unknown key 'sampling.step' (did you mean steps?); sampling has steps, shift",
    ),
    ("samplin.steps=2", "unknown key 'samplin' (did you mean sampling?); a preset has name,"),
    ("sampling=3", "sampling is not one value; name one of its keys: steps, shift"),
    ("sampling.steps.x=1", "unknown key 'sampling.steps.x'; sampling.steps has no keys below it"),
    ("steps", "'steps': expected KEY=VALUE, such as sampling.steps=2"),
    ("=2", "expected KEY=VALUE"),
    ("sampling.steps=four", "sampling.steps is 'four'; accepted: a whole number from 1 to 1000"),
    ("sampling.steps='4'", "sampling.steps is '4'; accepted: a whole number"),
    ("sampling.steps=4.5", "sampling.steps is 4.5; accepted: a whole number"),
    ("sampling.steps=true", "sampling.steps is true; accepted: a whole number"),
    ("sampling.steps=0", "sampling.steps is 0; accepted: a whole number from 1 to 1000"),
    ("sampling.steps=[1", "sampling.steps: '[1' is not a YAML value (line 1, column 3"),
    ("sampling.steps=null", "sampling.steps is null"),
    ("sampling.steps={a: 1}", "sampling.steps is {'a': 1}"),
    ("sampling.shift='8'", "sampling.shift is '8'; accepted: a number above 0"),
    ("sampling.shift=0", "accepted: a number above 0"),
    ("sampling.shift=.nan", "sampling.shift is nan"),
    ("sampling.shift=true", "sampling.shift is true; accepted: a number"),
    ("compute.gpus=0", "compute.gpus is 0; accepted: a whole number from 1 to 1024 or all"),
    ("compute.gpus=many", "compute.gpus is 'many'; accepted: a whole number from 1 to 1024 or all"),
    ("compute.ulysses=0", "compute.ulysses is 0; accepted: a whole number of at least 1 or null"),
    ("compute.device=gpu", "compute.device is 'gpu'; accepted: auto, cpu, cuda"),
    ("canvas.background=red", "canvas.background is 'red'; accepted: #RRGGBB, such as #336699"),
    ("canvas.width_px=100", "--set: canvas.width_px: 100 does not divide by 16"),
    ("sampling.chunk_frames=30", "--set: sampling: chunk_frames 30 is not 1 + a multiple of 4"),
    ("sampling.prompt=" + 'a"' * 3 + "\n", None),  # odd text is still text
]


@pytest.mark.parametrize(("argument", "line"), MISTAKES)
def test_mistakes_in_set(argument, line):
    if line is None:
        presets.load("mini", [presets.parse_set(argument)])
        return
    with pytest.raises(ConfigError) as caught:
        presets.load("mini", [presets.parse_set(argument)])
    assert line in str(caught.value)


FILES = [
    ("", "a preset is keys and values (name, description"),
    ("- 1", "not [1]"),
    ("name: x\ndescription: y\nsteps: 4", "unknown key 'steps'; a preset has name"),
    ("name: x\ndescription: y\nsampling: 4", "sampling is 4; accepted: keys and values: steps, shift"),
    ("name: x\ndescription: y\nsampling: {step: 4}", "unknown key 'sampling.step' (did you mean steps?)"),
    ("name: x\nname: y", "key name is given twice"),
    ("a: b: c", "not valid YAML (line 1, column 5"),
    ("name: 5\ndescription: 6", "name is 5; accepted: text (and 1 more)"),
    ("1: 2\nname: x\ndescription: y", "unknown key '1'"),
    ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ("? [a]\n: b", "not valid YAML"),
]


@pytest.mark.parametrize(("content", "line"), FILES)
def test_mistakes_in_a_file(tmp_path, content, line):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        presets.load(path)
    assert line in str(caught.value)
    assert str(caught.value).startswith(path)


def test_a_file_need_not_say_its_name_nor_describe_itself(tmp_path):
    preset = presets.load(written(tmp_path, "model: {name: soulx-14b}"))
    assert (preset.name, preset.description, preset.model.name) == ("mine", "", "soulx-14b")
    assert presets.load(written(tmp_path, "name: x\ndescription: y")).name == "x"


def test_overriding_a_section_that_the_file_left_empty_or_spoilt(tmp_path):
    override = presets.parse_set("sampling.steps=2")
    path = written(tmp_path, "name: x\ndescription: y\nsampling:")
    assert presets.load(path, [override]).sampling.steps == 2
    path = written(tmp_path, "name: x\ndescription: y\nsampling: 3")
    with pytest.raises(ConfigError, match="sampling is 3, not keys and values"):
        presets.load(path, [override])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("minni", "no preset named 'minni' (did you mean mini?); there are h200x1-fp8, "),
        ("none.yaml", "none.yaml: no such preset file"),
        ("./none", "./none: no such preset file"),
        ("/", "/: cannot be read (Is a directory)"),
        ("", "no preset named ''"),
    ],
)
def test_presets_that_are_not_there(name, line):
    with pytest.raises(ConfigError) as caught:
        presets.load(name)
    assert line in str(caught.value)


# The packaged ones


@pytest.mark.parametrize("name", presets.names())
def test_a_packaged_preset_is_named_like_its_file_and_says_what_it_is(name):
    preset = presets.load(name)
    assert preset.name == name
    assert 10 < len(preset.description) < 80


def test_the_released_model_runs_with_the_released_values():
    preset = presets.load("soulx-14b")
    canvas, sampling, hearing = preset.canvas, preset.sampling, preset.hearing
    assert (canvas.height_px, canvas.width_px) == (768, 448)
    assert (sampling.steps, sampling.shift, sampling.fps) == (4, 5.0, 25)
    assert (sampling.chunk_frames, sampling.motion_frames, sampling.new_frames) == (33, 5, 28)
    assert (hearing.context_s, hearing.loudness_lufs, sampling.colour_strength) == (8.0, -23.0, 1.0)
    assert preset.precision.dit == preset.precision.vae == "bfloat16"


SHORT = {  # presets of the released model that say only what is theirs
    "h200x1-fp8": {"precision.dit": "fp8", "compute.attention": "fa3-fp8"},
    "h200x2-bf16": {"compute.gpus": 2},
    "h200x2-realtime": {"compute.gpus": 2, "precision.dit": "fp8", "compute.attention": "fa3-fp8"},
}


@pytest.mark.parametrize("name", SHORT)
def test_a_preset_named_for_a_machine_is_the_released_one_but_for_what_it_is_named_for(name):
    overrides = [Override(path, value, "--set") for path, value in SHORT[name].items()]
    own = {"name", "description"}
    expected = presets.load("soulx-14b", overrides).model_dump(exclude=own)
    assert presets.load(name).model_dump(exclude=own) == expected


def test_there_is_a_preset_for_no_machine_that_nobody_measured():
    """Each one that is named for a machine is in the test above, and names a number of GPUs that it asks for."""
    named = {name for name in presets.names() if name.startswith("h200")}
    assert named == set(SHORT)
    for name in named:
        assert presets.load(name).compute.gpus == int(name.partition("-")[0].removeprefix("h200x"))


def test_presets_are_found_from_any_folder(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flashtalk_cli import presets; presets.load('mini')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

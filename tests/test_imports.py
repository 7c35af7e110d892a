"""Contract: imports run one way, and what must stay light stays light (read from the syntax trees).

    cli -> launch -> worker -> {pipeline, media, bench, distill};  pipeline -> models -> parallel -> torch

config, errors, events, log and presets know nobody above them; media never imports torch, and the
parent's side (cli, launch and all that they stand on) not while it is imported.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flashtalk_cli"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# What each room may import of our own; a room may always import itself.
BASE = {"errors", "config"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "log": {"errors"},
    "events": {"errors"},
    "presets": BASE,
    "placement": set(),
    "launch": {*BASE, "events", "log", "placement", "media"},
    "parallel": BASE,
    "failing": {*BASE, "events", "parallel"},
    "models": {*BASE, "parallel"},
    "pipeline": {*BASE, "parallel", "models"},
    "media": BASE,
    "bench": {*BASE, "log", "events", "parallel", "models", "pipeline", "media", "rendering"},
    "distill": {
        *(*BASE, "log", "events", "presets", "parallel", "models", "pipeline", "media", "bench"),
        "failing",
    },
    "torchrun": {*BASE, "events", "parallel"},
    "live": {*BASE, "events", "parallel", "models", "pipeline", "media"},
    "batch": {*BASE, "events", "launch", "media"},
    "serving": {*BASE, "events", "parallel", "models", "pipeline", "rendering"},
    "rendering": {*BASE, "events", "parallel", "models", "pipeline", "media"},
    "worker": {
        *(*BASE, "log", "events", "parallel", "models", "pipeline", "media", "bench"),
        *("rendering", "serving", "live", "failing"),
    },
    "cli": {
        *(*BASE, "log", "events", "presets", "launch", "live", "media", "models", "distill", "batch"),
        *("parallel", "bench"),
    },
    "__main__": {"cli", "errors"},
    "__init__": set(),
}
HEAVY = {"torch", "transformers", "safetensors", "diffusers", "torchvision"}
LIGHT_MODELS = {
    "models/__init__.py",
    "models/folder.py",
    "models/verify.py",
}  # all that the command line may import
LIGHT_DISTILL = "distill/config.py"  # and of distill
ENVIRONMENT = {
    "distill/people/kokoro.py": {"FLASHTALK_KOKORO"},
    "models/folder.py": {"FLASHTALK_HOME", "XDG_CACHE_HOME"},
    "launch.py": {
        "GOMP_SPINCOUNT",
        "MKL_CBWR",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST",
        "TORCH_CPP_LOG_LEVEL",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_MMAP_THRESHOLD_",
    },
    "placement.py": {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"},
    "parallel/ranks.py": {"LOCAL_WORLD_SIZE"},  # torchrun's
    "live/control.py": {"XDG_RUNTIME_DIR"},
    "media/live/targets.py": set(),  # the variable that a user names
    "worker.py": None,
}  # None: torchrun's own


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports(path: Path, *, at_import_only: bool = False) -> tuple[str, ...]:
    """Dotted names of all that a file imports; without those for type checkers, and on wish those in functions."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import, line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8"))))


def rooms_imported(path: Path) -> set[str]:
    ours = (name.split(".") for name in imports(path) if name.split(".")[0] == "flashtalk_cli")
    return {parts[1] for parts in ours if len(parts) > 1 and not parts[1].startswith("__")}


def imports_torch(path: Path) -> bool:
    return "torch" in {name.split(".")[0] for name in imports(path)}


@functools.cache
def file_of(dotted: str) -> Path | None:
    """The file of our package that a dotted import reads."""
    parts = dotted.split(".")[1:]
    for length in (len(parts), len(parts) - 1):
        base = PACKAGE.joinpath(*parts[:length])
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if length > 0 and candidate.is_file():
                return candidate
    return None


@functools.cache
def reached(path: Path) -> dict[Path, set[str]]:
    """Files of ours that importing `path` imports in turn, with the outside packages each imports."""
    found: dict[Path, set[str]] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        names = imports(current, at_import_only=True)
        found[current] = {name.split(".")[0] for name in names} - {"flashtalk_cli"}
        ours = (file_of(name) for name in names if name.startswith("flashtalk_cli."))
        waiting += [file for file in ours if file is not None]
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_what_lies_below_it(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is a new room: say here what it may import"
    assert rooms_imported(path) <= ALLOWED[room] | {room}, name_of(path)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "media"], ids=name_of)
def test_media_never_imports_torch(path):
    assert not {name.split(".")[0] for name in imports(path)} & HEAVY


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) in ("cli", "launch", "presets", "events", "log")], ids=name_of
)
def test_the_parents_side_loads_without_torch(path):
    for file, packages in reached(path).items():
        assert not packages & HEAVY, f"{name_of(path)} -> {name_of(file)} -> {packages & HEAVY}"


def test_of_the_live_room_only_the_stage_and_what_ties_it_in_know_torch():
    """All else of it is tested, and simulated, without a network."""
    with_torch = {path.name for path in FILES if room_of(path) == "live" and imports_torch(path)}
    assert with_torch == {"stage.py"}
    for path in FILES:
        if room_of(path) == "live" and path.name not in ("stage.py", "session.py"):
            assert not {p.name for p in reached(path)} & {"stage.py", "session.py"}, name_of(path)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "cli"], ids=name_of)
def test_the_command_line_touches_models_by_their_folders_only(path):
    probe = path.name == "probe.py"  # a process of its own
    for name in imports(path):
        if name.startswith("flashtalk_cli.models") and not probe:
            assert name_of(file_of(name)) in LIGHT_MODELS, name


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "cli"], ids=name_of)
def test_the_command_line_touches_training_by_its_config_only(path):
    for name in imports(path):
        if name.startswith("flashtalk_cli.distill"):
            assert file_of(name) in (PACKAGE / LIGHT_DISTILL, PACKAGE / "distill/__init__.py"), name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_environment_is_no_api(path):
    """os.environ and os.getenv only where allowed, and there only the variables listed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    reads = [
        node
        for node in ast.walk(tree)
        if getattr(node, "attr", getattr(node, "id", "")) in ("environ", "getenv")
    ]
    if name_of(path) not in ENVIRONMENT:
        assert not reads, f"{name_of(path)}, line {reads[0].lineno}"
        return
    allowed = ENVIRONMENT[name_of(path)]
    words = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    capitals = {word for word in words if word.isupper() and "_" in word and word.isidentifier()}
    assert allowed is None or capitals <= allowed


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_logging_is_set_up_in_one_place_and_nothing_is_printed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in calls
    if room_of(path) != "log":
        assert not {"logging.basicConfig", "logging.StreamHandler"} & set(calls)


def test_no_ring_of_files():
    """Nothing that a file imports imports it back."""
    for path in FILES:
        for name in imports(path, at_import_only=True):
            file = file_of(name) if name.startswith("flashtalk_cli.") else None
            if file is not None and file != path:
                assert path not in reached(file), f"{name_of(path)} <-> {name_of(file)}"


def test_the_reader_of_imports_reads_them(tmp_path, monkeypatch):
    """What the tests above rest on: nested imports are found, those for type checkers are not."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "sample.py"
    path.write_text(
        "import a.b\nfrom c import d as e\n"
        "if TYPE_CHECKING:\n    import hidden\n"
        "def f():\n    import inner\n"
        "class C:\n    import held\n"
        "try:\n    import tried\nexcept ImportError:\n    pass\n"
    )
    assert list(imports(path)) == ["a.b", "c.d", "inner", "held", "tried"]
    assert list(imports(path, at_import_only=True)) == ["a.b", "c.d", "held", "tried"]

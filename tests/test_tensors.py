"""Files of tensors: read as the libraries read them, and damaged ones told in a line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.tensors import PickleSource, SafetensorsSource


def test_pickles_of_the_old_format_are_read(tmp_path: Path) -> None:
    """Files that torch wrote before 1.6 cannot be memory-mapped; they are read all the same."""
    path = tmp_path / "old.pth"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(PickleSource(path).read("a"), torch.arange(3.0))


@pytest.fixture(scope="session")
def small_pickle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pickled") / "small.pth"
    torch.save({"a": torch.ones(3, 2), "b": torch.zeros(1)}, path)
    return path


@given(data=st.data())
def test_a_damaged_pickle_is_a_model_error_or_read(small_pickle: Path, data: st.DataObject) -> None:
    """Whichever bytes are changed, nothing but ModelError comes out: torch's reader fails in many ways."""
    whole = bytearray(small_pickle.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = small_pickle.with_name("damaged.pth")
    damaged.write_bytes(whole)
    message = ""
    try:
        PickleSource(damaged)
    except ModelError as error:
        message = str(error)
    assert "\n" not in message


def test_names_of_a_pickle_are_texts(tmp_path: Path) -> None:
    torch.save({1: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="not a plain state dict"):
        PickleSource(tmp_path / "a.pth")


class _Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle ran code",))


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither a plain pickle nor one in torch's format; nor is anything but tensors taken."""
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"a": _Malice()}))
    with pytest.raises(ModelError):
        PickleSource(path)
    torch.save({"a": _Malice()}, path)
    with pytest.raises(ModelError):
        PickleSource(path)
    assert capsys.readouterr().out == ""
    torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    with pytest.raises(ModelError, match="not a plain state dict"):
        PickleSource(path)


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
    save_file({str(kind): torch.ones(2, 3).to(kind) for kind in kinds} | {"scalar": torch.tensor(2.5)}, path)
    return path


def test_our_reader_agrees_with_the_library(small_file: Path) -> None:
    """Every number format and a scalar, as `safetensors` itself reads them."""
    source, theirs = SafetensorsSource([small_file]), load_file(small_file)
    assert source.shapes == {key: tuple(value.shape) for key, value in theirs.items()}
    for key, value in theirs.items():
        ours = source.read(key)
        assert ours.dtype == value.dtype
        assert torch.equal(ours.double(), value.double())


@given(data=st.data())
def test_a_damaged_header_is_a_model_error_or_read(small_file: Path, data: st.DataObject) -> None:
    """Whichever byte of the header is changed, nothing but ModelError comes out, and no wrong read."""
    whole = bytearray(small_file.read_bytes())
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    whole[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    damaged = small_file.with_name("damaged.safetensors")
    damaged.write_bytes(whole)
    message, source = "", None
    try:
        source = SafetensorsSource([damaged])
    except ModelError as error:
        message = str(error)
    assert "\n" not in message
    for key, shape in source.shapes.items() if source else ():
        assert tuple(source.read(key).shape) == shape

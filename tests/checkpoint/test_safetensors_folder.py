"""Safetensors headers: what is corrupt is named before any tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tokenspeed.checkpoint.safetensors_folder import INDEX, read_headers
from tokenspeed.errors import CheckpointError

FILE = "model.safetensors"


def raw(header: object, data: int = 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (4, 4), offsets: object = (0, 64)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header length"),
    "seven bytes": (b"1234567", "header length"),
    "length 0": (raw(b"{}", length=0), "header length 0"),
    "length 2^63": (raw(b"{}", length=2**63), "header length 9223372036854775808"),
    "length past the end": (raw(b"{}", length=5000), "past the end"),
    "not JSON": (raw(b"{{{{"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not valid JSON"),
    "deep JSON": (raw(b"[" * 200_000), "not valid JSON"),
    "a list": (raw([1, 2]), "not a JSON object"),
    "name twice": (raw(b'{"a":1,"a":2}'), "a appears twice"),
    "name with a line break": (raw({"a\nb": entry()}), "tensor 'a\\nb'"),
    "entry not an object": (raw({"w": 5}), "tensor w"),
    "unknown dtype": (raw({"w": entry(dtype="F7")}), "tensor w: dtype 'F7'"),
    "dtype missing": (raw({"w": {"shape": [1], "data_offsets": [0, 4]}}), "tensor w: dtype None"),
    "negative shape": (raw({"w": entry(shape=(-4, 4))}), "tensor w: shape"),
    "shape of booleans": (raw({"w": entry(shape=(True, 16))}), "tensor w: shape"),
    "shape overflow": (
        raw({"w": entry(shape=(2**40, 2**40))}),
        "tensor w: shape [1099511627776, 1099511627776] overflows",
    ),
    "shape and offsets differ": (raw({"w": entry(shape=(4, 5))}), "tensor w: shape [4, 5] of F32 is 80 bytes"),
    "reversed offsets": (raw({"w": entry(offsets=(64, 0))}), "tensor w: data_offsets [64, 0] are reversed"),
    "negative offsets": (raw({"w": entry(offsets=(-64, 0))}), "tensor w: data_offsets"),
    "one offset": (raw({"w": entry(offsets=(64,))}), "tensor w: data_offsets"),
    "offsets past the end": (raw({"w": entry()}, data=63), "tensor w: data_offsets [0, 64] are past the end"),
    "overlap": (
        raw({"w": entry(), "v": entry(shape=(4,), offsets=(48, 64))}),
        "tensor v: data_offsets overlap those of w",
    ),
}


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as failure:
        read_headers(folder)
    message = str(failure.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_header_is_named(tmp_path: Path, case: str) -> None:
    content, named = CORRUPT[case]
    (tmp_path / FILE).write_bytes(content)
    message = refused(tmp_path)
    assert named in message and FILE in message


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}, tmp_path / FILE, {"format": "pt"}
    )
    tensors = read_headers(tmp_path)
    assert {name: (tensor.dtype, tensor.shape, tensor.num_bytes) for name, tensor in tensors.items()} == {
        "a": ("BF16", (3, 5), 30),
        "empty": ("F32", (0, 4), 0),
    }


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:cut])
        assert FILE in refused(tmp_path)


def _sharded(folder: Path) -> dict[str, Any]:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_merged(tmp_path: Path) -> None:
    _sharded(tmp_path)
    assert {name: tensor.file.name for name, tensor in read_headers(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "parent folder": (
        lambda index: index["weight_map"].update(a="../one.safetensors"),
        "weight_map.a: '../one.safetensors'",
    ),
    "absolute path": (lambda index: index["weight_map"].update(a="/etc/passwd"), "weight_map.a"),
    "a pickle": (lambda index: index["weight_map"].update(a="pytorch_model.bin"), "weight_map.a"),
    "not a string": (lambda index: index["weight_map"].update(a=7), "weight_map.a"),
    "no map": (lambda index: index.pop("weight_map"), "weight_map"),
    "missing shard": (lambda index: index["weight_map"].update(a="three.safetensors"), "three.safetensors"),
    "wrong shard": (lambda index: index["weight_map"].update(a="two.safetensors"), "tensor a is missing"),
    "missing tensor": (lambda index: index["weight_map"].update(c="two.safetensors"), "tensor c is missing"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_a_faulty_index_is_named(tmp_path: Path, fault: str) -> None:
    change, named = INDEX_FAULTS[fault]
    index = _sharded(tmp_path)
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert named in refused(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    shard = tmp_path / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    message = refused(tmp_path)
    assert "two.safetensors" in message and "tensor b" in message


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    assert "tensor a is also in one.safetensors" in refused(tmp_path)


def test_model_safetensors_goes_before_other_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / FILE)
    save_file({"b": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert list(read_headers(tmp_path)) == ["a"]

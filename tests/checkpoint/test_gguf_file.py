"""GGUF files: every type dequantises, and no corrupt file gets past the door."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import _type_traits, dequantize

from tests.checkpoint.toy_gguf import GGUFType, write_llama
from tests.toy import toy_llama
from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.errors import CheckpointError

ROWS, COLUMNS = 5, 512


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    write_llama(folder / "small.gguf", toy_llama(folder, num_hidden_layers=1))
    return (folder / "small.gguf").read_bytes()


def refused(path: Path, content: bytes) -> str:
    """The one line that opening `content` ends in; fails if it opens or takes long."""
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as failure:
        GGUFFile(path)
    assert time.perf_counter() - start < 2
    message = str(failure.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("kind", [GGUFType.F32, GGUFType.F16, *_type_traits], ids=lambda kind: kind.name)
def test_every_type_dequantises_like_the_gguf_package(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 120, (ROWS, COLUMNS // block * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    writer.add_tensor("odd", np.ones(3, dtype=np.float32))
    writer.add_tensor("sample", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "types.gguf") as file:
        assert file.tensors["sample"].shape == (ROWS, COLUMNS)
        values = file.dequantised("sample")
        assert values.dtype == np.float32 and values.shape == (ROWS, COLUMNS)
        np.testing.assert_array_equal(values, dequantize(raw, kind))
        np.testing.assert_array_equal(file.dequantised("odd"), np.ones(3))


def test_large_tensors_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bytes) -> None:
    (tmp_path / "small.gguf").write_bytes(small)
    with GGUFFile(tmp_path / "small.gguf") as file:
        whole = file.dequantised("token_embd.weight")
        monkeypatch.setattr("tokenspeed.checkpoint.gguf_file.PART_ELEMENTS", 1000)
        parts = dict(file.dequantised_rows("token_embd.weight"))
        assert len(parts) > 10
        np.testing.assert_array_equal(np.concatenate([parts[start] for start in sorted(parts)]), whole)


def test_metadata_equals_that_of_the_gguf_package(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small)
    fields = gguf.GGUFReader(path).fields
    with GGUFFile(path) as file:
        assert file.metadata == {name: field.contents() for name, field in fields.items() if "." in name[5:]}
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 512


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, small: bytes) -> None:
    draw = random.Random(3)
    cuts = [0, 3, 4, 7, 8, 23, 24, 30, len(small) - 1, *(draw.randrange(len(small)) for _ in range(60))]
    for cut in cuts:
        refused(tmp_path / "cut.gguf", small[:cut])
    assert "tensor output.weight: needs bytes" in refused(tmp_path / "cut.gguf", small[: len(small) - 1])


def test_flipped_header_bytes_are_refused_or_harmless(tmp_path: Path, small: bytes) -> None:
    draw = random.Random(4)
    header = small.index(b"blk.0.ffn_down")
    path = tmp_path / "flipped.gguf"
    outcomes = {"opened": 0, "refused": 0}
    start = time.perf_counter()
    for _ in range(300):
        content = bytearray(small)
        for _ in range(draw.choice((1, 1, 4))):
            content[draw.choice((draw.randrange(64), draw.randrange(header)))] = draw.choice(
                (0, 255, draw.randrange(256))
            )
        path.write_bytes(content)
        try:
            GGUFFile(path).close()
            outcomes["opened"] += 1
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
    assert time.perf_counter() - start < 20


def header(num_tensors: int = 0, num_keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_keys)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(
    name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (header(magic=b"GGML"), "magic"),
    "version": (header(version=1), "version"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensor count": (header(num_tensors=2**63), "tensor_count"),
    "key count": (header(num_keys=2**63), "metadata_kv_count"),
    "key length": (header(num_keys=1) + struct.pack("<Q", 2**63) + b"x" * 64, "key 0"),
    "key not utf-8": (header(num_keys=1) + string(b"\xff\xfe") + bytes(64), "key 0: not UTF-8"),
    "key with a line break": (header(num_keys=1) + string(b"a\nb") + bytes(64), "key 0"),
    "tensor with a line break": (header(1) + tensor(name=b"a\nb") + bytes(256), "name of tensor 0"),
    "value type": (header(num_keys=1) + string(b"a.b") + struct.pack("<I", 77) + bytes(64), "a.b: unknown value type"),
    "array length": (header(num_keys=1) + string(b"a.b") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(64), "a.b"),
    "array past the end": (header(num_keys=1) + string(b"a.b") + struct.pack("<IIQ", 9, 4, 4000) + bytes(64), "a.b"),
    "array nesting": (
        header(num_keys=1) + string(b"a.b") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50,
        "a.b",
    ),
    "key twice": (header(num_keys=2) + 2 * (string(b"a.b") + struct.pack("<IB", 0, 1)), "a.b: appears twice"),
    "alignment": (
        header(num_keys=1) + string(b"general.alignment") + struct.pack("<II", 4, 0) + bytes(64),
        "general.alignment",
    ),
    "no dimensions": (header(1) + tensor(dims=()) + bytes(256), "tensor t: 0 dimensions"),
    "many dimensions": (header(1) + tensor(num_dims=99) + bytes(256), "tensor t: 99 dimensions"),
    "zero dimension": (header(1) + tensor(dims=(32, 0)) + bytes(256), "tensor t: shape"),
    "shape overflow": (header(1) + tensor(dims=(2**32, 2**32)) + bytes(256), "tensor t: needs bytes"),
    "offset": (header(1) + tensor(offset=2**63) + bytes(256), "tensor t: needs bytes"),
    "offset alignment": (header(1) + tensor(offset=5) + bytes(256), "tensor t: offset"),
    "unknown type": (header(1) + tensor(kind=250) + bytes(256), "tensor t: unknown type"),
    "part of a block": (header(1) + tensor(dims=(33,), kind=2) + bytes(256), "tensor t: row of 33"),
    "tensor twice": (header(2) + 2 * tensor() + bytes(512), "tensor t: appears twice"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corruption_is_named(tmp_path: Path, case: str) -> None:
    content, named = CORRUPT[case]
    assert named in refused(tmp_path / "corrupt.gguf", content)


def test_a_sound_file_of_the_same_builder_opens(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(header(1, 1) + string(b"a.b") + struct.pack("<IB", 0, 1) + tensor() + bytes(256))
    with GGUFFile(path) as file:
        assert file.metadata == {"a.b": 1} and file.tensors["t"].shape == (32,)

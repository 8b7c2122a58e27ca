"""Weights from a checkpoint into a model: what is there is compared with what is needed before a byte is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from gguf.constants import GGML_QUANT_SIZES

from tokenspeed.checkpoint.config import ModelConfig, positive_int, read_folder_quantisation
from tokenspeed.checkpoint.folder_weights import FolderWeights, Part, read_whole
from tokenspeed.checkpoint.gguf_blocks import FORMS
from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.checkpoint.packing import Blocks, PackedBlocks, PackedRows
from tokenspeed.checkpoint.random_weights import fill_random
from tokenspeed.checkpoint.source import Source
from tokenspeed.errors import CheckpointError
from tokenspeed.kernels.forms import PANELS, ROWS
from tokenspeed.kernels.platform import Platform
from tokenspeed.layers.module import Weight
from tokenspeed.parallel.shards import Piece, tensor_shape

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""

Fill = tuple[Weight, Piece]
"""A parameter and what of it one checkpoint tensor fills."""

SHOWN = 4


class Loadable(Protocol):
    """What the loader needs of a model: its weights, and the tensors that it does without."""

    ignored: re.Pattern[str]

    def weights(self) -> Iterable[Weight]: ...


class WeightReader(Protocol):
    """The tensors of one checkpoint under Hugging Face's names."""

    shapes: dict[str, tuple[int, ...]]
    num_bytes: dict[str, int]

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Copy the tensor into `target`, which has its shape and any float dtype."""

    def read_parts(self, name: str, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
        """Copy parts of the tensor, each into its target. Where the file allows it, nothing else is read."""

    def close(self) -> None: ...


def open_weights(source: Source) -> WeightReader:
    """Open a checkpoint's tensors. Raises `CheckpointError` naming the file and field that is broken."""
    if source.kind == "gguf":
        return _GGUFWeights(source.path)
    return FolderWeights(source.path, read_folder_quantisation(source.path))


def iterate_weights(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of every tensor, under Hugging Face's names, one at a time."""
    with contextlib.closing(open_weights(source)) as reader:
        for name, shape in reader.shapes.items():
            tensor = torch.empty(shape, dtype=torch.float32)
            reader.read_into(name, tensor)
            yield name, tensor


def load_weights(model: Loadable, source: Source, progress: Progress | None = None) -> None:
    """Fill every parameter of `model` from `source`, or with random numbers if the source is a dummy.

    Raises `CheckpointError` in one line naming the missing, extra or misshapen tensors, before reading any.
    """
    if source.dummy:
        fill_random(model.weights(), progress)
        return
    weights = list(model.weights())
    wanted = _fills(weights)
    with contextlib.closing(open_weights(source)) as reader:
        _compare(tensor_shapes(weights), reader, model.ignored, source.path)
        total, done = sum(reader.num_bytes[name] for name in wanted), 0
        blocks = _packed_blocks(weights, reader)
        rows = {id(weight): PackedRows(weight) for weight in weights if weight.form == PANELS}
        for name in (name for name in reader.shapes if name in wanted):
            _fill(reader, name, wanted[name], blocks, rows)
            done += reader.num_bytes[name]
            if progress is not None:
                progress(done, total)


def tensor_shapes(weights: Iterable[Weight]) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors that fill these parameters over all ranks, in their order, with the shapes that they must
    have."""
    fills: dict[str, list[tuple[tuple[int, ...], Piece]]] = {}
    for weight in weights:
        for piece in weight.whole_pieces:
            fills.setdefault(piece.source, []).append((weight.whole_shape, piece))
    return {name: tensor_shape(pieces) for name, pieces in fills.items()}


def _fills(weights: Iterable[Weight]) -> dict[str, list[Fill]]:
    """What this rank needs of each checkpoint tensor."""
    fills: dict[str, list[Fill]] = {}
    for weight in weights:
        for piece in weight.pieces:
            fills.setdefault(piece.source, []).append((weight, piece))
    return fills


def stored_forms(source: Source) -> dict[str, str]:
    """The tensors of a checkpoint that kernels multiply as they are stored, with their forms."""
    if source.dummy or source.kind != "gguf":
        return {}
    with contextlib.closing(_GGUFWeights(source.path)) as reader:
        return reader.forms


def _packed_blocks(weights: Iterable[Weight], reader: WeightReader) -> dict[int, PackedBlocks]:
    """What takes the stored tensors of packed weights, which only GGUF files have, by the weight's id."""
    if not isinstance(reader, _GGUFWeights):
        return {}
    return {id(weight): PackedBlocks(weight, reader) for weight in weights if weight.form not in (ROWS, PANELS)}


def _fill(
    reader: WeightReader,
    name: str,
    fills: list[Fill],
    blocks: Mapping[int, PackedBlocks],
    packed_rows: Mapping[int, PackedRows],
) -> None:
    weight, piece = fills[0]
    if (packing := blocks.get(id(weight))) is not None:
        packing.add(name, piece)
        return
    packed = [packed_rows.get(id(weight)) for weight, _ in fills]
    into = [
        weight.parameter.data[piece.at] if rows is None else rows.numbers()[piece.at]
        for rows, (weight, piece) in zip(packed, fills, strict=True)
    ]
    if piece.part:
        reader.read_parts(name, [(piece.part, numbers) for (_, piece), numbers in zip(fills, into, strict=True)])
    else:
        reader.read_into(name, into[0])
    for rows in packed:
        if rows is not None:
            rows.filled()


def default_dtype(config: ModelConfig, platform: Platform) -> torch.dtype:
    """The dtype to compute in when none is asked for.

    A float32 checkpoint stays float32. Anything else runs in bfloat16, except on a CPU that has no
    instructions for it. There bfloat16 reads half the bytes, but the embedded model differs from float32 by 0.001
    nats and in 2% of its best tokens, and float32 costs only speed.
    """
    slow = platform.vendor == "cpu" and platform.isa.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))
    return torch.float32 if config.dtype == "float32" or slow else torch.bfloat16


def _compare(
    needed: dict[str, tuple[int, ...]], reader: WeightReader, ignored: re.Pattern[str], path: Path
) -> None:
    shapes = reader.shapes
    missing = [name for name in needed if name not in shapes]
    extra = [name for name in shapes if name not in needed and ignored.fullmatch(name) is None]
    misshapen = [
        f"{name} is {list(shapes[name])}, must be {list(shape)}"
        for name, shape in needed.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    parts = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults if names]
    if parts:
        raise CheckpointError(f"{path}: tensors do not fit the configuration: {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


# GGUF's name → Hugging Face's, for the llama architecture.
GGUF_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GGUF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
GGUF_CONFIG_TENSORS = {"rope_freqs.weight"}


class _GGUFWeights:
    """A llama GGUF. Its q and k rows are stored with the two halves of each rotated head interleaved."""

    def __init__(self, path: Path) -> None:
        self._gguf = GGUFFile(path)
        heads = positive_int(self._gguf.metadata, "llama.attention.head_count", str(path))
        kv_heads = self._gguf.metadata.get("llama.attention.head_count_kv", heads)
        self._heads = {"q_proj": heads, "k_proj": kv_heads}
        stored = [name for name in self._gguf.tensors if name not in GGUF_CONFIG_TENSORS]
        self._stored = {_hugging_face_name(name): name for name in stored}
        self.shapes = {name: self._gguf.tensors[stored].shape for name, stored in self._stored.items()}
        self.num_bytes = {name: self._gguf.tensors[stored].num_bytes for name, stored in self._stored.items()}
        types = {name: self._gguf.tensors[stored].type for name, stored in self._stored.items()}
        matrices = (name for name, shape in self.shapes.items() if len(shape) == 2)
        self.forms = {name: FORMS[types[name]][0] for name in matrices if types[name] in FORMS}

    def blocks(self, name: str) -> Blocks:
        tensor = self._gguf.tensors[self._stored[name]]
        rows = torch.from_numpy(self._gguf.stored(tensor.name).reshape(tensor.shape[0], -1))
        ordered = torch.empty_like(rows)
        into = self._in_our_order(name, ordered)
        into.copy_(rows.view(into.shape))
        return Blocks(ordered, GGML_QUANT_SIZES[tensor.type][1])

    def _in_our_order(self, name: str, target: torch.Tensor) -> torch.Tensor:
        """`target` as what the stored rows are copied into."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return target
        # Stored row (head, i, half) is our row (head, half, i): rotation pairs x[i] with x[i + D/2].
        return target.view(heads, 2, -1, *target.shape[1:]).transpose(1, 2)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        if name.split(".")[-2] in self._heads:
            target = self._in_our_order(name, target)
            values = torch.from_numpy(self._gguf.dequantised(self._stored[name]))
            target.copy_(values.view(target.shape))
            return
        for start, rows in self._gguf.dequantised_rows(self._stored[name]):
            target[start : start + rows.shape[0]].copy_(torch.from_numpy(rows))

    def read_parts(self, name: str, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
        read_whole(self, name, parts)

    def close(self) -> None:
        self._gguf.close()


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; its own name, which fits no model, if it is unknown."""
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_TOP:
        return f"{GGUF_TOP[stem]}.{kind}"
    match = GGUF_BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in GGUF_BLOCK:
        return name
    return f"model.layers.{match[1]}.{GGUF_BLOCK[match[2]]}.{match[3]}"

"""The tensors of a GGUF file under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenspeed.checkpoint.config import positive_int
from tokenspeed.checkpoint.folder_weights import Part, read_whole
from tokenspeed.checkpoint.gguf_blocks import FORMS, taken_apart
from tokenspeed.checkpoint.gguf_fields import FAMILIES
from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.kernels.forms import Rows

# llama.cpp's name → Hugging Face's.
TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
"""Of all experts of a layer [E, N, K]; Hugging Face's has a tensor [N, K] each."""

BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
CONFIG_TENSORS = {"rope_freqs.weight"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: in the stored one, from row `first` on. Groups of `interleaved` rows have the two halves of
    a head alternate; 0: the rows are in order."""

    stored: str
    shape: tuple[int, ...]
    first: int = 0
    interleaved: int = 0


class GGUFWeights:
    """A GGUF file of one of `FAMILIES`, its q and k rows in Hugging Face's order."""

    def __init__(self, path: Path) -> None:
        self._gguf = GGUFFile(path)
        metadata, tensors = self._gguf.metadata, self._gguf.tensors
        family = metadata["general.architecture"]
        heads = {}
        if FAMILIES[family].interleaved:
            q_heads = positive_int(metadata, f"{family}.attention.head_count", str(path))
            heads = {"attn_q": q_heads, "attn_k": metadata.get(f"{family}.attention.head_count_kv", q_heads)}
        stored = (name for name in tensors if name not in CONFIG_TENSORS)
        self._places = {ours: place for name in stored for ours, place in _places(name, tensors[name].shape, heads)}
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.num_bytes, self.forms = {}, {}
        for name, place in self._places.items():
            tensor = tensors[place.stored]
            self.num_bytes[name] = tensor.num_bytes // (tensor.shape[0] if place.shape != tensor.shape else 1)
            if len(place.shape) == 2 and tensor.type in FORMS:
                self.forms[name] = FORMS[tensor.type][0]

    def rows(self, name: str, first: int, last: int) -> Iterator[tuple[int, Rows | torch.Tensor]]:
        """Rows of a matrix, those of `forms` as they are stored (`RowReader`)."""
        if name not in self.forms:
            yield from self._float_rows(name, first, last)
            return
        place = self._places[name]
        kind = self._gguf.tensors[place.stored].type
        for start, raw in self._gguf.stored_rows(place.stored, *_around(place, first, last)):
            yield start - place.first, taken_apart(kind, _in_order(torch.from_numpy(raw), place))

    def _float_rows(self, name: str, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        place = self._places[name]
        for start, rows in self._gguf.dequantised_rows(place.stored, *_around(place, first, last)):
            yield start - place.first, _in_order(torch.from_numpy(rows), place)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        if target.dim() == 1:
            place = self._places[name]
            values = torch.from_numpy(self._gguf.dequantised(place.stored))
            target.copy_(_in_order(values, place))
            return
        for start, rows in self._float_rows(name, 0, target.shape[0]):
            target[start : start + rows.shape[0]].copy_(rows)

    def read_parts(self, name: str, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
        read_whole(self, name, parts)

    def close(self) -> None:
        self._gguf.close()


def _around(place: Place, first: int, last: int) -> tuple[int, int, int]:
    """Which rows of the stored tensor to read, and how many always together: whole heads of interleaved ones."""
    head = place.interleaved or 1
    return place.first + first // head * head, place.first + -(-last // head) * head, head


def _in_order(rows: torch.Tensor, place: Place) -> torch.Tensor:
    """Stored row (head, i, half) is our row (head, half, i): rotation pairs x[i] with x[i + D/2]."""
    if not place.interleaved:
        return rows
    return rows.view(-1, place.interleaved // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _places(name: str, shape: tuple[int, ...], heads: dict[str, int]) -> Iterator[tuple[str, Place]]:
    """The Hugging Face names of a stored tensor; its own name, which fits no model, if it is unknown."""
    stem, _, kind = name.rpartition(".")
    match = BLOCK_NAME.fullmatch(name)
    if stem in TOP:
        yield f"{TOP[stem]}.{kind}", Place(name, shape)
    elif match is not None and match[2] in BLOCK:
        count = heads.get(match[2], 0)
        interleaved = shape[0] // count if count and shape[0] % (2 * count) == 0 else 0
        yield f"model.layers.{match[1]}.{BLOCK[match[2]]}.{kind}", Place(name, shape, interleaved=interleaved)
    elif match is not None and match[2] in EXPERTS and len(shape) == 3:
        for expert in range(shape[0]):
            ours = f"model.layers.{match[1]}.mlp.experts.{expert}.{EXPERTS[match[2]]}.{kind}"
            yield ours, Place(name, shape[1:], first=expert * shape[1])
    else:
        yield name, Place(name, shape)

"""Packed weights while they are loaded: their rows as they are stored, until the last one has come."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from tokenspeed.checkpoint.gguf_blocks import packed
from tokenspeed.kernels.forms import pack
from tokenspeed.layers.module import Weight
from tokenspeed.parallel.shards import Piece


class Blocks(NamedTuple):
    """A quantised tensor as it is stored: rows [N, bytes of a row] of blocks of so many bytes."""

    rows: torch.Tensor
    block_bytes: int


class BlockReader(Protocol):
    """A checkpoint that hands out stored tensors."""

    def blocks(self, name: str) -> Blocks: ...


class PackedBlocks:
    """One weight on its way. Its pieces are whole tensors, one below the other."""

    def __init__(self, weight: Weight, reader: BlockReader) -> None:
        self._weight, self._reader = weight, reader
        self._missing = len(weight.pieces)
        self._rows: torch.Tensor | None = None

    def add(self, name: str, piece: Piece) -> None:
        """Read the tensor of one piece; with the last one, fill the weight."""
        stored = self._reader.blocks(name)
        if self._rows is None:
            self._rows = torch.empty((self._weight.shape[0], stored.rows.shape[1]), dtype=torch.uint8)
        self._rows[piece.at[0]] = stored.rows
        self._missing -= 1
        if not self._missing:
            self._weight.parameter.data.copy_(packed(self._weight.form, self._rows, stored.block_bytes).data)
            self._rows = None


class PackedRows:
    """One weight of plain numbers on its way into panels."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self._missing = len(weight.pieces)
        self._rows: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        """What the pieces are read into, as if it were the parameter [rows, columns]."""
        if self._rows is None:
            data = self._weight.parameter.data
            self._rows = torch.empty(self._weight.shape, dtype=data.dtype, device=data.device)
        return self._rows

    def filled(self) -> None:
        """One more piece is there; with the last one, fill the weight."""
        self._missing -= 1
        if not self._missing:
            self._weight.parameter.data.copy_(pack(self.numbers()).data)
            self._rows = None

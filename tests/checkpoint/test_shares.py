"""A rank reads its share of a checkpoint, and nothing else of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.layers.over_ranks import models_of
from tests.models.families import write
from tokenspeed.checkpoint import folder_weights
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.shards import filled_shape

FLOAT32 = 4


class Counted:
    """A file of safetensors that counts the bytes of what is taken out of it."""

    read = 0

    def __init__(self, file: Path, framework: str) -> None:
        self._file: Any = safe_open(file, framework=framework)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._counted(self._file.get_tensor(name))

    def get_slice(self, name: str) -> _Slices:
        return _Slices(self._file.get_slice(name), self)

    def _counted(self, values: torch.Tensor) -> torch.Tensor:
        Counted.read += values.nbytes
        return values


class _Slices:
    def __init__(self, slices: Any, file: Counted) -> None:
        self._slices, self._file = slices, file

    def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
        return self._file._counted(self._slices[part])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Counted]]:
    Counted.read = 0
    monkeypatch.setattr(folder_weights, "safe_open", Counted)
    yield Counted


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("qwen2", Mesh.of(2)),
        ("deepseek-v3", Mesh.of(4)),
        ("deepseek-v3", Mesh.of(4, attn_dp=4, moe_ep=4, dense_tp=4)),
    ],
)
def test_each_rank_reads_the_bytes_of_its_own_parameters(
    tmp_path: Path, counted: type[Counted], family: str, mesh: Mesh
) -> None:
    write(tmp_path, family, num_hidden_layers=2)
    stored = (tmp_path / "model.safetensors").stat().st_size
    for rank, model in enumerate(models_of(tmp_path, mesh, "cpu")):
        counted.read = 0
        load_weights(model, resolve(str(tmp_path)))
        shapes = (
            filled_shape(tuple(weight.parameter.shape), piece) for weight in model.weights() for piece in weight.pieces
        )
        assert counted.read == FLOAT32 * sum(math.prod(shape) for shape in shapes), f"rank {rank}"
        assert counted.read < 0.8 * stored

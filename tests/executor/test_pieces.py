"""A model run in pieces, padded, gives what it gives in one go, and writes nothing else into its cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import families
from tests.models.paged import PagedModel
from tests.toy import VOCAB_SIZE, toy_llama
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights
from tokenspeed.executor import pieces
from tokenspeed.executor.pieces import PieceGraphs
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import Routed, Router
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model

CPU = torch.device("cpu")
BLOCK_SIZE, MOST = 16, 100
SIZES = [size for size in pieces.SIZES if size <= MOST]


class InPieces:
    """A model whose steps with prompts are run by `PieceGraphs`; `sizes` says of how many tokens."""

    def __init__(self, model: CausalLM, kv: Sequence[LayerKV]) -> None:
        self._model, self._pieces = model, PieceGraphs(model.pieces, kv, MOST, CPU)
        self.sizes: list[int] = []

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        if inputs.num_decode == len(inputs.query_lens):
            return self._model.forward(inputs, kv)
        self.sizes.append(len(inputs.token_ids))
        return self._pieces(inputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)


def steps(seed: int) -> Iterator[list[tuple[str, list[int]]]]:
    """Chunks of a few sequences, decode rows first, of all numbers of tokens up to the largest that is padded."""
    draw = random.Random(seed)
    lengths = dict.fromkeys("abcdef", 0)
    for most in (1, 15, 16, 17, 40, 60, 3, 64, 50):
        names = draw.sample("abcdef", 4)
        old = [name for name in names[:3] if lengths[name]]
        chunks = [(name, 1) for name in old] + [(names[3], max(2, most - len(old)))]
        for name, count in chunks:
            lengths[name] += count
        yield [(name, [draw.randrange(VOCAB_SIZE) for _ in range(count)]) for name, count in chunks]


def model_of(folder: Path) -> CausalLM:
    source = resolve(str(folder))
    ctx = BuildContext.of(device=CPU, dtype=torch.float32, max_positions=512, block_size=BLOCK_SIZE)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return model


@pytest.mark.parametrize("family", ["llama", "deepseek-v2-lite", "deepseek-v3", "qwen3-moe"])
def test_pieces_and_attentions_are_the_model(tmp_path: Path, family: str) -> None:
    if family == "llama":
        toy_llama(tmp_path)
    else:
        families.write(tmp_path, family)
    model = model_of(tmp_path)
    whole, cut = (PagedModel(model, block_size=BLOCK_SIZE, dtype=torch.float32) for _ in range(2))
    cut.model = in_pieces = InPieces(model, cut.kv)  # type: ignore[assignment]
    for chunks in steps(seed=4):
        for expected, found in zip(whole.step(chunks), cut.step(chunks), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # NaN wherever nothing was to be stored: padding leaves no trace.
        for caches in zip(whole.kv, cut.kv, strict=True):
            for expected, found in zip(*caches, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert {size for size in SIZES if size in in_pieces.sizes}, "steps that fill a size"
    assert len({next(size for size in SIZES if size >= count) for count in in_pieces.sizes}) == len(SIZES)


def test_padding_asks_no_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.write(tmp_path, "deepseek-v2-lite")
    model = model_of(tmp_path)
    asked: list[torch.Tensor] = []
    for router in (each for each in model.modules() if isinstance(each, Router)):

        def noting(*args: Any, choose: Callable[..., Routed] = router._choose) -> Routed:
            routed = choose(*args)
            asked.append(routed[0])
            return routed

        monkeypatch.setattr(router, "_choose", noting)
    paged = PagedModel(model, block_size=BLOCK_SIZE, dtype=torch.float32)
    paged.model = InPieces(model, paged.kv)  # type: ignore[assignment]
    paged.step([("a", list(range(20)))])
    assert asked
    for ids in asked:
        assert len(ids) == 64 and (ids[:20] >= 0).all() and (ids[20:] < 0).all()


def test_a_step_is_padded_to_the_next_size_and_never_far() -> None:
    assert list(pieces.SIZES) == sorted(set(pieces.SIZES))
    assert all(after <= 1.5 * size for size, after in zip(pieces.SIZES[2:], pieces.SIZES[3:], strict=False))

"""A model over processes gives what it gives on one rank, whatever the layout, also where groups of ranks have
different numbers of tokens, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.models import rank_jobs
from tests.models.families import LLAMA, write
from tests.parallel.pool import Pool, started
from tests.toy import toy_llama
from tokenspeed.parallel.mesh import Mesh

LAYOUTS = {
    "cut in two": Mesh.of(2),
    "cut in four": Mesh.of(4),
    "experts dealt": Mesh.of(2, moe_ep=2),
    "experts dealt and cut": Mesh.of(4, moe_ep=2),
    "cut in four, experts dealt": Mesh.of(4, moe_ep=4),
    "attention copied": Mesh.of(2, attn_copies=2),
    "attention copied, experts dealt": Mesh.of(2, attn_copies=2, moe_ep=2),
    "own tokens": Mesh.of(2, attn_dp=2),
    "own tokens, experts dealt": Mesh.of(2, attn_dp=2, moe_ep=2),
    "own tokens of four, experts dealt": Mesh.of(4, attn_dp=4, moe_ep=4),
    "own tokens of pairs, everything else over all": Mesh.of(4, attn_dp=2, moe_ep=4, dense_tp=4, vocab_tp=4),
}
BY_FAMILY = {
    "llama": ["cut in two", "cut in four", "attention copied", "own tokens"],
    "qwen3": ["cut in two", "cut in four"],
    "qwen3-moe": ["experts dealt", "experts dealt and cut", "own tokens, experts dealt"],
    "deepseek-v3": list(LAYOUTS),
}
CASES = [(family, layout) for family, layouts in BY_FAMILY.items() for layout in layouts]

NUM_GENERATED = {2: 20, 4: 8}
"""Tokens of a sequence by the number of ranks: four processes on a small machine wait for each other for long."""

PROMPTS = {"a": 7, "b": 30, "c": 3}
"""Sequences and their lengths; "b" takes two steps, "c" begins when the others decode."""

GROUPS = {1: ["abc"], 2: ["ab", "c"], 4: ["a", "b", "c", ""]}
"""Which sequences each group of ranks has, by the number of groups; the last of four never has any."""

Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with started(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family == "llama":
            toy_llama(folder, **LLAMA)
        else:
            write(folder, family, num_hidden_layers=2)
        return folder

    return make


def steps(num_groups: int, generated: int) -> rank_jobs.Steps:
    """Chunks of prompts and decode rows in one step, decode steps, and at the end steps in which one group has nothing
    to do: the last two are the first group's alone."""
    generator = torch.Generator().manual_seed(7)
    a, b, c = (torch.randint(3, 250, (size,), generator=generator).tolist() for size in PROMPTS.values())
    beginning = [[("a", a), ("b", b[:20])], [("a", []), ("b", b[20:])], [("a", []), ("b", []), ("c", c)]]
    decode: list[tuple[str, list[int]]] = [("a", []), ("b", []), ("c", [])]
    whole = [*beginning, *[decode] * (generated - 2)]
    dealt = [[[one for one in step if one[0] in names] for names in GROUPS[num_groups]] for step in whole]
    if num_groups > 1:
        dealt[-2:] = [[first, *[[]] * (num_groups - 1)] for first, *_ in dealt[-2:]]
    return dealt


@functools.cache
def of_one_rank(folder: Path) -> dict[str, torch.Tensor]:
    return rank_jobs.run(rank_jobs.one_rank(folder), steps(1, max(NUM_GENERATED.values())), 0)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_any_layout_gives_the_logits_and_tokens_of_one_rank(
    pool: Pool, written: Written, family: str, layout: str
) -> None:
    mesh = LAYOUTS[layout]
    wanted = of_one_rank(written(family))
    groups = mesh.size("attn_data")
    given = steps(groups, NUM_GENERATED[mesh.world])
    for rank, logits in enumerate(pool.over(mesh, rank_jobs.generated, written(family), given)):
        group = mesh.coordinate(rank, "attn_data")
        assert set(logits) == set(GROUPS[groups][group])
        for name, got in logits.items():
            want = wanted[name][: len(got)]
            assert (got - want).abs().max() < 1e-4 * want.abs().max(), f"rank {rank}, sequence {name}"
            assert torch.equal(got.argmax(1), want.argmax(1)), f"rank {rank}, sequence {name}"


@pytest.mark.parametrize("layout", ["attention copied", "attention copied, experts dealt"])
def test_copies_of_attention_hold_the_same_bits(pool: Pool, written: Written, layout: str) -> None:
    one, other = pool.over(LAYOUTS[layout], rank_jobs.cached, written("deepseek-v3"), steps(1, 8))
    assert all(map(torch.equal, one, other)) and len(one) == len(other) > 0

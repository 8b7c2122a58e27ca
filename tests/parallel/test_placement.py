"""A mesh knows which ranks share what, factored differently by each part of a model."""

from __future__ import annotations

import pytest

from tokenspeed.parallel.placement import Mesh

EIGHT = Mesh(
    8,
    (
        ("attention", (("attn_data", 2), ("attn", 4))),
        ("experts", (("expert", 4), ("moe", 2))),
        ("dense", (("dense", 4),)),
    ),
)


def test_rank_sets_differ_along_one_axis_only() -> None:
    assert EIGHT.rank_sets("attn") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert EIGHT.rank_sets("attn_data") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert EIGHT.rank_sets("moe") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert EIGHT.rank_sets("expert") == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_a_factoring_that_leaves_ranks_out_is_seen() -> None:
    assert EIGHT.fills_world("attn") and EIGHT.fills_world("moe")
    assert not EIGHT.fills_world("dense")
    assert not EIGHT.fills_world("absent")


def test_one_rank_has_every_axis_at_size_1() -> None:
    mesh = Mesh.single()
    for axis in ("attn", "attn_data", "dense", "vocab"):
        assert mesh.size(axis) == 1 and mesh.rank_sets(axis) == ((0,),) and mesh.fills_world(axis)


def test_an_absent_axis_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        EIGHT.size("absent")
    with pytest.raises(KeyError):
        EIGHT.rank_sets("absent")

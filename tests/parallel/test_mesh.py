"""A mesh knows which ranks share what, factored differently by each part, and what all parts have in common."""

from __future__ import annotations

import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.layout import layout_of
from tokenspeed.parallel.mesh import Atom, Mesh
from tokenspeed.parallel.placement import Partial, Replicate, Shard

EIGHT = Mesh(
    8,
    (
        ("attention", (("attn_data", 2), ("attn", 4))),
        ("experts", (("moe_ep", 4), ("moe_tp", 2))),
        ("dense", (("dense", 4),)),
    ),
    (("moe", ("moe_ep", "moe_tp")),),
)


def refused(world: int, **sizes: int) -> str:
    with pytest.raises(ConfigError) as failure:
        Mesh.of(world, **sizes)
    return str(failure.value)


def test_rank_sets_differ_along_one_axis_only() -> None:
    assert EIGHT.rank_sets("attn") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert EIGHT.rank_sets("attn_data") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert EIGHT.rank_sets("moe_tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert EIGHT.rank_sets("moe_ep") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert EIGHT.rank_sets("moe") == (tuple(range(8)),)
    assert [EIGHT.coordinate(rank, "moe_ep") for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_atoms_are_the_cuts_of_all_parts_and_axes_runs_of_them() -> None:
    assert EIGHT.atoms() == (Atom(4, 2), Atom(2, 2), Atom(1, 2))
    assert [EIGHT.span(axis) for axis in ("attn_data", "attn", "moe_ep", "moe_tp", "moe")] == [
        range(0, 1),
        range(1, 3),
        range(0, 2),
        range(2, 3),
        range(0, 3),
    ]
    for axis in ("attn_data", "attn", "moe_ep", "moe_tp", "moe"):
        span = EIGHT.span(axis)
        assert EIGHT.atom_sets(span.start, span.stop) == EIGHT.rank_sets(axis)


def test_a_factoring_that_leaves_ranks_out_is_seen() -> None:
    assert EIGHT.fills_world("attn") and EIGHT.fills_world("moe")
    assert not EIGHT.fills_world("dense") and not EIGHT.fills_world("absent")


def test_one_rank_has_every_axis_at_size_1() -> None:
    mesh = Mesh.single()
    assert mesh.atoms() == ()
    for axis in ("attn", "attn_data", "dense", "vocab", "moe", "moe_ep"):
        assert mesh.size(axis) == 1 and mesh.rank_sets(axis) == ((0,),) and mesh.fills_world(axis)
        assert not mesh.span(axis)


def test_an_absent_axis_is_a_key_error() -> None:
    for ask in (EIGHT.size, EIGHT.rank_sets, EIGHT.span):
        with pytest.raises(KeyError):
            ask("absent")


def test_what_flags_leave_out_follows_from_what_they_say() -> None:
    def sizes(mesh: Mesh) -> tuple[int, ...]:
        return tuple(mesh.size(axis) for axis in ("attn_data", "attn", "dense", "moe_ep", "moe_tp", "vocab"))

    assert sizes(Mesh.of(8)) == (1, 8, 8, 1, 8, 8)
    assert sizes(Mesh.of(8, attn_dp=4)) == (4, 2, 2, 1, 8, 2)
    assert sizes(Mesh.of(8, attn_tp=2, moe_ep=4, dense_tp=8, vocab_tp=8)) == (4, 2, 8, 4, 2, 8)
    assert Mesh.of(8, moe_ep=2, moe_tp=2).size("moe_data") == 2


def test_attention_in_copies_leaves_everything_else_to_the_ranks_of_all_copies() -> None:
    def sizes(mesh: Mesh) -> tuple[int, ...]:
        return tuple(mesh.size(axis) for axis in ("attn_data", "attn_copies", "attn", "dense", "moe_tp", "vocab"))

    assert sizes(Mesh.of(2, attn_copies=2)) == (1, 2, 1, 2, 2, 2)
    assert sizes(Mesh.of(8, attn_copies=2)) == (1, 2, 4, 8, 8, 8)
    assert sizes(Mesh.of(8, attn_copies=2, attn_tp=2, moe_ep=8)) == (2, 2, 2, 4, 1, 4)
    mesh = Mesh.of(8, attn_copies=2, attn_dp=2, dense_tp=8)
    assert sizes(mesh) == (2, 2, 2, 8, 8, 4)
    assert mesh.rank_sets("attn_copies") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.copied("attn") == mesh.span("attn_copies") == range(1, 2)
    assert not mesh.copied("dense") and not Mesh.of(8).copied("attn") and not EIGHT.copied("attn")


def test_along_copies_ranks_hold_the_same_tokens() -> None:
    mesh = Mesh.of(8, attn_copies=2, attn_tp=2)
    assert layout_of(Replicate("attn"), mesh, "m").letters == "VRR"
    assert layout_of(Partial("attn"), mesh, "m").letters == "VRP"
    assert layout_of(Shard("attn", -1), mesh, "m").letters == "VRS"
    assert layout_of(Partial("dense"), mesh, "m").letters == "VPP"


def test_sizes_that_do_not_make_the_world_are_named_with_the_nearest_that_do() -> None:
    assert "--attn-tp-size 3 does not divide a world of 8 ranks; the nearest that does is 2" in refused(8, attn_tp=3)
    assert "--attn-tp-size 4 × --attn-dp-size 4 is 16" in refused(8, attn_tp=4, attn_dp=4)
    assert "must be 2" in refused(8, attn_tp=4, attn_dp=4)
    assert "--attn-copies 3 does not divide a world of 8 ranks; the nearest that does is 2" in refused(8, attn_copies=3)
    assert "--attn-dp-size 4 × --attn-copies 4 is 16, which" in refused(8, attn_dp=4, attn_copies=4)
    message = refused(8, attn_tp=2, attn_copies=2, attn_dp=4)
    assert "--attn-tp-size 2 × --attn-copies 2 × --attn-dp-size 4 is 16" in message and "must be 2" in message
    assert "--attn-copies must be at least 1, got 0" in refused(8, attn_copies=0)
    assert "--moe-ep-size 4 × --moe-tp-size 4 is 16, which does not divide" in refused(8, moe_ep=4, moe_tp=4)
    assert "--dense-tp-size must be at least 1, got 0" in refused(8, dense_tp=0)
    assert "at least 1 rank" in refused(0)


def test_parts_that_cut_the_world_in_ways_that_do_not_fit_are_both_named() -> None:
    message = refused(6, attn_tp=2, moe_ep=2, moe_tp=3)
    assert "attention (attn_data 3 × attn_copies 1 × attn 2) and experts (moe_data 1 × moe_ep 2 × moe_tp 3)" in message
    assert "3 is no multiple of 2; the nearest legal change is --moe-tp-size 2" in message
    Mesh.of(6, attn_tp=2, moe_ep=3, moe_tp=2)

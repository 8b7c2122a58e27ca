"""Which part of each checkpoint tensor a rank needs."""

from __future__ import annotations

import pytest

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import Partial, Replicate, Shard
from tokenspeed.parallel.shards import Piece, local, tensor_shape

WHOLE = (slice(None),)
MESH = Mesh.of(8, attn_tp=4, moe_ep=4, moe_tp=2)


def test_a_whole_tensor_is_cut_where_the_parameter_is() -> None:
    pieces = [Piece("w", WHOLE)]
    for rank in range(8):
        shape, (piece,) = local((64, 6), pieces, [Shard("attn", 0)], MESH, rank)
        start = rank % 4 * 16
        assert shape == (16, 6) and piece.at == (slice(0, 16), slice(None))
        assert piece.part == (slice(start, start + 16), slice(0, 6))
    shape, (piece,) = local((64, 8), pieces, [Shard("attn", 1)], MESH, 5)
    assert shape == (64, 2) and piece.part == (slice(0, 64), slice(2, 4))


def test_stacked_projections_are_cut_each_by_itself() -> None:
    pieces = [Piece("q", (slice(0, 32),)), Piece("k", (slice(32, 40),)), Piece("v", (slice(40, 48),))]
    shape, (q, k, v) = local((48, 6), pieces, [Shard("attn", 0)], MESH, 7)
    assert shape == (12, 6)
    assert [piece.at[0] for piece in (q, k, v)] == [slice(0, 8), slice(8, 10), slice(10, 12)]
    assert [piece.part[0] for piece in (q, k, v)] == [slice(24, 32), slice(6, 8), slice(6, 8)]


def test_heads_that_are_fewer_than_ranks_are_held_by_neighbours() -> None:
    pieces = [Piece("q", (slice(0, 32),)), Piece("k", (slice(32, 40),), shared_by=2)]
    parts = []
    for rank in range(4):
        shape, (q, k) = local((40, 6), pieces, [Shard("attn", 0)], MESH, rank)
        assert shape == (12, 6) and q.part[0] == slice(8 * rank, 8 * rank + 8)
        parts.append(k.part[0])
    assert parts == [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]


def test_experts_are_dealt_and_their_widths_cut() -> None:
    pieces = [
        piece for i in range(8) for piece in (Piece(f"gate.{i}", (i, slice(0, 4))), Piece(f"up.{i}", (i, slice(4, 8))))
    ]
    shape, kept = local((8, 8, 6), pieces, [Shard("moe_ep", 0), Shard("moe_tp", 1)], MESH, 5)
    assert shape == (2, 4, 6)
    assert [(piece.source, piece.at[:2], piece.part[0]) for piece in kept] == [
        ("gate.4", (0, slice(0, 2)), slice(2, 4)),
        ("up.4", (0, slice(2, 4)), slice(2, 4)),
        ("gate.5", (1, slice(0, 2)), slice(2, 4)),
        ("up.5", (1, slice(2, 4)), slice(2, 4)),
    ]


def test_a_part_of_a_tensor_is_cut_inside_of_itself() -> None:
    pieces = [Piece("shared", (0, slice(0, 4)), (slice(0, 4),)), Piece("shared", (1, slice(0, 4)), (slice(4, 8),))]
    shape, kept = local((2, 4, 6), pieces, [Shard("moe_tp", 1)], MESH, 1)
    assert shape == (2, 2, 6) and [piece.part[0] for piece in kept] == [slice(2, 4), slice(6, 8)]
    assert tensor_shape(((2, 4, 6), piece) for piece in pieces) == (8, 6)


def test_what_may_be_added_only_once_is_the_first_ranks() -> None:
    pieces = [Piece("bias", WHOLE)]
    held = [len(local((8,), pieces, [Partial("attn")], MESH, rank)[1]) for rank in range(8)]
    assert held == [1, 0, 0, 0, 1, 0, 0, 0]
    assert all(local((8,), pieces, [Replicate("attn")], MESH, rank) == ((8,), tuple(pieces)) for rank in range(8))


@pytest.mark.parametrize(
    ("shape", "share", "said"),
    [
        ((6, 4), Shard("attn", 0), "6 cannot be cut into 4 equal parts (--attn-tp-size); the nearest number below"),
        ((5, 3), Shard("moe", 1), "3 cannot be cut into 8 equal parts (--moe-ep-size × --moe-tp-size)"),
    ],
)
def test_what_cannot_be_cut_is_named_with_its_flag(shape: tuple[int, ...], share: Shard, said: str) -> None:
    with pytest.raises(ConfigError) as failure:
        local(shape, [Piece("w", WHOLE)], [share], MESH, 0)
    assert f"w: {said}" in str(failure.value)

"""One rank by itself: what others would send is made up in the shapes that it would have, and nothing is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.parallel import jobs
from tests.parallel.pool import started
from tests.parallel.test_command import FIELDS
from tokenspeed.errors import InvariantBroken
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import Platform
from tokenspeed.parallel import collectives
from tokenspeed.parallel.__main__ import main
from tokenspeed.parallel.alone import MOVES, Alone
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import AllGather, AllReduce, AllToAll, GatherFeatures, X

CPU = torch.device("cpu")


def test_every_transfer_leaves_the_shape_that_it_has_between_ranks() -> None:
    assert MOVES.keys() == collectives.MOVES.keys()
    transfers = [kind(X, 0, 1) for kind in MOVES]
    parts = [torch.full((8, 12), float(rank)) for rank in range(4)]
    with started(4) as pool:
        for rank, wanted in enumerate(pool.over(Mesh.of(4), jobs.moved, transfers, parts)):
            alone = Alone(Mesh.of(4), rank, CPU).collectives
            got = [alone.move(transfer)(parts[rank]) for transfer in transfers]
            assert [each.shape for each in got] == [each.shape for each in wanted], f"rank {rank}"


def test_the_tokens_of_others_differ_and_are_made_once() -> None:
    move = Alone(Mesh.of(4), 0, CPU).collectives.move(AllGather(X, 0, 1))
    tokens = move(torch.ones(2, 64, dtype=torch.bfloat16))
    assert tokens.dtype == torch.bfloat16 and len(tokens.unique(dim=0)) == 8
    assert 0.8 < tokens.float().std() < 1.2, "as large as what a norm gives"
    assert move(torch.zeros(2, 64, dtype=torch.bfloat16)) is tokens, "a step would make them again"
    assert len(move(torch.ones(3, 64))) == 12
    # Flags and ids are what they are on this rank: padding stays padding, an id stays one that exists.
    flags = torch.tensor([1, 0], dtype=torch.uint8)
    assert move(flags).tolist() == [1, 0] * 4


def test_what_is_made_up_has_the_type_that_was_sent_also_in_a_shape_that_was_met() -> None:
    move = Alone(Mesh.of(4), 0, CPU).collectives.move(AllGather(X, 0, 1))
    ids = torch.tensor([[3, 1], [2, 0]])
    for sent in (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bfloat16), ids, ids.to(torch.int32)):
        assert move(sent).dtype == sent.dtype and move(sent).shape == (8, 2)
        assert move(sent) is move(sent)
    assert move(ids).tolist() == ids.tolist() * 4


def test_whole_numbers_are_this_ranks_own_over_again_along_columns_too() -> None:
    collectives = Alone(Mesh.of(4), 0, CPU).collectives
    ids = torch.arange(8).reshape(4, 2)
    assert collectives.move(GatherFeatures(X, 0, 1))(ids).tolist() == [each * 4 for each in ids.tolist()]
    assert collectives.move(AllToAll(X, 0, 1))(ids).tolist() == [[0, 1] * 4], "as many rows as go to a rank"


def test_a_sum_is_this_ranks_term_and_the_norm_behind_it_the_norm_alone() -> None:
    world = Alone(Mesh.of(4), 1, CPU)
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.rand(64)
    assert world.collectives.move(AllReduce(X, 0, 1))(x) is x
    target = ops.Target(Platform.of(CPU), torch.float32)
    got = world.collectives.all_reduce_norm(0, 1, target, 64)(x, weight, 1e-6, residual)
    assert all(map(torch.equal, got, ops.rms_norm(target)(x, weight, 1e-6, residual)))


def test_a_rank_is_in_its_own_set() -> None:
    mesh = Mesh.of(4, attn_dp=2, moe_ep=4)
    assert world_sizes(mesh) == {(0, 1): 2, (1, 2): 2, (0, 2): 4}


def world_sizes(mesh: Mesh) -> dict[tuple[int, int], int]:
    """Over these atoms: how many times as many features a gather gives."""
    alone = Alone(mesh, 3, CPU).collectives
    return {
        atoms: alone.move(GatherFeatures(X, *atoms))(torch.ones(1, 1)).numel() for atoms in ((0, 1), (1, 2), (0, 2))
    }


def test_what_depends_on_tokens_is_not_made_up() -> None:
    with pytest.raises(InvariantBroken, match="no other ranks"):
        Alone(Mesh.of(4, moe_ep=4), 0, CPU).collectives.exchange(0, 1)


@pytest.mark.parametrize("layout", ["", "--moe-ep-size 4", "--attn-dp-size 4 --moe-ep-size 4"])
def test_the_command_says_that_a_rank_was_alone(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    flags = ["--world", "4", *layout.split(), "--batch", "1", "3", "--context", "70", "200", "--device", "cpu"]
    assert main(["decode", "--model", str(tmp_path), "--dtype", "float32", "--alone", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("RANK 0 OF 4 ALONE, ALL COLLECTIVES LEFT OUT" in line for line in lines)
    rows = [[float(cell) for cell in line.split()] for line in lines[-4:]]
    assert [row[:2] for row in rows] == [[70, 1], [70, 3], [200, 1], [200, 3]]
    for _, _, measured, predicted, ratio, left_out in rows:
        assert measured > 0 and left_out > 0 and predicted > 0
        assert ratio == pytest.approx(measured / predicted, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    assert main(["decode", "--model", str(tmp_path), "--world", "4", "--alone"]) == 1
    assert capsys.readouterr().err == "tokenspeed.parallel: --alone needs a GPU, or --device cpu\n"

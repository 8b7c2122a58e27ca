"""Ranks as processes: they meet, agree, talk, move tensors as the program says, and part without waiting."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Iterator

import pytest
import torch

from tests.layers.over_ranks import COLLECTIVES
from tests.parallel import jobs
from tests.parallel.pool import Pool, free_port, started
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import Combine, Dispatch

MESH = Mesh.of(4, attn_dp=2, moe_ep=4)
"""Two atoms, so that sets of neighbours, of every other rank and of all meet."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with started(4) as pool:
        yield pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_every_transfer_gives_each_rank_what_it_gives_in_one_process(pool: Pool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(-50, 50, (8, 6), generator=generator).to(dtype) for _ in range(4)]
    transfers = [
        kind("x", first, stop)
        for kind in COLLECTIVES
        if kind not in (Dispatch, Combine)
        for first, stop in itertools.combinations(range(3), 2)
    ]
    got = pool.over(MESH, jobs.moved, transfers, parts)
    for at, transfer in enumerate(transfers):
        for ranks in MESH.atom_sets(transfer.first, transfer.stop):
            for place, rank in enumerate(ranks):
                want = COLLECTIVES[type(transfer)]([parts[other] for other in ranks], place)
                # Whole numbers, so sums in any order are the same.
                assert torch.equal(got[rank][at], want), f"{transfer} on rank {rank}"


def test_token_ids_are_gathered_and_cut_like_rows(pool: Pool) -> None:
    parts = [torch.arange(4) + 10 * rank for rank in range(4)]
    gather, cut = (kind("x", 0, 2) for kind in list(COLLECTIVES) if kind.__name__ in ("AllGather", "Slice"))
    for rank, (whole, part) in enumerate(pool.over(MESH, jobs.moved, [gather, cut], parts)):
        assert torch.equal(whole, torch.cat(parts)) and torch.equal(part, parts[rank][rank : rank + 1])


def test_tokens_go_to_those_ranks_that_they_ask_and_answers_come_back(pool: Pool) -> None:
    generator = torch.Generator().manual_seed(5)
    ranks, rows, held, top_k = 4, 6, 3, 2
    mesh = Mesh.of(ranks, attn_dp=ranks, moe_ep=ranks)
    x = torch.randint(-9, 9, (ranks, rows, 8), generator=generator).float()
    ids = torch.stack([torch.randperm(ranks * held, generator=generator)[:top_k] for _ in range(ranks * rows)])
    ids = ids.int().view(ranks, rows, top_k)
    ids[1, 2:] = -1  # padding asks for nothing
    ids[2] = torch.tensor([0, 1], dtype=torch.int32)  # all tokens of a rank ask the same one
    ids[:, :, :][ids == 9] = 10  # and an expert is asked by nobody
    weights = torch.randint(1, 5, (ranks, rows, top_k), generator=generator).float()
    got = pool.over(mesh, jobs.asked, x, ids, weights, held)
    want = x * torch.where(ids < 0, 0.0, weights * (ids + 1)).sum(-1, keepdim=True)
    for rank in range(ranks):
        assert torch.equal(got[rank], want[rank]), f"rank {rank}"


def test_a_rank_that_is_asked_by_nobody_takes_part(pool: Pool) -> None:
    mesh = Mesh.of(2, attn_dp=2, moe_ep=2)
    x, ids, weights = torch.ones(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.int32), torch.ones(2, 3, 1)
    assert all(torch.equal(part, torch.ones(3, 4)) for part in pool.over(mesh, jobs.asked, x, ids, weights, 2))


def test_ranks_agree_or_are_told_which_of_them_differ(pool: Pool) -> None:
    said = "--other differs between ranks: rank 0 has value 0, rank 1 has value 1"
    whole, dealt = Mesh.of(4), Mesh.of(4, attn_dp=4)
    for mesh, firsts, least in ((MESH, [0, 2], (9, 7)), (whole, [0], (7,)), (dealt, [0, 1, 2, 3], (10, 9, 8, 7))):
        for rank, answer in enumerate(pool.over(mesh, jobs.agreed)):
            group = max(at for at, first in enumerate(firsts) if first <= rank)
            assert answer == {
                "least": (7, least),
                "shared": ([firsts[group] + 1] * 3, [[first + 1] * 3 for first in firsts]),
                "told": [b"of rank %d" % first for first in firsts] if rank == 0 else [],
                "place": (len(firsts), group, rank in firsts),
                "said": said,
            }


def test_messages_arrive_in_order_beside_collectives(pool: Pool) -> None:
    messages = [b"", b"one", bytes(300_000), b"last"]
    assert pool.over(MESH, jobs.heard, messages) == [[], messages, messages, messages]


def test_whoever_waits_for_a_rank_that_leaves_is_told(pool: Pool) -> None:
    _, *told = pool.over(Mesh.of(3), jobs.left)
    assert all(said.startswith("rank 0 is gone: ") for said in told)


def test_a_rank_that_dies_ends_the_wait_of_the_others() -> None:
    with started(2) as pool:
        pool.send_over(Mesh.of(2), jobs.bereaved)
        # Which of these it is depends on what was on its way when the rank died.
        assert re.search("Connection (closed|reset) by peer|Broken pipe", str(pool.answer(0)))


def test_a_rank_that_does_not_come_is_named(pool: Pool) -> None:
    mesh, port = Mesh.of(3), free_port()
    said = pool.each(jobs.joined, (mesh, 0, port, 1.0), (mesh, 1, port, 1.0))
    assert said[0] == f"rank 2 did not come to 127.0.0.1:{port} within 1 s"
    assert "did not come" in said[1] or "found no rank 0" in said[1]
    assert "\n" not in said[0] + said[1]


def test_a_port_in_use_is_one_line(pool: Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (said,) = pool.each(jobs.joined, (Mesh.of(2), 0, port, 1.0))
    assert said == f"rank 0: port {port} of 127.0.0.1 is in use"


def test_ranks_of_other_layouts_do_not_join(pool: Pool) -> None:
    port = free_port()
    meshes = (Mesh.of(2), Mesh.of(2, attn_dp=2))
    for said in pool.each(jobs.joined, *((mesh, rank, port, 20.0) for rank, mesh in enumerate(meshes))):
        assert said.startswith("the layout of ranks differs between ranks: rank 0 has 2 ranks: attention attn 2")

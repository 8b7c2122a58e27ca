"""The transfers of a program between processes: what carries them out, bound once.

A transfer of tokens wants as many rows on every rank, and where it cuts them as many as the set has ranks, or a
multiple: whoever hands tensors in has padded them. Results are new tensors, a slice aside, which is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch._C import _distributed_c10d as c10d

from tokenspeed.kernels import ops
from tokenspeed.parallel.groups import Group, Groups, finished
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import (
    AllGather,
    AllReduce,
    AllToAll,
    GatherFeatures,
    ReduceScatter,
    Slice,
    Transfer,
)
from tokenspeed.parallel.symmetric import SymmetricMemory

Move = Callable[[torch.Tensor], torch.Tensor]
"""[tokens, …] as a rank has it before a transfer → as it has it afterwards."""


class ReducedNorm(Protocol):
    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A term x [T, H] of a sum over ranks → as `ops.RmsNorm`, of the sum."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What came to a rank that holds experts: x [T, H], ids and weights [T, K] as they were sent, and how to return.

    `rows` are the sender's rows that went to each rank of the set in turn, `given` and `got` how many went there and
    came from there.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    given: list[int]
    got: list[int]


class Exchange:
    """Tokens to those ranks of a set that hold what they ask for, and the answers back. Sizes depend on the tokens, so
    the host waits for the device."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: int) -> Dispatched:
        """x [T, H]; of ids [T, K] int32 the ranks of the set hold `held` each, in order; −1 asks for nothing."""
        size = self._group.size()
        owners = torch.where(ids < 0, size, torch.div(ids, held, rounding_mode="floor")).long()
        asked = torch.zeros(len(x), size + 1, dtype=torch.bool, device=x.device).scatter_(1, owners, True)[:, :size]
        ranks, rows = asked.T.nonzero(as_tuple=True)
        given = torch.bincount(ranks, minlength=size)
        got = torch.empty_like(given)
        finished(self._group.alltoall_base(got, given, [], [], _ALL_TO_ALL))
        given_rows, got_rows = given.tolist(), got.tolist()
        parts = [part[rows].view(torch.uint8) for part in (x, ids, weights)]
        arrived = self._sent(torch.cat(parts, 1), given_rows, got_rows)
        ends = (parts[0].shape[1], parts[0].shape[1] + parts[1].shape[1])
        there = zip(arrived.tensor_split(ends, 1), (x, ids, weights), strict=True)
        x, ids, weights = (columns.contiguous().view(part.dtype) for columns, part in there)
        return Dispatched(x, ids, weights, rows, given_rows, got_rows)

    def combine(self, y: torch.Tensor, sent: Dispatched, num_rows: int) -> torch.Tensor:
        """y [T', H], the answers to what `dispatch` gave → their sums [num_rows, H], in the order of the ranks."""
        back = self._sent(y, sent.got, sent.given)
        total = torch.zeros(num_rows, y.shape[1], dtype=torch.float32, device=y.device)
        for rows, answers in zip(*(torch.split(each, sent.given) for each in (sent.rows, back)), strict=True):
            total.index_add_(0, rows, answers.float())
        return total.to(y.dtype)

    def _sent(self, rows: torch.Tensor, given: list[int], got: list[int]) -> torch.Tensor:
        arrived = rows.new_empty(sum(got), rows.shape[1])
        finished(self._group.alltoall_base(arrived, rows.contiguous(), got, given, _ALL_TO_ALL))
        return arrived


class Collectives:
    """The collectives of one rank of `mesh`. Groups of ranks are made when they are first bound: all ranks bind the
    same transfers, in the same order."""

    def __init__(self, mesh: Mesh, rank: int, groups: Groups, symmetric: SymmetricMemory | None = None) -> None:
        """`symmetric` is there where ranks may reach each other's memory."""
        self._mesh, self._rank, self._groups, self._symmetric = mesh, rank, groups, symmetric

    def move(self, transfer: Transfer) -> Move:
        """What carries this transfer out. KeyError for those that need more than a tensor (`exchange`)."""
        return MOVES[type(transfer)](self._groups.of(self._ranks(transfer.first, transfer.stop)))

    def all_reduce_norm(self, first: int, stop: int, target: ops.Target, hidden: int) -> ReducedNorm:
        """An all-reduce over these atoms of rows of `hidden` numbers, and the norm behind it: one kernel where ranks
        reach each other's memory and a message fits into what they share."""
        ranks = self._ranks(first, stop)
        reduce, norm = _all_reduce(self._groups.of(ranks)), ops.rms_norm(target)

        def one_by_one(
            x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, /
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return norm(reduce(x), weight, eps, residual)

        peers = None if self._symmetric is None else self._symmetric.peers(ranks, hidden, target.dtype)
        if peers is None:
            return one_by_one
        fused = ops.all_reduce_norm(target)

        def at_once(
            x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, /
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if len(x) > peers.max_rows:
                return one_by_one(x, weight, eps, residual)
            return fused(x, weight, eps, residual, peers)

        return at_once

    def exchange(self, first: int, stop: int) -> Exchange:
        """`Dispatch` and `Combine` over these atoms."""
        return Exchange(self._groups.of(self._ranks(first, stop)))

    def _ranks(self, first: int, stop: int) -> tuple[int, ...]:
        """The set of these atoms that this rank is in."""
        return next(ranks for ranks in self._mesh.atom_sets(first, stop) if self._rank in ranks)


def share(group: Group, tensor: torch.Tensor, parts: int) -> torch.Tensor:
    """In place: of x [S] what the first rank has of that of so many equal parts of the group which this one is in →
    what the first of each part has, [parts, S]."""
    if parts == 1:
        finished(group.broadcast([tensor], _BROADCAST))
        return tensor.unsqueeze(0)
    size = group.size() // parts
    everyone = tensor.new_empty(parts, size, len(tensor))
    finished(group._allgather_base(everyone.view(-1), tensor, _ALL_GATHER))
    tensor.copy_(everyone[group.rank() // size, 0])
    return everyone[:, 0]


def _all_reduce(group: Group) -> Move:
    def move(x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)  # x may go by another name too
        finished(group.allreduce([total], _ALL_REDUCE))
        return total

    return move


def _reduce_scatter(group: Group) -> Move:
    size = group.size()

    def move(x: torch.Tensor) -> torch.Tensor:
        own = x.new_empty(len(x) // size, *x.shape[1:])
        finished(group._reduce_scatter_base(own, x.contiguous(), _REDUCE_SCATTER))
        return own

    return move


def _all_gather(group: Group) -> Move:
    size = group.size()

    def move(x: torch.Tensor) -> torch.Tensor:
        whole = x.new_empty(len(x) * size, *x.shape[1:])
        finished(group._allgather_base(whole, x.contiguous(), _ALL_GATHER))
        return whole

    return move


def _slice(group: Group) -> Move:
    size, place = group.size(), group.rank()

    def move(x: torch.Tensor) -> torch.Tensor:
        rows = len(x) // size
        return x[place * rows : (place + 1) * rows]

    return move


def _gather_features(group: Group) -> Move:
    size, gather = group.size(), _all_gather(group)
    return lambda x: gather(x).view(size, *x.shape).transpose(0, 1).reshape(len(x), -1)


def _all_to_all(group: Group) -> Move:
    size = group.size()

    def move(x: torch.Tensor) -> torch.Tensor:
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)
        finished(group.alltoall_base(parts, x.contiguous(), [], [], _ALL_TO_ALL))
        return parts.view(size, len(x) // size, -1).transpose(0, 1).reshape(len(x) // size, -1)

    return move


MOVES: Mapping[type[Transfer], Callable[[Group], Move]] = {
    AllReduce: _all_reduce,
    ReduceScatter: _reduce_scatter,
    AllGather: _all_gather,
    Slice: _slice,
    GatherFeatures: _gather_features,
    AllToAll: _all_to_all,
}

_ALL_REDUCE, _BROADCAST, _ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL = (
    c10d.AllreduceOptions(), c10d.BroadcastOptions(), c10d.AllgatherOptions(), c10d.ReduceScatterOptions(),
    c10d.AllToAllOptions(),
)  # fmt: skip
for _options in (_ALL_REDUCE, _BROADCAST, _ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL):
    # On a GPU they then run on the stream of whoever calls, where a graph captures them, not on one of their own.
    _options.asyncOp = False

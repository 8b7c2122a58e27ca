"""One step as tensor operations that nobody on the host waits for: plan and tables in, tokens out.

A decode step has two parts, `decode` and `head`, whose tensors lie at fixed addresses, so that each can be
captured once for a number of rows and replayed. A step with prefill rows runs `prefill`, then `head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.executor.interface import Peers
from tokenspeed.executor.pieces import PieceGraphs
from tokenspeed.executor.slot_tables import SlotTables
from tokenspeed.executor.staging import DevicePlan
from tokenspeed.kernels import ops
from tokenspeed.kernels.one_thread import enqueued
from tokenspeed.kernels.slot_state import DISAGREES, NO_BLOCK
from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV
from tokenspeed.models.causal_lm import Pieces


class Model(Protocol):
    """What an executor asks of a model: T tokens in, hidden states [T, H] out, logits of chosen ones."""

    @property
    def kv_spec(self) -> list[KVSpec]: ...

    @property
    def pieces(self) -> Pieces | None:
        """What of it may be captured in steps with prompts; None: nothing."""
        ...

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class StepOps:
    """The kernels of a step that are not the model's."""

    decode_inputs: ops.DecodeInputsOp
    sample: ops.Sample

    @classmethod
    def of(cls, target: ops.Target) -> Self:
        return cls(ops.decode_inputs(target), ops.sample(target))


class DeviceStep:
    """`plan` is where steps arrive on the device, `results` [1 + G, R] int32 where they leave the faults of this rank's
    rows, and the tokens of the samples of each group in turn (one, unless `peers` say otherwise).

    Rows and samples are numbers of rows including padding: rows of slot `tables.padding` with no new token, and
    samples of slot −1.
    """

    def __init__(
        self, model: Model, kv: Sequence[LayerKV], plan: DevicePlan, tables: SlotTables, limits: BatchLimits,
        step_ops: StepOps, peers: Peers | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._kv = kv
        self._plan = plan
        self._tables = tables
        self._block_size = limits.block_size
        self._max_len = limits.max_blocks * limits.block_size
        self._ops = step_ops
        self._peers = peers
        self._counting = torch.arange(max(limits.max_tokens, limits.max_rows) + 1, device=tables.device)
        self._starts = self._counting[: limits.max_rows + 1].int()
        self._hidden: torch.Tensor | None = None
        self.pieces = None
        if (pieces := model.pieces) is not None:
            self.pieces = PieceGraphs(pieces, kv, limits.max_tokens, tables.device)
        self._max_rows = limits.max_rows
        groups, group = (1, 0) if peers is None else (peers.num_groups, peers.group)
        self.results = torch.zeros(1 + groups, limits.max_rows, dtype=torch.int32, device=tables.device)
        self._faults, self._everyones, self.tokens = self.results[0], self.results[1:], self.results[1 + group]

    def decode(self, rows: int) -> None:
        """Hidden states of `rows` rows of at most one new token each, for a `head` of as many samples."""
        plan = self._plan
        columns = (plan.row_slot, plan.row_new, plan.row_computed, plan.token_ids)
        arrived = ops.DecodeRows(*(column[:rows] for column in columns))
        made = self._ops.decode_inputs(arrived, self._tables.slots, self._faults[:rows], self._block_size)
        inputs = ForwardInput(
            token_ids=made.token_ids,
            positions=made.positions,
            kv_slots=made.kv_slots,
            query_start=self._starts[: rows + 1],
            kv_len=made.kv_len,
            block_table=made.block_table,
            num_decode=rows,
            query_lens=(1,) * rows,
            kv_lens=(self._max_len,) * rows,
            block_size=self._block_size,
            num_tokens=plan.num_rows,
        )
        self._keep(self._model.forward(inputs, self._kv), rows)

    def prefill(
        self,
        num_decode: int,
        query_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        samples: int,
        padded_tokens: int | None = None,
    ) -> torch.Tensor:
        """Rows of any number of new tokens, `num_decode` rows of one first. Hidden states of all tokens [T, H], valid
        until the next step. `padded_tokens` as in `ForwardInput`."""
        inputs = self._inputs(num_decode, query_lens, kv_lens, padded_tokens)
        pieces, whole = self.pieces, partial(self._model.forward, inputs, self._kv)
        if pieces is None:
            hidden = whole()
        elif num_decode < len(query_lens) and len(inputs.token_ids) <= pieces.most:
            hidden = enqueued(partial(pieces, inputs), self._tables.device)
        else:
            hidden = enqueued(whole, self._tables.device)
        self._keep(hidden, samples)
        return hidden

    def logits(self, samples: int) -> torch.Tensor:
        """Logits [S, V] float32 of what the last step left, in memory of their own."""
        assert self._hidden is not None
        return self._model.logits(self._hidden[:samples])

    def choose(self, logits: torch.Tensor) -> None:
        """Sample a token for each row of `logits` [S, V], which are overwritten, into `results`; with `peers` the first
        rank of a group does, and all ranks have its tokens. S is the same in all groups."""
        slots, tokens = self._plan.sample_slot[: len(logits)], self.tokens[: len(logits)]
        if self._peers is None or self._peers.decides:
            tokens.copy_(self._ops.sample(logits, slots, self._tables.state))
        if self._peers is not None:
            everyones = self._peers.share(tokens)
            if len(everyones) > 1:
                self._everyones[:, : len(logits)] = everyones
            if not self._peers.decides:
                at = torch.where(slots < 0, self._tables.padding, slots).long()
                self._tables.state.last_token[at] = tokens.clamp(min=0).long()

    def head(self, samples: int) -> None:
        """Logits of what the last step left, and a token for each."""
        self.choose(self.logits(samples))

    def _keep(self, hidden: torch.Tensor, samples: int) -> None:
        if self._hidden is None:
            self._hidden = torch.zeros(self._max_rows, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        if len(hidden):  # else only other groups have rows
            torch.index_select(hidden, 0, self._plan.sample_token[:samples], out=self._hidden[:samples])

    def _inputs(
        self, num_decode: int, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], padded_tokens: int | None
    ) -> ForwardInput:
        """As `decode_inputs`, for rows of any number of tokens."""
        plan, state, size = self._plan, self._tables.slots, self._block_size
        rows, tokens = len(query_lens), sum(query_lens)
        slots = plan.row_slot[:rows].long()
        new, claimed = plan.row_new[:rows], plan.row_computed[:rows]
        known = state.length[slots]
        computed = torch.where(known < 0, claimed, known)
        kv_len = computed + new
        state.length[slots] = kv_len
        ends = new.cumsum(0)
        start = torch.cat((ends.new_zeros(1), ends))
        row_of = torch.searchsorted(ends, self._counting[:tokens], right=True)
        positions = self._counting[:tokens] - (start[:-1] - computed)[row_of]
        table = state.block_table[slots]
        block = table[row_of, positions // size].long()
        ids = plan.token_ids[:tokens]
        missing = torch.zeros_like(new).index_add_(0, row_of, (block < 0).int())
        self._faults[:rows] = (computed != claimed) * DISAGREES + (missing > 0) * NO_BLOCK
        return ForwardInput(
            token_ids=torch.where(ids < 0, state.last_token[slots[row_of]], ids),
            positions=positions,
            kv_slots=torch.where(block < 0, -1, block * size + positions % size),
            query_start=start.int(),
            kv_len=kv_len.int(),
            block_table=table,
            num_decode=num_decode,
            query_lens=query_lens,
            kv_lens=kv_lens,
            block_size=size,
            padded_tokens=padded_tokens,
        )

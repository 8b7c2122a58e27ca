"""Steps with prompts in pieces: what lies between two attentions is captured, once for each number of tokens in a list.

A step of V2L with 816 new tokens behind 50,000 and eight rows that decode took 104 ms to enqueue, operation by
operation, and the device 57 (an H200). Between attentions everything depends on the number of tokens alone, so tokens
are padded to the next number of the list, and one replay takes the place of some sixteen launches in each layer.
Attentions are enqueued as they are, of the rows that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from tokenspeed.executor.graphs import Captured
from tokenspeed.layers.attention import AttentionInput
from tokenspeed.layers.forward import ForwardInput, LayerKV, TokenInput
from tokenspeed.models.causal_lm import Pieces

SIZES = (16, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048)
"""Numbers of tokens. With more the device takes longer than the host: 2,048 behind 50,000 take it 84 ms, and are
enqueued in 80."""


class PieceGraphs:
    """The steps of up to `most` tokens of a model, captured or, without `capture`, run as they are, equally padded.

    What pieces and attentions hand to each other lies in memory of its own: so all pieces of all sizes, of which one
    runs at a time, share what they need besides.
    """

    def __init__(self, model: Pieces, kv: Sequence[LayerKV], max_tokens: int, device: torch.device) -> None:
        self._model, self._kv = model, kv
        self._sizes = [size for size in SIZES if size <= max_tokens]
        self.most = max(self._sizes, default=0)
        ids = torch.zeros(3, self.most, dtype=torch.int64, device=device)
        ids[2] = -1
        self._token_ids, self._positions, self._kv_slots = ids
        self._num_tokens = torch.zeros(1, dtype=torch.int32, device=device)
        self._held: dict[str, torch.Tensor] = {}
        self._captured: dict[tuple[int, int], Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, inputs: ForwardInput) -> torch.Tensor:
        """Hidden states [T, H] of at most `most` tokens, not all of them decode rows; valid until the next call."""
        count = len(inputs.token_ids)
        size = next(size for size in self._sizes if size >= count)
        self._token_ids[:count] = inputs.token_ids
        self._positions[:count] = inputs.positions
        self._kv_slots[:count] = inputs.kv_slots
        self._kv_slots[count:size].fill_(-1)
        self._num_tokens.fill_(count)
        self._run(size, AttentionInput.of(inputs), count)
        return self._held["hidden"][:count]

    def prepare(self) -> None:
        """Make what pieces and attentions hand to each other, before steps of other sizes take the memory apart."""
        self._be_empty()
        for size in self._sizes[:1]:
            self._run(size, None, 0)

    def capture(self) -> None:
        """Run the pieces of every size once, for what compiles or loads on first use, then capture them. Largest first:
        the smaller ones then fit into the memory that it took."""
        self._be_empty()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            with torch.cuda.stream(stream):
                self._run(size, None, 0)
            stream.synchronize()
            for index in range(self._model.num_pieces):
                self._captured[index, size] = Captured(partial(self._piece, index, size), pool, stream)
        torch.cuda.current_stream().wait_stream(stream)

    def release(self) -> None:
        """Forget what was captured."""
        self._captured.clear()

    def _be_empty(self) -> None:
        """All tokens are padding."""
        self._kv_slots.fill_(-1)
        self._num_tokens.zero_()

    def _run(self, size: int, attention: AttentionInput | None, count: int) -> None:
        """All pieces of `size` tokens; without `attention` they are padding, of which none attends."""
        last = self._model.num_pieces - 1
        for index in range(last + 1):
            captured = self._captured.get((index, size))
            if captured is None:
                self._piece(index, size)
            else:
                captured.replay()
            if index < last and attention is not None:
                queries, out = self._held["queries"][:count], self._held["attended"][:count]
                self._model.attend(index, queries, attention, self._kv, out)

    def _piece(self, index: int, size: int) -> None:
        tokens = TokenInput(self._token_ids[:size], self._positions[:size], self._kv_slots[:size], self._num_tokens)
        x = residual = None
        if index:
            x, residual = self._held["attended"][:size], self._held["residual"][:size]
        x, residual = self._model.piece(index, x, residual, tokens, self._kv)
        if residual is None:
            self._hold("hidden", x)
            return
        self._hold("queries", x)
        self._hold("residual", residual)
        if "attended" not in self._held:
            self._held["attended"] = x.new_zeros(self.most, self._model.attended_width)

    def _hold(self, name: str, x: torch.Tensor) -> None:
        if name not in self._held:
            self._held[name] = x.new_zeros(self.most, *x.shape[1:])
        self._held[name][: len(x)] = x

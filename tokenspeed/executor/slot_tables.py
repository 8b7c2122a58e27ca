"""Per-slot state on the device: lengths, last tokens, block tables, and what the sampler keeps."""

from __future__ import annotations

import numpy as np
import torch

from tokenspeed.batch import BatchLimits, Int32Array, Int64Array
from tokenspeed.executor.interface import Binding
from tokenspeed.executor.masks import num_words
from tokenspeed.executor.sampling_tables import MIN_TEMPERATURE, Feature, edits_of, features_of
from tokenspeed.executor.staging import DevicePlan, Staging
from tokenspeed.kernels.ops import SamplerState, SlotState

UNMAPPED = -1
"""An entry of a block table that no plan has filled; a length that no plan has told."""


class SlotTables:
    """Tables of `limits.max_rows` slots and one more, `padding`, which no request has: the padding of a captured
    step reads and writes there. `slots` and `state` are the tables as the kernels take them.

    What the host must know to plan the sampler's work is here too: `features` [slots] int64 of `Feature`,
    `num_logprobs` [slots], and the bad words of several tokens. Slots that want those or log-probabilities are
    in `unusual`: their rows are never part of a captured head. `arrived_masks` [slots, 1 + V / 32] is where masks land.
    """

    def __init__(self, limits: BatchLimits, vocab_size: int, device: torch.device) -> None:
        slots = limits.max_rows + 1
        self.device = device
        self.padding = limits.max_rows
        self.vocab_size = vocab_size

        def table(dtype: torch.dtype, *shape: int, fill: float = 0) -> torch.Tensor:
            return torch.full((slots, *shape), fill, dtype=dtype, device=device)

        self.state = SamplerState(
            features=table(torch.int32),
            temperature=table(torch.float32, fill=1),
            top_k=table(torch.int32),
            top_p=table(torch.float32, fill=1),
            min_p=table(torch.float32),
            repetition=table(torch.float32, fill=1),
            presence=table(torch.float32),
            frequency=table(torch.float32),
            min_length=table(torch.int32),
            seed=table(torch.int64),
            length=table(torch.int64),
            last_token=table(torch.int64),
            bias=table(torch.float32, vocab_size),
            seen=table(torch.int32, vocab_size),
            mask=table(torch.int32, num_words(vocab_size), fill=-1),
        )
        self.block_table = table(torch.int32, limits.max_blocks, fill=UNMAPPED)
        self.slots = SlotState(self.state.length, self.state.last_token, self.block_table)
        self.arrived_masks = torch.zeros(limits.max_rows, 1 + num_words(vocab_size), dtype=torch.int32, device=device)
        self.features: Int64Array = np.zeros(limits.max_rows, dtype=np.int64)
        self.num_logprobs: Int64Array = np.zeros(limits.max_rows, dtype=np.int64)
        self.bad_words: dict[int, BadWords] = {}
        self.unusual: set[int] = set()

    @staticmethod
    def num_bytes(limits: BatchLimits, vocab_size: int) -> int:
        """Device memory of these tables."""
        masks = 4 * num_words(vocab_size) * (2 * limits.max_rows + 1)
        return (limits.max_rows + 1) * (8 * vocab_size + 4 * limits.max_blocks + 64) + masks

    def write_record(self, staging: Staging, at: int, slot: int, binding: Binding) -> None:
        """Before the step's copy: what `slot` asks for, as entry `at` of the records."""
        params = binding.params
        features = features_of(binding, self.vocab_size)
        self.features[slot] = features
        self.num_logprobs[slot] = params.logprobs or 0
        record = staging.records[at]
        record["slot"] = slot
        record["features"] = features
        record["top_k"] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        record["min_length"] = binding.prompt_len + params.min_tokens
        record["seed"] = binding.seed
        record["temperature"] = max(params.temperature, MIN_TEMPERATURE)
        record["top_p"], record["min_p"] = params.top_p, params.min_p
        record["repetition"] = params.repetition_penalty
        record["presence"], record["frequency"] = params.presence_penalty, params.frequency_penalty

    def bind(self, plan: DevicePlan, bound: list[tuple[int, Binding]]) -> None:
        """After the step's copy: give the slots of its records to their requests."""
        columns = {name: column[: len(bound)] for name, column in plan.records.items()}
        slots = columns.pop("slot").long()
        tables = self.state._asdict()
        for name, column in columns.items():
            tables[name][slots] = column
        # A number assigned to indexed rows would be copied from the host, which waits for all that is enqueued.
        self.state.length.index_fill_(0, slots, UNMAPPED)
        self.block_table.index_fill_(0, slots, UNMAPPED)
        for slot, binding in bound:
            self.release(slot)
            if self.features[slot] & Feature.EDITS:
                self._bind_edits(slot, binding)
            if slot in self.bad_words or self.features[slot] & Feature.LOGPROBS:
                self.unusual.add(slot)

    def release(self, slot: int) -> None:
        """Forget what the host knows of a slot; its tables are cleared when it is bound again."""
        self.bad_words.pop(slot, None)
        self.unusual.discard(slot)

    def set_masks(self, staging: Staging, count: int) -> None:
        """Copy the first `count` masks of a step to the device, each into its slot's row."""
        arrived = self.arrived_masks[:count]
        arrived.copy_(staging.masks[:count], non_blocking=True)
        self.state.mask.index_copy_(0, arrived[:, 0].long(), arrived[:, 1:])

    def map_blocks(self, deltas: torch.Tensor) -> None:
        """Write (slot, position, block) of `deltas` [D,3]."""
        self.block_table[deltas[:, 0].long(), deltas[:, 1].long()] = deltas[:, 2]

    def _bind_edits(self, slot: int, binding: Binding) -> None:
        bias, seen = edits_of(binding, self.vocab_size)
        self.state.bias[slot].copy_(uploaded(bias, self.device))
        self.state.seen[slot].copy_(uploaded(seen, self.device))
        sequences = [words for words in binding.params.bad_word_ids if len(words) > 1]
        if sequences:
            self.bad_words[slot] = BadWords(sequences, binding.tokens, self.device)


class BadWords:
    """Token sequences of several tokens that one request must not produce, and the end of its text, on the device.

    A sequence's last token is banned while the text, prompt included, ends with the rest of it.
    """

    ANYTHING, NOTHING = -1, -2

    def __init__(self, sequences: list[tuple[int, ...]], tokens: Int32Array, device: torch.device) -> None:
        longest = max(map(len, sequences)) - 1
        begins = np.full((len(sequences), longest), self.ANYTHING, dtype=np.int64)
        for row, words in zip(begins, sequences, strict=True):
            row[longest - len(words) + 1 :] = words[:-1]
        tail = np.full(longest, self.NOTHING, dtype=np.int64)
        known = tokens[max(0, len(tokens) - longest) :]
        tail[longest - len(known) :] = known
        self._begins = uploaded(begins, device)
        self._last = uploaded(np.array([words[-1] for words in sequences], dtype=np.int64), device)
        self._tail = uploaded(tail, device)

    def apply(self, logits: torch.Tensor) -> None:
        """Ban in `logits` [V] what must not come next, in place."""
        stands = ((self._begins == self._tail) | (self._begins == self.ANYTHING)).all(1)
        logits.index_add_(0, self._last, torch.where(stands, -torch.inf, 0.0).to(logits.dtype))

    def append(self, token: torch.Tensor) -> None:
        """Take the sampled `token` [1] int64 into the text."""
        self._tail = torch.cat((self._tail[1:], token))


def uploaded(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> torch.Tensor:
    """A copy on the device. On a GPU it travels through page-locked memory and nobody waits for it."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device, copy=True)

"""Log-probabilities of tokens under the model's own distribution, before any sampling parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tokenspeed.batch import Int64Array, Logprobs

SLICE_ELEMENTS = 1 << 22
"""Logits held at once while a prompt is scored: 16 MiB of float32 for each temporary."""


def pick(log_probs: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    """Read `token_ids` [N] int64 and the k best from `log_probs` [N, V]; all ids must be in the vocabulary.

    A rank is 1 + the number of strictly more likely tokens. Equal log-probabilities are listed by id.
    """
    chosen = log_probs.gather(1, token_ids[:, None])
    ranks = (log_probs > chosen).sum(1) + 1
    top_ids, top = _best(log_probs, min(k, log_probs.shape[1]))
    return Logprobs(
        token_ids=token_ids.cpu().numpy().astype(np.int32),
        logprobs=chosen[:, 0].cpu().numpy(),
        ranks=ranks.cpu().numpy().astype(np.int32),
        top_ids=top_ids.cpu().numpy().astype(np.int32),
        top_logprobs=top.cpu().numpy(),
    )


def score(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    vocab_size: int,
    k: int,
) -> Logprobs:
    """Score `token_ids` [N] against `logits(hidden)` [N, V], a slice of positions at a time."""
    step = max(1, SLICE_ELEMENTS // vocab_size)
    parts = [
        pick(torch.log_softmax(logits(hidden[start : start + step]), 1), token_ids[start : start + step], k)
        for start in range(0, len(token_ids), step)
    ]
    return joined(parts)


def spread(part: Logprobs, at: Int64Array, token_ids: Int64Array) -> Logprobs:
    """Place the entries of `part` at rows `at` of a step's S rows; rows that asked for nothing hold rank 0."""
    rows, k = len(token_ids), part.top_ids.shape[1]
    logprobs, ranks = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    top_ids, top_logprobs = np.zeros((rows, k), np.int32), np.zeros((rows, k), np.float32)
    logprobs[at], ranks[at], top_ids[at], top_logprobs[at] = part.logprobs, part.ranks, part.top_ids, part.top_logprobs
    return Logprobs(token_ids.astype(np.int32), logprobs, ranks, top_ids, top_logprobs)


def _best(log_probs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values [N, k] of the k best, by value and then by id. `torch.topk` orders equals as it likes."""
    if k == 0:
        empty = log_probs.new_empty((log_probs.shape[0], 0))
        return empty.long(), empty
    values, ids = torch.topk(log_probs, k)
    tied = (log_probs >= values[:, -1:]).sum(1) > k
    for row in tied.nonzero()[:, 0].tolist():
        candidates = (log_probs[row] >= values[row, -1]).nonzero()[:, 0]
        order = log_probs[row, candidates].sort(descending=True, stable=True).indices[:k]
        ids[row] = candidates[order]
        values[row] = log_probs[row, ids[row]]
    by_id = ids.argsort(1)
    ids, values = ids.gather(1, by_id), values.gather(1, by_id)
    by_value = values.sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, by_value), values.gather(1, by_value)


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """`Logprobs` on their way from the device: read only when the step has landed."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def landed(self) -> Logprobs:
        return Logprobs(
            self.token_ids.numpy().astype(np.int32),
            self.logprobs.numpy(),
            self.ranks.numpy().astype(np.int32),
            self.top_ids.numpy().astype(np.int32),
            self.top_logprobs.numpy(),
        )


def pick_on_device(log_probs: torch.Tensor, token_ids: torch.Tensor, k: int) -> DeviceLogprobs:
    """As `pick`, without waiting for the device: copies to page-locked memory are enqueued."""
    vocab = log_probs.shape[1]
    chosen = log_probs.gather(1, token_ids[:, None])
    ranks = (log_probs > chosen).sum(1) + 1
    # Floats order as their bits do (below zero, as those turned around): above the id, they make equals distinct.
    bits = (log_probs + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) + torch.arange(vocab - 1, -1, -1, device=log_probs.device)
    top_ids = vocab - 1 - (keys.topk(min(k, vocab), dim=1).values & 0xFFFFFFFF)
    top = log_probs.gather(1, top_ids)
    return DeviceLogprobs(*(_homeward(each) for each in (token_ids, chosen[:, 0], ranks, top_ids, top)))


def score_on_device(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    vocab_size: int,
    k: int,
) -> list[DeviceLogprobs]:
    """As `score`, in slices, without waiting for the device."""
    step = max(1, SLICE_ELEMENTS // vocab_size)
    return [
        pick_on_device(torch.log_softmax(logits(hidden[start : start + step]), 1), token_ids[start : start + step], k)
        for start in range(0, len(token_ids), step)
    ]


def joined(parts: list[Logprobs]) -> Logprobs:
    """Consecutive positions as one."""
    return Logprobs(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        ranks=np.concatenate([part.ranks for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )


def _homeward(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

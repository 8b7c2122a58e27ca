"""Log-probabilities of tokens under the model's own distribution, before any sampling parameter."""

from __future__ import annotations

from collections.abc import Callable

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
    return Logprobs(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        ranks=np.concatenate([part.ranks for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )


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

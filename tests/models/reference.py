"""The same toy Llama here and in `transformers`, and how far apart their logits are."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers

from tests.toy import VOCAB_SIZE, toy_llama

LENGTH = 75


def checkpoint(folder: Path, *, max_shard_size: str = "1GB", **changes: object) -> transformers.LlamaForCausalLM:
    """A toy Llama on disk whose norms and biases, constant when fresh, are random too."""
    reference = toy_llama(folder, **changes)
    generator = torch.Generator().manual_seed(5)
    for parameter in reference.parameters():
        if parameter.dim() == 1:
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.data.add_(noise)
    reference.save_pretrained(folder, max_shard_size=max_shard_size)
    return reference


def tokens(seed: int, length: int = LENGTH) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB_SIZE) for _ in range(length)]


def expected(reference: transformers.LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest logit; NaN is infinite."""
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    return float(difference.nan_to_num(nan=torch.inf))

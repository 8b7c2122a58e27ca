"""What the executor sees of any model."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

import torch

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV
from tokenspeed.layers.module import BuildContext, Module


class CausalLM(Module):
    """A decoder. It computes tokens at positions against a cache, and knows nothing of requests.

    `kv_spec` says what each layer keeps per token. `ignored` matches the names of checkpoint tensors that
    the model does without; any other tensor that it has no place for is an error.
    """

    kv_spec: list[KVSpec]
    ignored: re.Pattern[str]

    @abstractmethod
    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        """Build with uninitialised weights. Raises `CheckpointError` naming file and field."""
        super().__init__()

    @abstractmethod
    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Hidden states [T, H] after the final norm; `kv` has one entry a layer, written in place."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H], the rows that sample → float32 [S, V]."""

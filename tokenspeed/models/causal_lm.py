"""What the executor sees of any model."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.attention import AttentionInput
from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV, TokenInput
from tokenspeed.layers.module import BuildContext, Module


class Pieces(Protocol):
    """A model cut at its attentions, as whoever captures what lies between them runs it: piece 0, attention 0, piece 1,
    …, the last piece. Of a piece everything depends on the number of tokens alone."""

    @property
    def num_pieces(self) -> int:
        """One more than there are attentions."""
        ...

    @property
    def attended_width(self) -> int:
        """Numbers that each attention gives a token."""
        ...

    def piece(
        self, index: int, x: torch.Tensor | None, residual: torch.Tensor | None, tokens: TokenInput,
        kv: Sequence[LayerKV],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """What attention `index` − 1 gave and the stream beside it, both None for piece 0 → queries for attention
        `index` and the stream; the last piece gives hidden states after the final norm and None."""
        ...

    def attend(
        self, index: int, q: torch.Tensor, inputs: AttentionInput, kv: Sequence[LayerKV], out: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention `index`, in `out` if given. Fewer rows may come than the piece had: the others were padding."""
        ...


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

    @property
    @abstractmethod
    def pieces(self) -> Pieces | None:
        """The same, cut at its attentions; None where these are not alike."""

    @abstractmethod
    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Hidden states [T, H] after the final norm; `kv` has one entry a layer, written in place."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H], the rows that sample → float32 [S, V]."""

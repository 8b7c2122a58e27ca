"""What a decode step really reads of what it may: distinct experts.

Captured steps call no module, so the choice of experts is looked at in one step that is not captured: a short prompt
joins the streams, and routers say what they gave the rows that decode, which come first in such a step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch.nn.modules.module import register_module_forward_hook

from tokenspeed.layers.moe import Router

PROMPT = 2
"""Tokens of the prompt that joins: with one it would be a row like those that decode."""


class ChosenExperts:
    """While entered, keeps for every router the distinct experts, shared ones left out, that the first `rows` tokens of
    its calls chose. Calls with other than `rows` + `PROMPT` tokens are other steps and are left out.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._chosen: list[torch.Tensor] = []
        self._remove: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._remove = register_module_forward_hook(self._look).remove
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._remove is not None
        self._remove()

    def _look(self, module: torch.nn.Module, _: Any, routed: Any) -> None:
        if isinstance(module, Router) and len(routed[0]) == self._rows + PROMPT:
            ids = routed[0][: self._rows]
            self._chosen.append(ids[(ids >= 0) & (ids < module.weight.shape[0])])

    def text(self) -> str:
        """The mean over layers, and the least and most of one; a dash for a model without experts."""
        if not self._chosen:
            return "–"
        counts = [len(set(ids.tolist())) for ids in self._chosen]
        return f"{statistics.mean(counts):.1f} ({min(counts)}–{max(counts)})"

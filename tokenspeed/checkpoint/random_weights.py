"""Random weights that behave like trained ones where speed depends on it: experts are chosen evenly.

N(0, 0.02), norms 1, biases 0, the embedding 25 times as large: a stream of tokens as small as their updates would
send every token to the same experts, and flatter whatever is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tokenspeed.kernels.forms import PANELS, pack
from tokenspeed.layers.module import Weight

STD = 0.02
EMBEDDING_SCALE = 25.0
SEED = 0


def fill_random(weights: Iterable[Weight], progress: Callable[[int, int], None] | None = None) -> None:
    """Fill every parameter on its device, the same numbers each time."""
    filled = list(weights)
    total, done = sum(_num_bytes(weight) for weight in filled), 0
    generators: dict[torch.device, torch.Generator] = {}
    for weight in filled:
        device = weight.parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(SEED)
        data = weight.parameter.data
        packed = weight.form == PANELS
        rows = torch.empty(weight.shape, dtype=data.dtype, device=device) if packed else data
        randomise(weight.whole_pieces[0].source, rows, generators[device])
        if packed:
            data.copy_(pack(rows).data)
        done += _num_bytes(weight)
        if progress is not None:
            progress(done, total)


def randomise(name: str, values: torch.Tensor, generator: torch.Generator) -> None:
    """Overwrite `values`, part of the checkpoint tensor `name` or all of it."""
    if name.endswith("norm.weight"):
        values.fill_(1)
    elif name.endswith("bias"):
        values.zero_()
    else:
        values.normal_(0.0, STD * (EMBEDDING_SCALE if name.endswith("embed_tokens.weight") else 1), generator=generator)


def _num_bytes(weight: Weight) -> int:
    return weight.parameter.numel() * weight.parameter.element_size()

"""Random weights that behave like trained ones where speed depends on it: experts are chosen evenly.

N(0, 0.02), norms 1, biases 0, the embedding 25 times as large: a stream of tokens as small as their updates would
send every token to the same experts, and flatter whatever is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tokenspeed.checkpoint.packing import round_rows
from tokenspeed.kernels.forms import PANELS, ROWS, pack_into, put_rows
from tokenspeed.layers.module import Weight

STD = 0.02
EMBEDDING_SCALE = 25.0
SEED = 0
PART_ROWS = 256
"""Of a packed weight that are made before they are rounded."""


def fill_random(weights: Iterable[Weight], progress: Callable[[int, int], None] | None = None) -> None:
    """Fill every parameter on its device, the same numbers each time."""
    filled = list(weights)
    total, done = sum(_num_bytes(weight) for weight in filled), 0
    generators: dict[torch.device, torch.Generator] = {}
    for weight in filled:
        device = weight.parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(SEED)
        _fill(weight, generators[device])
        done += _num_bytes(weight)
        if progress is not None:
            progress(done, total)


def _fill(weight: Weight, generator: torch.Generator) -> None:
    name, values = weight.whole_pieces[0].source, weight.parameter.data
    if weight.form == ROWS:
        randomise(name, values, generator)
        return
    if weight.form == PANELS:
        whole = torch.empty(weight.shape, dtype=values.dtype, device=values.device)
        randomise(name, whole, generator)
        pack_into(values, whole)
        return
    num_rows, columns = weight.shape
    for start in range(0, num_rows, PART_ROWS):
        rows = torch.empty((min(PART_ROWS, num_rows - start), columns))
        randomise(name, rows, generator)
        put_rows(values, start, round_rows(name, rows))


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

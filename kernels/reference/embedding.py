"""embedding: rows of a table."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.registry import Implementation, plain


def embedding(ids: Tensor, table: Tensor, /) -> Tensor:
    return functional.embedding(ids, table)


IMPLEMENTATION = Implementation("embedding", "reference", plain(embedding))

"""packed_embedding: launcher of `embedding` in kernels.cc, a lane of a panel a token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect_contiguous
from tokenspeed.kernels.cpu.blocks import checked
from tokenspeed.kernels.forms import Packed
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    dtype, launch, form = target.dtype, kernels.embedding, str(traits["matrix_form"])

    def packed_embedding(ids: Tensor, table: Packed, /) -> Tensor:
        rows, columns, _ = checked("table", table, form, dtype)
        tokens = ids.shape[0]
        expect_contiguous("ids", ids, torch.int64, (tokens,))
        out = torch.empty((tokens, columns), dtype=dtype)
        launch(form, table.data.data_ptr(), rows, columns, ids.data_ptr(), tokens, out.data_ptr())
        return out

    return packed_embedding

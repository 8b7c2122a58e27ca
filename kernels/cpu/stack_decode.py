"""stack_decode: launcher of `stack` in blocks.cc, all layers of a decode step in one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from tokenspeed.kernels.block_weights import CacheRows, DenseLayer
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.cpu.blocks import located
from tokenspeed.kernels.cpu.gqa_block_decode import described_gqa
from tokenspeed.kernels.cpu.mlp_block_decode import described_mlp
from tokenspeed.kernels.forms import form_of
from tokenspeed.kernels.registry import Kernel, Target, Traits


def _same(given: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> bool:
    return len(given) == len(known) and all(map(is_, given, known))


class StackDecode:
    """What does not change from step to step is prepared at the first call with these layers and caches."""

    def __init__(self, kernels: _ops.Kernels, target: Target, traits: Traits) -> None:
        self._kernels, self._dtype, self._traits = kernels, target.dtype, traits
        self._hidden = int(traits["hidden_size"])
        self._layers: tuple[DenseLayer, ...] = ()
        self._caches: tuple[Tensor, ...] = ()
        self._gain: Tensor | None = None
        self._stack: _ops.Stack

    def __call__(
        self, x: Tensor, layers: tuple[DenseLayer, ...], caches: Sequence[tuple[Tensor, ...]], rows: CacheRows,
        gain: Tensor, eps: float, /,
    ) -> Tensor:  # fmt: skip
        # A list of caches may be given others in place, so it is looked through: 3 µs for 30 layers.
        given = tuple(chain.from_iterable(caches))
        if layers is not self._layers or gain is not self._gain or not _same(given, self._caches):
            self._prepare(layers, given, gain)
        place, num_rows = located(rows)
        shape = num_rows, self._hidden
        expect("x", x, self._dtype, shape)
        y = torch.empty(shape, dtype=self._dtype)
        self._stack.run(
            place, x.data_ptr(), x.stride(0), gain.data_ptr(), eps, y.data_ptr(), num_rows, torch.get_num_threads()
        )
        return y

    def _prepare(self, layers: tuple[DenseLayer, ...], caches: tuple[Tensor, ...], gain: Tensor) -> None:
        if len(caches) != 2 * len(layers):
            raise ValueError(f"{len(layers)} layers have {len(caches)} caches; each has one of k and one of v")
        dtype, gains = self._dtype, (self._hidden,)
        expect_contiguous("the last gain", gain, dtype, gains)
        stack = _ops.Stack(self._kernels)
        for layer, k_cache, v_cache in zip(layers, caches[::2], caches[1::2], strict=True):
            expect_contiguous("the gain before attention", layer.attention_gain, dtype, gains)
            expect_contiguous("the gain before the feed-forward", layer.mlp_gain, dtype, gains)
            if k_cache.shape[0] != caches[0].shape[0]:
                raise ValueError(f"a cache has {k_cache.shape[0]} blocks, that of the first layer {caches[0].shape[0]}")
            if layer.attention.cos_sin.shape != layers[0].attention.cos_sin.shape:
                raise ValueError("the tables of angles differ in their shape from layer to layer")
            attention, mlp = layer.attention, layer.mlp
            forms = form_of(attention.qkv), form_of(attention.out)
            stack.add(
                described_gqa(
                    self._kernels, dtype, self._traits, forms, attention, layer.head_eps, k_cache, v_cache, layer.scale
                ),
                layer.attention_gain.data_ptr(),
                described_mlp(self._kernels, dtype, self._traits, (form_of(mlp.gate_up), form_of(mlp.down)), mlp),
                layer.mlp_gain.data_ptr(),
                layer.eps,
            )
        self._stack, self._layers, self._caches, self._gain = stack, layers, caches, gain


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return StackDecode(kernels, target, traits)

"""Which kernels a GPU would compile, found on a CPU: launches are recorded instead of made."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenspeed.kernels.platform import Platform

HOPPER = Platform("nvidia", "sm90", frozenset({"sm80", "sm86", "sm87", "sm89", "sm90"}))
MULTIPROCESSORS = 132

Variant = tuple[str, ...]
"""A kernel, and what its arguments are specialised by: one compilation each."""


class _ShapesAlone(TorchDispatchMode):
    """Products of matrices, and rows that are gathered, have shapes and no values: kernels are chosen by shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        match func._schema.name:
            case "aten::bmm" | "aten::mm":
                (*head, _), (*_, columns) = args[0].shape, args[1].shape
                out = kwargs.get("out")
                dtype = kwargs.get("out_dtype") or next((each for each in args[2:]), args[0].dtype)
                return args[0].new_empty((*head, columns), dtype=dtype) if out is None else out
            case "aten::linear":
                return args[0].new_empty((*args[0].shape[:-1], args[1].shape[0]))
            case "aten::addmm":
                return args[1].new_empty((args[1].shape[0], args[2].shape[1]))
            case "aten::index_select" if args[0].is_floating_point():
                out = kwargs.get("out")
                return args[0].new_empty((len(args[2]), *args[0].shape[1:])) if out is None else out
            case "aten::_grouped_mm":
                return args[0].new_empty((args[0].shape[0], args[1].shape[-1]))
            case _:
                return func(*args, **kwargs)


class Variants:
    """What has been launched: `found` counts variants; `take` gives those since the last call and forgets them not."""

    def __init__(self) -> None:
        self.found: Counter[Variant] = Counter()
        self._binders: dict[Any, Any] = {}
        self._taken: set[Variant] = set()

    def take(self) -> list[Variant]:
        """Those that had not been met when this was last called."""
        new = [each for each in self.found if each not in self._taken]
        self._taken.update(new)
        return new

    def launched(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # As `JITFunction.run` makes its key, for a device that is not here.
        if kernel not in self._binders:
            from triton.backends.compiler import GPUTarget  # noqa: PLC0415
            from triton.compiler import make_backend  # noqa: PLC0415
            from triton.runtime.jit import create_function_from_signature  # noqa: PLC0415

            backend = make_backend(GPUTarget("cuda", 90, 32))
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, special, options = self._binders[kernel](*args, **kwargs)
        named = [f"{param.name}={_plain(each)}" for param, each in zip(kernel.params, special, strict=True)]
        name = f"{kernel.fn.__module__.removeprefix('tokenspeed.kernels.')}.{kernel.fn.__name__}"
        self.found[name, *named, str(sorted(options.items()))] += 1

    def planned(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Any:
        """In place of cuDNN's attention, which plans for every combination of lengths."""
        self.found["cudnn", f"q={tuple(q.shape)}", f"k={tuple(k.shape)}", f"causal={causal}"] += 1
        return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[0], q.shape[2], q.shape[1]).float()


def _plain(special: Any) -> str:
    kind, value = special
    return f"{kind}:{value}"


@contextmanager
def recorded() -> Iterator[Variants]:
    """Kernels of a Hopper, with what they ask of the device, launched on tensors of this machine's memory."""
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    variants = Variants()
    modules = [
        importlib.import_module(f"tokenspeed.kernels.{name}")
        for name in itertools.chain(
            (f"triton.{each}" for each in (
                "block_norm", "decode_inputs", "embedding", "kv_store", "launch", "linear", "mha_decode",
                "mha_prefill", "mla_block_decode", "mla_decode", "mla_prefill", "moe_block_decode", "moe_experts",
                "moe_route", "rms_norm", "rotary", "sample", "silu_mul",
            )),
            ("library.mla_prefill", "library.moe_experts", "hopper.mla_decode"),
        )
    ]  # fmt: skip
    answers = {"is_hopper": True, "num_multiprocessors": MULTIPROCESSORS}

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        variants.launched(kernel, *args, **kwargs)

    patches: list[Any] = [mock.patch.object(JITFunction, "run", run)]
    for module in modules:
        patches += [
            mock.patch.object(module, name, lambda device, answer=answer: answer)
            for name, answer in answers.items() if name in vars(module)
        ]  # fmt: skip
    for each in patches:
        each.start()
    try:
        with _ShapesAlone():
            yield variants
    finally:
        for each in reversed(patches):
            each.stop()

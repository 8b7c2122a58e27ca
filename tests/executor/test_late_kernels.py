"""Operators see a kernel that is compiled in a step."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tokenspeed.executor.late_kernels import report_late_kernels

triton = pytest.importorskip("triton")


def test_a_kernel_that_is_compiled_after_the_start_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiled as Triton does it, but for the compiler, which needs a GPU."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - where triton is
    from triton.compiler import make_backend  # noqa: PLC0415

    from tokenspeed.kernels.triton.silu_mul import _silu_mul  # noqa: PLC0415

    for hook in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(triton.knobs.runtime, hook, None)
    kernel: Any = _silu_mul
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": 4})
    monkeypatch.setitem(kernel.device_caches, 0, ({}, {}, target, backend, None))
    monkeypatch.setattr(kernel, "ASTSource", lambda *_: None, raising=False)
    monkeypatch.setattr(kernel, "compile", lambda *_, **__: "compiled", raising=False)
    report_late_kernels()
    with caplog.at_level(logging.WARNING):
        made = kernel._do_compile("key", {}, 0, {}, options, {}, warmup=False)
    assert made == "compiled"
    (line,) = caplog.messages
    assert "a step waited 0.0" in line and "_silu_mul" in line

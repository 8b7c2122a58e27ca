"""The ranks of an all-reduce through shared memory: processes that run the kernels in Triton's interpreter, one call
after the other, at their own pace; and what a Hopper's compiler makes of words that are pushed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from tokenspeed.kernels import peers

ROOT = Path(__file__).parents[2]
RANKS, ROWS, HIDDEN = 3, 6, 32
PUSH, ONE, TWO = "PUSH", "ONE_SHOT", "TWO_SHOTS"
CALLS = (
    (2, ONE), (6, PUSH), (6, TWO), (1, PUSH), (1, PUSH), (1, ONE), (4, TWO), (4, PUSH), (4, TWO), (6, PUSH), (6, ONE),
    (1, TWO), (2, PUSH), (6, PUSH), (6, PUSH), (3, PUSH), (2, ONE), (5, PUSH), (5, ONE), *[(2, PUSH)] * 6,
)  # fmt: skip
"""Tokens of each call, and its form."""

OLD_ROWS, LONG_CALLED = 3, -3
"""Calls of every form that the first rows had before, modulo 2³²: their counts begin again at 0 while the ranks run."""


triton_missing = importlib.util.find_spec("triton") is None


@pytest.mark.skipif(triton_missing, reason="triton is not installed")
def test_ranks_at_their_own_pace_get_every_sum_and_the_same_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_all_reduce_norm"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


compiles = pytest.mark.skipif(
    triton_missing or os.environ.get("TRITON_INTERPRET") == "1", reason="nothing to compile with"
)


@compiles
@pytest.mark.parametrize(("hidden", "num_ranks"), [(2048, 2), (4096, 4)])
def test_pushed_words_are_written_and_polled_whole_without_fences_or_atomics(hidden: int, num_ranks: int) -> None:
    """A word's data and number must not be torn, nor its reading leave the loop that waits for it."""
    from tokenspeed.kernels.triton.all_reduce_norm import _push_norm, push_sizes  # noqa: PLC0415

    words = hidden // 2
    ptx = compiled(_push_norm, hidden, num_ranks, {"ITEMS": 2, "WORDS": words, **push_sizes(words, num_ranks)})
    there, _, polled = ptx.partition("bra.uni")[0].partition("Inner Loop Header")
    num_peers = num_ranks - 1
    assert ptx.count("st.global.wt.v2.b64") == num_peers
    assert there.count("ld.volatile.global.v2.b64") >= num_peers
    assert polled.count("ld.volatile.global.v2.b64") >= num_peers
    assert "ld.volatile.global.b" not in ptx
    assert there.index("griddepcontrol.wait") < there.index("st.global.wt")
    assert re.search(r"\b(atom|red|fence|membar)\.", ptx) is None


@compiles
@pytest.mark.parametrize(("hidden", "num_ranks", "warps"), [(2048, 2, 4), (2048, 2, 8), (4096, 4, 4), (2880, 8, 8)])
def test_on_a_hopper_no_warp_meets_another_until_each_has_its_own_words(
    hidden: int, num_ranks: int, warps: int
) -> None:
    from tokenspeed.kernels.hopper.all_reduce_norm import _push_norm, push_sizes  # noqa: PLC0415

    sizes = push_sizes(hidden, 2, num_ranks, warps)
    assert sizes is not None
    pairs, lanes = sizes["PAIRS"], sizes["LANES"]
    ptx = compiled(_push_norm, hidden, num_ranks, sizes)
    begin, found, after = ptx.partition("@p bra look;")
    before, _, looking = begin.partition("look:")
    stored, polled = "st.relaxed.sys.global.v2.b64", "ld.relaxed.sys.global.v2.b64"
    assert found and [ptx.count(each) for each in (stored, polled)] == [pairs * (num_ranks - 1), pairs * lanes]
    assert before.count(stored) == pairs * (num_ranks - 1) and looking.count(polled) == pairs * lanes
    assert before.index("griddepcontrol.wait") < before.index(stored)
    assert "bar." not in begin and "shared" not in begin.partition("griddepcontrol")[2], "threads meet, or exchange"
    assert after.index("bar.sync") < after.rindex("st.global.b32"), "the count is stored behind the norm's sum"
    assert re.search(r"\b(atom|red|fence|membar)\.", ptx) is None


@compiles
def test_what_a_thread_pushes_on_a_hopper_covers_a_row_in_pairs_of_words() -> None:
    from tokenspeed.kernels.hopper.all_reduce_norm import MOST_WARPS, PAIRS_AT_ONCE, push_sizes  # noqa: PLC0415

    for hidden, itemsize, num_ranks in itertools.product((4, 64, 576, 2048, 2880, 4096, 7168), (2, 4), (2, 3, 8)):
        sizes = push_sizes(hidden, itemsize, num_ranks, 4)
        if sizes is None:
            assert hidden * itemsize * (num_ranks - 1) > 8 * 32 * MOST_WARPS * PAIRS_AT_ONCE // 4
            continue
        assert sizes["NUMBERS"] * itemsize == 8 and sizes["LANES"] >= num_ranks - 1
        assert sizes["BLOCK"] == sizes["PAIRS"] * sizes["NUMBERS"] * 32 * sizes["num_warps"] >= hidden
        assert sizes["PAIRS"] * sizes["LANES"] <= PAIRS_AT_ONCE
    assert push_sizes(75, 2, 2, 4) is None and push_sizes(3, 4, 2, 4) is None


def compiled(kernel: Any, hidden: int, num_ranks: int, sizes: dict[str, int]) -> str:
    """PTX of a push of bfloat16 rows by rank 1, on a Hopper."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415
    from triton.experimental.gluon._runtime import GluonASTSource  # noqa: PLC0415

    options = {"num_warps": sizes["num_warps"], "launch_pdl": True}
    constants = {
        "RANK": 1, "NUM": num_ranks, "HIDDEN": hidden, "HAS_RESIDUAL": True, "DEPENDENT": True,
        **{name: size for name, size in sizes.items() if name not in options},
    }  # fmt: skip
    tensors = dict.fromkeys(("x", "residual", "weight", "y", "residual_out"), "*bf16")
    numbers = {"calls": "*i32", "eps": "fp32", "x_stride": "i32", "residual_stride": "i32", "rows": "i32"}
    types = {**tensors, "words": ("*i64",) * num_ranks, **numbers, **dict.fromkeys(constants, "constexpr")}
    places = {name: at for at, name in enumerate(kernel.arg_names)}
    aligned = [(places[name],) for name in (*tensors, "calls", "x_stride", "residual_stride")]
    aligned += [(places["words"], rank) for rank in range(num_ranks)]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {(places[name],): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in aligned},
    )
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def given(call: int, rank: int) -> torch.Tensor:
    return torch.randn(CALLS[call][0], HIDDEN, generator=torch.Generator().manual_seed(100 * call + rank))


def run(rank: int, own: peers.Peers, results: torch.Tensor) -> None:
    """All calls of one rank; `results` [calls, 2, ROWS, HIDDEN] gets what they give."""
    torch.set_num_threads(1)
    # Not before the process has asked for the interpreter.
    from tokenspeed.kernels.triton.all_reduce_norm import Form, launched  # noqa: PLC0415

    pace, gain = random.Random(rank), torch.ones(HIDDEN)
    for call, (tokens, form) in enumerate(CALLS):
        time.sleep(pace.choice((0.0, 0.0, 0.1)))
        residual = given(call, RANKS)
        for at, tensor in enumerate(launched(given(call, rank), gain, 1e-5, residual, own, Form[form])):
            results[call, at, :tokens] = tensor


def main() -> None:
    """Start the ranks, and compare what all of them got with sums written out."""

    def shared(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype).share_memory_()

    terms, sums = ([shared(2, ROWS, HIDDEN) for _ in range(RANKS)] for _ in range(2))
    arrived = [shared(ROWS, RANKS, dtype=torch.int32) for _ in range(RANKS)]
    summed = [shared(ROWS, dtype=torch.int32) for _ in range(RANKS)]
    for each in (*arrived, *summed):
        each[:OLD_ROWS] = LONG_CALLED
    words = [shared(2, ROWS, RANKS, HIDDEN, dtype=torch.int64) for _ in range(RANKS)]
    for each in words:
        each[:, :OLD_ROWS] = LONG_CALLED - torch.tensor([1, 0])[:, None, None, None] << 32
    results = shared(RANKS, len(CALLS), 2, ROWS, HIDDEN)
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(RANKS):
        calls = torch.zeros(3, ROWS, dtype=torch.int32)
        calls[:, :OLD_ROWS] = LONG_CALLED
        own = peers.Peers(rank, *map(tuple, (terms, sums, arrived, summed, words)), calls)
        processes.append(context.Process(target=run, args=(rank, own, results[rank])))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for call, (tokens, _) in enumerate(CALLS):
        want = sum((given(call, rank) for rank in range(RANKS)), given(call, RANKS))
        for rank in range(RANKS):
            y, r = results[rank, call, :, :tokens]
            torch.testing.assert_close(r, want, rtol=1e-5, atol=1e-5, msg=f"call {call}, rank {rank}")
            torch.testing.assert_close(y, want * torch.rsqrt(want.square().mean(1, keepdim=True) + 1e-5))
            assert torch.equal(r, results[0, call, 1, :tokens]), f"call {call}: rank {rank} has other bits than rank 0"


if __name__ == "__main__":
    main()

"""all_reduce_norm on Hopper: the push of the Triton version, in which each thread waits for its own words alone.

A thread holds the same numbers of every rank's term: it stores its own as words of 32 bits of data below the number of
the call, two words at once, then reads those of all peers until each word has this number, or a later one: a loop of
its own, in which no warp meets another. The first barrier of a program is that of the norm's sum.

Why no fence: nothing but a word says that the word is there. Each is one access of 64 bits, relaxed and of the whole
system: not torn, never kept in a register or an L1 cache. Why no barrier before the count of calls is stored: it is
stored behind the norm's sum, which has words of every warp, and each of them knew the count before it looked for its
words. Why a half of memory may be written again: a rank's words of call c + 2 depend on those of its peers of c + 1
(its kernel ends when it has them, and the next writes nothing before), and these on what the peers read in call c; what
was read cannot depend on a store that depends on it. The count is on the device, so a graph may be replayed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.peers import PUSH, Peers
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton import all_reduce_norm as portable
from tokenspeed.kernels.triton.launch import dependent_launch

PAIRS_AT_ONCE = 16
"""Loads of two words that a thread has in flight: four registers each."""

MOST_WARPS = 16


@gluon.constexpr_function
def _store_pairs(pairs, numbers):
    """PTX that stores so many pairs of words, of so many numbers each. Operands: results (zeros), then for each number
    the address of its pair, its bits, the call, and whether it is there."""
    address, data = 2 * pairs, 2 * pairs + pairs * numbers
    call, there = data + 2 * pairs, data + 2 * pairs + pairs * numbers
    lines = ["{ .reg .pred p; .reg .b64 w<2>;"]
    for pair in range(pairs):
        lines += [
            f"mov.b64 w0, {{${data + 2 * pair}, ${call}}}; mov.b64 w1, {{${data + 2 * pair + 1}, ${call}}};",
            f"setp.ne.s32 p, ${there + pair * numbers}, 0;",
            f"@p st.relaxed.sys.global.v2.b64 [${address + pair * numbers}], {{w0, w1}};",
            f"mov.b32 ${2 * pair}, 0; mov.b32 ${2 * pair + 1}, 0;",
        ]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _stored_operands(pairs, numbers):
    each = pairs * numbers
    return ",".join(["=&r"] * 2 * pairs + ["l"] * each + ["r"] * 2 * pairs + ["r"] * 2 * each)


@gluon.constexpr_function
def _await_pairs(pairs, numbers):
    """PTX that reads so many pairs of words until all are of the call or later. Operands: their low halves, then for
    each number the address of its pair, and the call."""
    words, address, call = 2 * pairs, 2 * pairs, 2 * pairs + pairs * numbers
    lines = [f"{{ .reg .pred p; .reg .b32 late, data<{words}>, flag<{words}>; .reg .b64 w<{words}>;", "look:"]
    lines += [
        f"ld.relaxed.sys.global.v2.b64 {{w{2 * pair}, w{2 * pair + 1}}}, [${address + pair * numbers}];"
        for pair in range(pairs)
    ]
    lines += [f"mov.b64 {{data{word}, flag{word}}}, w{word};" for word in range(words)]
    # Only the sign of a difference counts, as calls begin again at 0: the sign of all of them is their `or`'s.
    lines += [f"sub.s32 flag{word}, flag{word}, ${call};" for word in range(words)]
    lines += ["mov.b32 late, flag0;", *(f"or.b32 late, late, flag{word};" for word in range(1, words))]
    lines += ["setp.lt.s32 p, late, 0;", "@p bra look;"]
    lines += [f"mov.b32 ${word}, data{word};" for word in range(words)]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _awaited_operands(pairs, numbers):
    each = pairs * numbers
    return ",".join(["=r"] * 2 * pairs + ["l"] * each + ["r"] * each)


@gluon.constexpr_function
def _bits(numbers):
    return gl.int16 if numbers == 4 else gl.int32


@gluon.jit
def _push_norm(
    x, residual, weight, y, residual_out, words, calls, eps, x_stride, residual_stride, rows,
    RANK: gl.constexpr, NUM: gl.constexpr, LANES: gl.constexpr, NUMBERS: gl.constexpr, PAIRS: gl.constexpr,
    HIDDEN: gl.constexpr, BLOCK: gl.constexpr, HAS_RESIDUAL: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    # A thread has pairs of words of all lanes, which are the peers in order, the last of them several times.
    wide_layout: gl.constexpr = gl.BlockedLayout([LANES, NUMBERS], [1, 32], [1, gl.num_warps()], [1, 0])
    layout: gl.constexpr = gl.SliceLayout(0, wide_layout)
    dtype: gl.constexpr = x.dtype.element_ty
    row_words: gl.constexpr = HIDDEN * 2 // NUMBERS
    token = gl.program_id(0)
    wide = token.to(gl.int64)
    h = gl.arange(0, BLOCK, layout=layout)
    inside = h < HIDDEN
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(1, wide_layout))
    peer = gl.minimum(lane, NUM - 2)
    from_rank = peer + (peer >= RANK).to(gl.int32)
    # Of a pair: what is behind a row's end looks at the row's last.
    word = gl.minimum(h // NUMBERS * 2, row_words - 2)
    if DEPENDENT:
        gdc_launch_dependents()
    gain = gl.load(weight + h, mask=inside, other=0.0).to(gl.float32)
    if DEPENDENT:
        gdc_wait()
    call = gl.load(calls + token) + 1
    own = gl.load(x + wide * x_stride + h, mask=inside, other=0.0)
    own_bits = own.to(_bits(NUMBERS), bitcast=True)
    row = ((call & 1) * rows + wide) * NUM
    for q in gl.static_range(NUM):
        if q != RANK:
            gl.inline_asm_elementwise(
                _store_pairs(PAIRS, NUMBERS), _stored_operands(PAIRS, NUMBERS),
                [words[q] + (row + RANK) * row_words + word, own_bits, call, inside.to(gl.int32)],
                dtype=own_bits.dtype, is_pure=False, pack=PAIRS * NUMBERS,
            )  # fmt: skip
    before = gl.zeros([BLOCK], gl.float32, layout)
    if HAS_RESIDUAL:
        before += gl.load(residual + wide * residual_stride + h, mask=inside, other=0.0).to(gl.float32)
    data = gl.inline_asm_elementwise(
        _await_pairs(PAIRS * LANES, NUMBERS), _awaited_operands(PAIRS * LANES, NUMBERS),
        [words[RANK] + ((row + from_rank) * row_words)[:, None] + word[None, :], call],
        dtype=own_bits.dtype, is_pure=False, pack=PAIRS * LANES * NUMBERS,
    )  # fmt: skip
    terms = data.to(dtype, bitcast=True).to(gl.float32)
    total = gl.zeros([BLOCK], gl.float32, layout)
    for q in gl.static_range(NUM):
        if q == RANK:
            total += own.to(gl.float32)
        else:
            total += gl.sum(gl.where((lane == q - (q > RANK))[:, None], terms, 0.0), 0)
    r = gl.where(inside, total + before, 0.0).to(dtype)
    at_row = wide * HIDDEN + h
    gl.store(residual_out + at_row, r, mask=inside)
    # The sum as it is stored, not as it was before rounding: what the next layer adds to is what was normed.
    r_wide = r.to(gl.float32)
    scale = gl.rsqrt(gl.sum(r_wide * r_wide, 0) / HIDDEN + eps)
    gl.store(y + at_row, (r_wide * scale * gain).to(y.dtype.element_ty), mask=inside)
    gl.store(calls + token, call)


def push_sizes(hidden: int, itemsize: int, num_ranks: int, warps: int) -> dict[str, int] | None:
    """How a push of rows of `hidden` numbers is laid out, with at least so many warps a row; None where rows are no
    whole pairs of words, or a thread would have too many."""
    numbers = 8 // itemsize
    if hidden % numbers:
        return None
    lanes = triton.next_power_of_2(num_ranks - 1)
    while warps < MOST_WARPS and lanes * triton.next_power_of_2(hidden) > PAIRS_AT_ONCE * 32 * warps * numbers:
        warps *= 2
    block = max(32 * warps * numbers, triton.next_power_of_2(hidden))
    pairs = block // (32 * warps * numbers)
    if lanes * pairs > PAIRS_AT_ONCE:
        return None
    return {"LANES": lanes, "NUMBERS": numbers, "PAIRS": pairs, "BLOCK": block, "num_warps": warps}


def all_reduce_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, peers: Peers, /, *, warps: int
) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    num_ranks = len(peers.terms)
    form = portable.form_of(x, num_ranks)
    sizes = push_sizes(hidden, x.element_size(), num_ranks, warps)
    if form is not portable.Form.PUSH or sizes is None or not tokens:
        return portable.launched(x, weight, eps, residual, peers, form)
    y, residual_out = (x.new_empty(tokens, hidden) for _ in range(2))
    other, stride = (x, 0) if residual is None else (residual, residual.stride(0))
    options: dict[str, Any] = {**sizes, **dependent_launch(True)}
    _push_norm[tokens,](
        x, other, weight, y, residual_out, peers.words, peers.calls[PUSH], eps, x.stride(0), stride,
        peers.words[peers.rank].shape[1], RANK=peers.rank, NUM=num_ranks, HIDDEN=hidden,
        HAS_RESIDUAL=residual is not None, DEPENDENT=True, **options,
    )  # fmt: skip
    return y, residual_out


def bind_4_warps(target: Target, traits: Traits) -> Kernel:
    return partial(all_reduce_norm, warps=4)


def bind_8_warps(target: Target, traits: Traits) -> Kernel:
    return partial(all_reduce_norm, warps=8)

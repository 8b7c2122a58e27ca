"""Check, then measure, the small ops and GQA decode on one GPU: `python scripts/bench_primitives.py [--only mha]`.

As bench_kernels.py does it: every shape is first compared with float64 on fresh random inputs (ragged lengths, permuted
blocks, NaN wherever nothing may be read, outputs poisoned), then timed by replays of a graph of many calls on
different data, more of it than the L2 cache holds. "layer" is a whole layer of Llama-8B's shape made of these
ops, replayed 3,000 times for identical bits. Peers (cuBLAS, torch's ops, FlashAttention and cuDNN through torch
on contiguous KV) are measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bench_kernels import BF16, L2_BYTES, RATE, Row, changed, measure, poisoned, relative_error, table
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference import rotary as rotary_reference
from tokenspeed.kernels.reference.mha_decode import mha_decode as mha_reference
from tokenspeed.kernels.reference.rms_norm import rms_norm as norm_reference
from tokenspeed.kernels.reference.silu_mul import silu_mul as silu_reference
from tokenspeed.kernels.registry import Target
from tokenspeed.kernels.triton import linear, mha_decode, rotary
from tokenspeed.kernels.triton.embedding import embedding
from tokenspeed.kernels.triton.kv_store import kv_store
from tokenspeed.kernels.triton.rms_norm import rms_norm
from tokenspeed.kernels.triton.silu_mul import silu_mul

TOLERANCE = 6e-3
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 64
HIDDEN, INNER = 4096, 14336


@dataclass(frozen=True)
class Trial:
    """One op, shape and variant: how to make its calls, how to compare one, and the bytes that one must move."""

    op: str
    shape: str
    variant: str
    num_bytes: float
    calls: Callable[[], list[Callable[[], object]]]
    error: Callable[[], float]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16).mul_(scale)


def num_copies(num_bytes: float, at_most: int = 64) -> int:
    return max(2, min(at_most, int(3 * L2_BYTES / num_bytes) + 1))


# --- linear ---------------------------------------------------------------------------------------------------------

LINEAR_SHAPES = (
    (2048, 2048), (2048, 3648), (4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096), (2048, 102400),
)  # fmt: skip


def linear_variants(tokens: int, tune: bool) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    yield "cuBLAS", functional.linear
    yield "triton", linear.Linear()
    if not tune:
        return
    vectors = (
        (4, 2048, 2048, 4), (2, 2048, 2048, 4), (8, 2048, 2048, 4), (2, 2048, 4096, 4), (2, 2048, 2048, 2),
        (4, 2048, 2048, 8), (8, 2048, 2048, 8), (8, 1024, 2048, 4), (16, 1024, 1024, 4),
    )  # fmt: skip
    tensors = (
        (16, 4, 128, 2048, 3), (32, 4, 64, 0, 5), (64, 4, 64, 0, 5), (16, 4, 128, 1024, 3), (16, 4, 64, 1024, 4),
        (32, 4, 64, 0, 7), (32, 4, 64, 512, 5), (32, 4, 128, 512, 3), (64, 4, 32, 0, 7), (16, 4, 64, 0, 7),
    )  # fmt: skip
    for v in vectors[: {1: 9, 2: 4, 4: 1}.get(tokens, 0)]:
        yield f"vector {v}", linear.Linear(linear.VectorConfig(*v))
    for t in tensors[: {1: 0, 2: 3}.get(tokens, 10)]:
        yield f"tensor {t}", linear.Linear(linear.TensorConfig(*t))


def linear_trials(tune: bool) -> Iterator[Trial]:
    for (k, n), tokens in itertools.product(LINEAR_SHAPES, (1, 2, 4, 16)):
        num_bytes = (n * k + tokens * (n + k)) * 2
        for name, kernel in linear_variants(tokens, tune):

            def calls(f=kernel, t=tokens, k=k, n=n, size=num_bytes) -> list[Callable[[], object]]:
                weights = [normal(n, k, scale=k**-0.5) for _ in range(num_copies(size))]
                xs = [normal(t, k) for _ in range(16)]
                pairs = zip(itertools.islice(itertools.cycle(weights), max(8, len(weights))), itertools.cycle(xs))
                return [functools.partial(f, x, w) for w, x in pairs]

            def error(f=kernel, t=tokens, k=k, n=n) -> float:
                x, w = normal(t, k), normal(n, k, scale=k**-0.5)
                return relative_error(poisoned(lambda: f(x, w)), x.double() @ w.double().T)

            yield Trial("linear", f"{k} → {n}, {tokens}", name, num_bytes, calls, error)


# --- elementwise ----------------------------------------------------------------------------------------------------


def norm_trials() -> Iterator[Trial]:
    def torch_norm(x: Tensor, w: Tensor, eps: float, r: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return functional.rms_norm(total, (total.shape[1],), w, eps), total

    for hidden, tokens in itertools.product((2048, 4096, 7168), (1, 32, 8192)):
        num_bytes = (4 * tokens + 1) * hidden * 2
        for name, kernel in (("torch", torch_norm), ("triton", rms_norm)):

            def calls(f=kernel, t=tokens, h=hidden, size=num_bytes) -> list[Callable[[], object]]:
                given = [(normal(t, h), normal(h), 1e-6, normal(t, h)) for _ in range(num_copies(size))]
                return [lambda a=each: f(*a) for each in given]

            def error(f=kernel, t=tokens, h=hidden) -> float:
                x, w, r = normal(t, h), normal(h), normal(t, h)
                y = poisoned(lambda: f(x, w, 1e-6, r)[0])
                return relative_error(y, norm_reference((x + r).double(), w.double(), 1e-6)[0])

            yield Trial("rms_norm", f"{tokens} × {hidden}", name, num_bytes, calls, error)


def rotation() -> Callable[..., tuple[Tensor, Tensor]]:
    target = Target(Platform.of(torch.device("cuda")), BF16)
    return rotary.bind(target, {"head_dim": HEAD_DIM, "interleaved": False})


def angles(positions: int = 8192) -> Tensor:
    angle = torch.rand(positions, HEAD_DIM // 2, device="cuda") * 100
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def rotary_trials() -> Iterator[Trial]:
    for tokens in (1, 32, 8192):
        num_bytes = tokens * (2 * (HEADS + KV_HEADS) * HEAD_DIM * 2 + HEAD_DIM * 4)

        def arguments(t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            fused = normal(t, HEADS + 2 * KV_HEADS, HEAD_DIM)
            positions = torch.randint(0, 8192, (t,), device="cuda")
            return fused[:, :HEADS], fused[:, HEADS : HEADS + KV_HEADS], positions, angles()

        def calls(t=tokens, size=num_bytes, make=arguments) -> list[Callable[[], object]]:
            turn, given = rotation(), [make(t) for _ in range(num_copies(size))]
            return [lambda a=each: turn(*a) for each in given]

        def error(t=tokens, make=arguments) -> float:
            q, k, positions, cos_sin = make(t)
            turn = rotary_reference.bind(Target(Platform("cpu", ""), torch.float64), {"interleaved": False})
            right = turn(q.double(), k.double(), positions, cos_sin.double())
            rotation()(q, k, positions, cos_sin)
            return max(relative_error(q, right[0]), relative_error(k, right[1]))

        yield Trial("rotary", f"{tokens} × ({HEADS} + {KV_HEADS}) × {HEAD_DIM}", "triton", num_bytes, calls, error)


def store_trials() -> Iterator[Trial]:
    for tokens in (1, 32, 8192):
        num_bytes = tokens * 4 * KV_HEADS * HEAD_DIM * 2

        def arguments(t: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
            fused = normal(t, HEADS + 2 * KV_HEADS, HEAD_DIM)
            caches = tuple(normal(2 * t // BLOCK + 2, BLOCK, KV_HEADS, HEAD_DIM) for _ in range(2))
            slots = torch.randperm(caches[0].shape[0] * BLOCK, device="cuda")[:t]
            return (fused[:, HEADS : HEADS + KV_HEADS], fused[:, HEADS + KV_HEADS :]), caches, slots

        def calls(t=tokens, size=num_bytes, make=arguments) -> list[Callable[[], object]]:
            given = [make(t) for _ in range(num_copies(size))]
            return [lambda a=each: kv_store(*a) for each in given]

        def error(t=tokens, make=arguments) -> float:
            tensors, caches, slots = make(t)
            wanted = [cache.flatten(0, 1).index_copy(0, slots, new) for cache, new in zip(caches, tensors, strict=True)]
            kv_store(tensors, caches, slots)
            same = all(torch.equal(cache.flatten(0, 1), right) for cache, right in zip(caches, wanted, strict=True))
            return 0.0 if same else float("inf")

        yield Trial("kv_store", f"{tokens} × 2 × {KV_HEADS} × {HEAD_DIM}", "triton", num_bytes, calls, error)


def silu_trials() -> Iterator[Trial]:
    for tokens in (1, 32, 8192):
        num_bytes = tokens * 3 * INNER * 2

        def calls(t=tokens, size=num_bytes) -> list[Callable[[], object]]:
            return [functools.partial(silu_mul, normal(t, 2 * INNER)) for _ in range(num_copies(size))]

        def error(t=tokens) -> float:
            gate_up = normal(t, 2 * INNER, scale=3.0)
            return relative_error(poisoned(lambda: silu_mul(gate_up)), silu_reference(gate_up.double()))

        yield Trial("silu_mul", f"{tokens} × {INNER}", "triton", num_bytes, calls, error)


def embedding_trials() -> Iterator[Trial]:
    for tokens in (1, 32, 8192):

        def arguments(t: int) -> tuple[Tensor, Tensor]:
            return torch.randint(0, 100_000, (t,), device="cuda"), normal(100_000, HIDDEN)

        def calls(t=tokens, make=arguments) -> list[Callable[[], object]]:
            _, rows = make(t)
            ids = torch.randint(0, 100_000, (16, t), device="cuda")
            return [functools.partial(embedding, each, rows) for each in ids]

        def error(t=tokens, make=arguments) -> float:
            ids, rows = make(t)
            return 0.0 if torch.equal(poisoned(lambda: embedding(ids, rows)), rows[ids]) else float("inf")

        yield Trial("embedding", f"{tokens} × {HIDDEN}", "triton", tokens * 2 * HIDDEN * 2, calls, error)


# --- mha_decode -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    query: int = HEADS
    kv: int = KV_HEADS
    dim: int = HEAD_DIM
    block: int = BLOCK


def paged(lengths: Sequence[int], heads: Heads, *, poison: bool) -> tuple[Tensor, ...]:
    """(q, k_cache, v_cache, block_table, kv_len) over permuted blocks."""
    counts = [-(-length // heads.block) for length in lengths]
    order = torch.randperm(sum(counts) + 1, device="cuda").int()
    caches = [normal(sum(counts) + 1, heads.block, heads.kv, heads.dim) for _ in range(2)]
    blocks = torch.full((len(lengths), max(1, *counts)), 2**30 if poison else 0, dtype=torch.int32, device="cuda")
    start = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        blocks[row, :count] = order[start : start + count]
        start += count
        if poison and length % heads.block:
            for cache in caches:
                cache[order[start - 1], length % heads.block :] = float("nan")
    q = normal(len(lengths), heads.query, heads.dim)
    return q, *caches, blocks, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def mha_error(kernel: mha_decode.MhaDecode, given: tuple[Tensor, ...]) -> float:
    """Worst relative error of a row, against float64, row by row to bound the memory."""
    q, k_cache, v_cache, blocks, kv_len = given
    scale = q.shape[2] ** -0.5
    result = poisoned(lambda: kernel(q, k_cache, v_cache, blocks, kv_len, (), scale))
    worst = 0.0
    for row, length in enumerate(kv_len.tolist()):
        own = blocks[row, : -(-length // k_cache.shape[1])].long()
        k, v = (cache[own].double() for cache in (k_cache, v_cache))
        index = torch.arange(len(own), dtype=torch.int32, device="cuda")[None]
        one = slice(row, row + 1)
        wanted = mha_reference(q[one].double(), k, v, index, kv_len[one], (length,), scale)
        worst = max(worst, relative_error(result[row], wanted[0]))
    return worst


RAGGED = (
    [1], [0, 64, 65, 0, 1000, 1], [0], [4096, 3, 77, 2048, 0], [130] * 33, [5000, 100, 9000, 0, 64, 128, 1, 2] * 16,
)  # fmt: skip
SHAPES = (Heads(), Heads(9, 3, 64, 16), Heads(4, 4, 80, 64), Heads(16, 1, 128, 256), Heads(32, 4, 80, 48), Heads(40, 8))


def ragged_trials() -> Iterator[Trial]:
    for lengths, heads in itertools.product(RAGGED, SHAPES):
        kernel = mha_decode.MhaDecode(heads.query, heads.kv)

        def error(f=kernel, ls=lengths, h=heads) -> float:
            return mha_error(f, paged(ls, h, poison=True))

        shape = f"{len(lengths)} rows to {max(lengths)}, {heads.query}/{heads.kv} × {heads.dim}, blocks {heads.block}"
        yield Trial("mha_decode", shape, "ragged", 0, list, error)


def attention_of_torch(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


def mha_trials(tune: bool) -> Iterator[Trial]:
    config = mha_decode.Config
    variants = {"triton": config(), "triton, no descriptors": config(tma=False, dependent=False)}
    if tune:
        for stages, programs in ((4, 1), (2, 3)):
            variants[f"{stages} stages, {programs}"] = config(stages=stages, programs=programs)
    for batch, context in ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 50000), (8, 50000)):
        num_bytes = batch * context * 2 * KV_HEADS * HEAD_DIM * 2
        copies, shape = num_copies(num_bytes, 32), f"{batch} × {context}"
        for name, variant in variants.items():

            def calls(v=variant, b=batch, c=context, n=copies) -> list[Callable[[], object]]:
                kernel = mha_decode.MhaDecode(HEADS, KV_HEADS, v)
                given = [paged([c] * b, Heads(), poison=False) for _ in range(n)]
                return [lambda a=each: kernel(*a, (), HEAD_DIM**-0.5) for each in given]

            def error(v=variant, b=batch, c=context) -> float:
                given = paged([c] * b, Heads(), poison=True)
                return mha_error(mha_decode.MhaDecode(HEADS, KV_HEADS, v), given)

            yield Trial("mha_decode", shape, name, num_bytes, calls, error)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            peer = attention_of_torch(backend)

            def peers(b=batch, c=context, n=copies, f=peer) -> list[Callable[[], object]]:
                q = [normal(b, 1, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(n)]
                kv = [[normal(b, c, KV_HEADS, HEAD_DIM).transpose(1, 2) for _ in range(2)] for _ in range(n)]
                return [lambda q=q[i], kv=kv[i]: f(q, *kv) for i in range(n)]

            def peer_error(c=context, f=peer) -> float:
                q, k, v = (normal(1, h, n, HEAD_DIM) for h, n in ((HEADS, 1), (KV_HEADS, c), (KV_HEADS, c)))
                wide = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
                return relative_error(f(q, k, v), wide)

            yield Trial("mha_decode", shape, f"torch {backend.name.split('_')[0]}", num_bytes, peers, peer_error)


# --- a layer --------------------------------------------------------------------------------------------------------


class Layer:
    """A decode step of one layer of Llama-8B's shape, every row at the end of `context` tokens."""

    def __init__(self, batch: int, context: int) -> None:
        heads = HEADS + 2 * KV_HEADS
        shapes = (heads * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER)
        self.weights = [normal(n, k, scale=k**-0.5) for n, k in shapes]
        self.gains = [1 + 0.1 * normal(HIDDEN) for _ in range(2)]
        _, *caches, self.blocks, self.kv_len = paged([context] * batch, Heads(), poison=False)
        self.caches = tuple(caches)
        self.positions = torch.full((batch,), context - 1, device="cuda")
        last = self.blocks[:, (context - 1) // BLOCK].long()
        self.slots = last * BLOCK + (context - 1) % BLOCK
        self.cos_sin = angles(context)
        self.attend = mha_decode.MhaDecode(HEADS, KV_HEADS)
        self.turn, self.product = rotation(), linear.Linear()

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.shape[0]
        y, residual = rms_norm(x, self.gains[0], 1e-6, residual)
        fused = self.product(y, self.weights[0]).view(rows, -1, HEAD_DIM)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        self.turn(q, k, self.positions, self.cos_sin)
        kv_store((k, v), self.caches, self.slots)
        out = self.attend(q, *self.caches, self.blocks, self.kv_len, (), HEAD_DIM**-0.5)
        y, residual = rms_norm(self.product(out.flatten(1), self.weights[1]), self.gains[1], 1e-6, residual)
        return self.product(silu_mul(self.product(y, self.weights[2])), self.weights[3]), residual

    def exact(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same from the references in float64, over the cache as it is."""
        rows, wide = x.shape[0], [each.double() for each in self.weights]
        y, residual = norm_reference(x.double(), self.gains[0].double(), 1e-6, residual.double())
        fused = (y @ wide[0].T).view(rows, -1, HEAD_DIM)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        target = Target(Platform("cpu", ""), torch.float64)
        rotary_reference.bind(target, {"interleaved": False})(q, k, self.positions, self.cos_sin.double())
        caches = [cache.double() for cache in self.caches]
        for cache, each in zip(caches, (k, v), strict=True):
            cache.flatten(0, 1).index_copy_(0, self.slots, each)
        lengths = tuple(self.kv_len.tolist())
        out = mha_reference(q, *caches, self.blocks, self.kv_len, lengths, HEAD_DIM**-0.5)
        y, residual = norm_reference(out.flatten(1) @ wide[1].T, self.gains[1].double(), 1e-6, residual)
        return silu_reference(y @ wide[2].T) @ wide[3].T


def layer_trials() -> Iterator[Trial]:
    weights = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * 2 + 3 * HIDDEN * INNER * 2
    for batch in (1, 4, 8, 16, 32, 128):

        def calls(b=batch) -> list[Callable[[], object]]:
            layers, x, residual = [Layer(b, 1024) for _ in range(4)], normal(b, HIDDEN), normal(b, HIDDEN)
            state = [x, residual]

            def one(layer: Layer) -> None:
                state[:] = layer(*state)

            return [lambda layer=each: one(layer) for each in (*layers, *layers)]

        def error(b=batch) -> float:
            layer, x, residual = Layer(b, 300), normal(b, HIDDEN), normal(b, HIDDEN)
            wanted = layer.exact(x, residual)
            if differ := changed(lambda: layer(x, residual)[0]):
                print(f"layer of {b} rows: {differ} of 3000 results differ")
                return float("inf")
            return relative_error(layer(x, residual)[0], wanted)

        num_bytes = weights + batch * 1024 * 2 * KV_HEADS * HEAD_DIM * 2
        yield Trial("layer", f"Llama-8B, {batch} × 1024", "triton", num_bytes, calls, error)


def trials(only: set[str], tune: bool) -> Iterator[Trial]:
    groups: dict[str, Callable[[], Iterator[Trial]]] = {
        "linear": lambda: linear_trials(tune),
        "rms_norm": norm_trials,
        "rotary": rotary_trials,
        "kv_store": store_trials,
        "silu_mul": silu_trials,
        "embedding": embedding_trials,
        "ragged": ragged_trials,
        "mha": lambda: mha_trials(tune),
        "layer": layer_trials,
    }
    if unknown := only - set(groups):
        raise SystemExit(f"bench_primitives: --only knows {', '.join(groups)}, not {', '.join(sorted(unknown))}")
    for name, made in groups.items():
        if not only or name in only:
            yield from made()


def check(trial: Trial) -> float:
    try:
        error = trial.error()
    except (RuntimeError, torch.AcceleratorError) as refused:  # a peer that does not take the shape, or no memory
        print(f"check {trial.op} {trial.shape} {trial.variant}: {str(refused).splitlines()[0]}")
        return float("inf")
    limit = 3 * TOLERANCE if trial.op == "layer" else TOLERANCE
    print(f"check {trial.op} {trial.shape} {trial.variant}: {error:.1e} {'ok' if error < limit else 'WRONG'}")
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="linear, rms_norm, rotary, kv_store, silu_mul, embedding, ragged, …")
    parser.add_argument("--tune", action="store_true", help="other configurations too")
    parser.add_argument("--checks-only", action="store_true", help="no measurement")
    parser.add_argument("--skip-checks", action="store_true", help="only measurements")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th of all, to compile in n processes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_primitives: there is no GPU here", file=sys.stderr)
        return 1
    torch.manual_seed(time.time_ns())
    index, count = map(int, options.shard.split("/"))
    rows: list[Row] = []
    for trial in itertools.islice(trials(set(filter(None, options.only.split(","))), options.tune), index, None, count):
        error = float("nan") if options.skip_checks else check(trial)
        if options.checks_only or trial.num_bytes == 0 or error == float("inf"):
            continue
        try:
            rows.append(Row(trial.op, trial.shape, trial.variant, measure(trial.calls()), trial.num_bytes, error))
        except RuntimeError as refused:  # a peer that does not take the shape
            print(f"{trial.op} {trial.shape} {trial.variant}: {str(refused).splitlines()[0]}")
    if rows:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; limit: {RATE / 1e9:.0f} GB/s")
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

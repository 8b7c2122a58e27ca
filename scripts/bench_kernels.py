"""Check, then measure, the MLA and MoE kernels on one GPU: `python scripts/bench_kernels.py [--only mla,route,moe]`.

The small ops, linear and GQA decode are in bench_primitives.py.

Every kernel is first compared with the reference in float64 on fresh random inputs (ragged lengths, permuted
blocks, NaN wherever nothing may be read, outputs poisoned), and replayed many times for identical results.
Then it is timed: one CUDA graph of many calls on different data, more of it than the L2 cache holds, and the
median over replays of the time a call. The table comes last. "limit" is bytes that must be read / 3,150 GB/s,
a read-only stream's rate on an H100 SXM; "peer" the best published kernel at that shape on such a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tokenspeed.kernels.hopper import mla_decode as hopper
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.mla_decode import mla_decode as mla_reference
from tokenspeed.kernels.reference.moe_experts import moe_experts as moe_reference
from tokenspeed.kernels.reference.moe_route import Route as RouteReference
from tokenspeed.kernels.registry import Target
from tokenspeed.kernels.triton import mla_decode as mla
from tokenspeed.kernels.triton import moe_experts as moe
from tokenspeed.kernels.triton import moe_route as route

RATE = 3150e9
L2_BYTES = 50e6
BF16 = torch.bfloat16
TOLERANCE = 6e-3
MlaKernel = Callable[..., Tensor]

PEERS = {
    (16, 1, 1024): ("FA3", 11.6),
    (16, 1, 8192): ("FA3", 18.5),
    (16, 8, 1024): ("FA3", 14.6),
    (16, 8, 8192): ("FA3", 41.6),
    (16, 1, 50000): ("FA3", 53.0),
    (16, 8, 50000): ("FA3", 174.0),
    (16, 32, 8192): ("FA3", 117.0),
    (128, 32, 8192): ("FA3", 142.0),
    (128, 8, 50000): ("FA3", 193.0),
}
"""(heads, batch, context) → µs, one query token, bf16, blocks of 64."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    shape: str
    variant: str
    times: tuple[float, ...]
    num_bytes: float
    error: float
    peer: str = ""

    def cells(self) -> tuple[str, ...]:
        median = statistics.median(self.times)
        limit = self.num_bytes / RATE * 1e6
        spread = f"{min(self.times):.2f}–{max(self.times):.2f}"
        rate = self.num_bytes / median / 1e3
        return (
            self.op, self.shape, self.variant, f"{median:.2f}", spread, f"{limit:.1f}", f"{rate:.0f}",
            f"{limit / median:.0%}", f"{self.error:.1e}", self.peer,
        )  # fmt: skip


def measure(calls: Sequence[Callable[[], object]], replays: int = 20) -> tuple[float, ...]:
    """µs a call, one number a replay of a graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return tuple(times)


def poisoned(call: Callable[[], Tensor]) -> Tensor:
    """The result when memory from torch.empty is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """‖result − reference‖ / ‖reference‖ of the worst token; infinite where anything is not finite."""
    result, reference = result.double().flatten(1), reference.double().flatten(1)
    if not bool(result.isfinite().all()):
        return float("inf")
    return float(((result - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)).max())


@dataclass(frozen=True)
class MlaInput:
    """Rows of given lengths over a pool whose blocks are permuted."""

    q: Tensor
    pool: Tensor
    table: Tensor
    kv_len: Tensor
    rank: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        latent, rope = self.q.tensor_split((self.rank,), dim=-1)
        return latent, rope, self.pool, self.table, self.kv_len, 192**-0.5


def mla_input(lengths: Sequence[int], queries: int, heads: int, block_size: int = 64, *, poison: bool) -> MlaInput:
    rows, width = len(lengths), max(1, -(-max(lengths) // block_size))
    num_blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(num_blocks) + 1, device="cuda").int()
    table = torch.full((rows, width), 2**30 if poison else 0, dtype=torch.int32, device="cuda")
    pool = torch.randn(sum(num_blocks) + 1, block_size, 576, device="cuda", dtype=BF16)
    start = 0
    for row, count in enumerate(num_blocks):
        table[row, :count] = order[start : start + count]
        start += count
        if poison and count and lengths[row] % block_size:
            pool[order[start - 1], lengths[row] % block_size :] = float("nan")
    q = torch.randn(rows, queries, heads, 576, device="cuda", dtype=BF16)
    return MlaInput(q, pool, table, torch.tensor(lengths, dtype=torch.int32, device="cuda"), 512)


def check_mla(kernel: MlaKernel, given: MlaInput) -> float:
    """Worst relative error of a row, against float64, row by row to bound the memory."""
    result = poisoned(lambda: kernel(*given.arguments))
    worst = 0.0
    for row in range(given.q.shape[0]):
        latent, rope, pool, table, kv_len, scale = given.arguments
        blocks = table[row : row + 1, : max(1, -(-int(kv_len[row]) // pool.shape[1]))]
        few = pool[blocks.long().flatten().clamp_max(pool.shape[0] - 1)]
        own = torch.arange(few.shape[0], dtype=torch.int32, device="cuda")[None]
        one = slice(row, row + 1)
        wanted = mla_reference(latent[one].double(), rope[one].double(), few.double(), own, kv_len[one], scale)
        worst = max(worst, relative_error(result[row], wanted[0]))
    return worst


RAGGED = ([1], [0, 64, 65, 0, 1000, 1], [4096, 3, 77, 2048, 0], [130] * 33, [5000, 100, 9000, 0, 64, 128, 1, 2] * 16)


def mla_checks(kernels: dict[str, MlaKernel]) -> None:
    first = next(iter(kernels.values()))
    for (name, kernel), lengths in itertools.product(kernels.items(), RAGGED):
        forms = ((1, 16, 64), (4, 16, 64), (3, 16, 128), (2, 128, 64), (1, 128, 128))
        for queries, heads, block_size in forms if kernel is first else forms[:2]:
            given = mla_input(lengths, queries, heads, block_size, poison=True)
            error = check_mla(kernel, given)
            verdict = "ok" if error < TOLERANCE else "WRONG"
            tag = f"{len(lengths)} rows to {max(lengths)} × {queries} × {heads}, blocks of {block_size}"
            print(f"check mla_decode {name}: {tag}: {error:.1e} {verdict}")
    for name, kernel in kernels.items():
        given = mla_input([5000, 1024, 0, 333], 1, 16, poison=False)
        print(f"replay mla_decode {name}: {changed(lambda k=kernel, g=given: k(*g.arguments))} of 3000 results differ")


def changed(call: Callable[[], Tensor], replays: int = 3000) -> int:
    """How many replays of one call give other bits than the first."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    first = result.clone()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(replays):
        graph.replay()
        differing += (result != first).any()
    return int(differing)


def mla_shapes() -> Iterator[tuple[str, list[int], int, int, str]]:
    for batch, context in itertools.product((1, 8, 32), (1024, 8192, 50000)):
        peer = PEERS.get((16, batch, context))
        if batch * context <= 400_000:
            yield f"{batch} × {context}", [context] * batch, 1, 16, f"{peer[0]} {peer[1]}" if peer else ""
    yield "128 × 1024", [1024] * 128, 1, 16, ""
    yield "1 × 1000", [1000], 1, 16, ""
    yield "1 × 50000, 4 queries", [50000], 4, 16, ""
    yield "4.6K 45K 1.7K 1.7K, 4 queries", [4641, 45118, 1730, 1696], 4, 16, "ThunderMLA 41"
    yield "45K + 7 × 1.7K", [45118, *[1730] * 7], 1, 16, ""
    for batch, context in ((1, 1024), (1, 50000), (32, 8192), (8, 50000)):
        peer = PEERS.get((128, batch, context))
        yield (
            f"{batch} × {context}, 128 heads", [context] * batch, 1, 128, f"{peer[0]} {peer[1]}" if peer else "",
        )  # fmt: skip


def mla_rows(kernels: dict[str, MlaKernel], only: str) -> Iterator[Row]:
    for shape, lengths, queries, heads, peer in mla_shapes():
        if only and only not in shape:
            continue
        num_bytes = sum(lengths) * 576 * 2
        copies = max(2, min(64, int(3 * L2_BYTES / num_bytes) + 1))
        inputs = [mla_input(lengths, queries, heads, poison=False) for _ in range(copies)]
        calls = max(4, min(64, int(4000 / (num_bytes / RATE * 1e6 + 5))))
        for name, kernel in kernels.items():
            given = [inputs[n % copies] for n in range(calls)]
            try:
                times = measure([lambda k=kernel, g=each: k(*g.arguments) for each in given])
            except OutOfResources as error:  # a variant that does not fit this chip
                print(f"mla_decode {shape} {name}: {error}")
                continue
            yield Row("mla_decode", shape, name, times, num_bytes, check_mla(kernel, inputs[0]), peer)
        del inputs


def mla_kernels() -> dict[str, MlaKernel]:
    return {
        "hopper": hopper.MlaDecode(512, 64),
        "triton": mla.MlaDecode(512, 64, mla.Config()),
        "triton, no descriptors": mla.MlaDecode(512, 64, mla.Config(tma=False, dependent=False)),
    }


V2L = {"num_experts": 64, "top_k": 6, "num_shared": 2, "num_groups": 1, "top_groups": 1}
V3 = {"num_experts": 256, "top_k": 8, "num_shared": 1, "num_groups": 8, "top_groups": 4}
K2 = {"num_experts": 384, "top_k": 8, "num_shared": 1, "num_groups": 1, "top_groups": 1}


def route_rows() -> Iterator[Row]:
    target = Target(Platform.of(torch.device("cuda")), BF16)
    for (name, shape), tokens in itertools.product({"V2L": V2L, "V3": V3, "K2": K2}.items(), (1, 8, 128)):
        scoring = "softmax" if name == "V2L" else "sigmoid"
        traits = {**shape, "scoring": scoring, "normalise": name != "V2L"}
        ours, wanted = route.bind(target, traits), RouteReference(traits)
        logits = [torch.randn(tokens, shape["num_experts"], device="cuda") for _ in range(64)]
        bias = None if name == "V2L" else torch.randn(shape["num_experts"], device="cuda") * 0.1
        count = torch.tensor([max(1, tokens - 2)], dtype=torch.int32, device="cuda")
        ids, weights = ours(logits[0], bias, 2.5, count)
        ids_wanted, weights_wanted = wanted(logits[0].double(), bias, 2.5, count)
        same = torch.equal(ids, ids_wanted)
        error = float((weights - weights_wanted).abs().max()) if same else float("inf")
        times = measure([lambda o=ours, x=each, b=bias, n=count: o(x, b, 2.5, n) for each in logits])
        yield Row("moe_route", f"{name}, {tokens} tokens", "triton", times, logits[0].nbytes, error)


@dataclass(frozen=True)
class Experts:
    """Weights of one layer of V2L's shape: 64 routed and 2 shared experts."""

    gate_up: Tensor
    down: Tensor


def experts_of_v2l() -> Experts:
    gate_up = torch.randn(66, 2 * 1408, 2048, device="cuda", dtype=BF16).mul_(2048**-0.5)
    return Experts(gate_up, torch.randn(66, 2048, 1408, device="cuda", dtype=BF16).mul_(1408**-0.5))


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    traits = {**V2L, "scoring": "softmax", "normalise": False}
    return RouteReference(traits)(torch.randn(tokens, 64, device="cuda"), None, 1.0)


def moe_configs(tokens: int) -> Iterator[tuple[str, moe.Config]]:
    base = moe.Config()
    if tokens <= 8:
        for up, down in ((4, 2), (4, 1), (8, 2), (4, 4)) if tokens == 1 else ((4, 2),):
            yield f"rows {up}/{down}", replace(base, rows_up_to=8, up_rows=up, down_rows=down)
    for stages in (3, 4) if tokens < 512 else (3,):
        yield f"grouped, {stages} stages", replace(base, rows_up_to=0, stages=stages)


def moe_rows(layers: list[Experts]) -> Iterator[Row]:
    for tokens in (1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 2048, 8192):
        calls = 16 if tokens <= 128 else 4
        xs = [torch.randn(tokens, 2048, device="cuda", dtype=BF16) for _ in range(calls)]
        routes = [routed(tokens) for _ in range(calls)]
        used = statistics.mean(len(ids.unique()) for ids, _ in routes)
        num_bytes = used * 3 * 1408 * 2048 * 2
        for name, config in moe_configs(tokens):
            kernel = moe.MoeExperts(2, config)
            layer, (ids, weights) = layers[0], routes[0]
            result = poisoned(lambda k=kernel, x=xs[0], e=layer, i=ids, w=weights: k(x, e.gate_up, e.down, i, w))
            error = relative_error(result, moe_reference(xs[0].float(), layer.gate_up, layer.down, ids, weights))
            times = measure(
                [
                    lambda k=kernel, x=x, e=layer, r=chosen: k(x, e.gate_up, e.down, *r)
                    for x, layer, chosen in zip(xs, itertools.cycle(layers), routes, strict=False)
                ],
                replays=10,
            )
            yield Row("moe_experts", f"V2L, {tokens} tokens, {used:.1f} experts", name, times, num_bytes, error)


def moe_checks(layer: Experts) -> None:
    traits = {**V2L, "scoring": "softmax", "normalise": False}
    for tokens, padding, rows_up_to in ((3, 1, 8), (5, 5, 8), (7, 2, 0), (130, 30, 0)):
        x = torch.randn(tokens, 2048, device="cuda", dtype=BF16)
        count = torch.tensor([tokens - padding], dtype=torch.int32, device="cuda")
        ids, weights = RouteReference(traits)(torch.randn(tokens, 64, device="cuda"), None, 1.0, count)
        kernel = moe.MoeExperts(2, moe.Config(rows_up_to=rows_up_to))
        result = poisoned(lambda k=kernel, x=x, i=ids, w=weights: k(x, layer.gate_up, layer.down, i, w))
        error = relative_error(result, moe_reference(x.float(), layer.gate_up, layer.down, ids, weights))
        verdict = "ok" if error < TOLERANCE and not result[tokens - padding :].any() else "WRONG"
        print(f"check moe_experts: {tokens} tokens, {padding} padding, rows to {rows_up_to}: {error:.1e} {verdict}")
        differ = changed(lambda k=kernel, x=x, i=ids, w=weights: k(x, layer.gate_up, layer.down, i, w))
        print(f"replay moe_experts: {differ} of 3000 results differ")


def table(rows: Sequence[Row]) -> str:
    head = ("op", "shape", "variant", "µs", "spread", "limit µs", "GB/s", "of limit", "error", "peer µs")
    cells = [head, *(row.cells() for row in rows)]
    widths = [max(len(each[column]) for each in cells) for column in range(len(head))]
    return "\n".join(" | ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True)) for each in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="mla,route,moe", help="what to run: mla, route, moe (default: all)")
    parser.add_argument("--shape", default="", help="only mla_decode shapes whose name contains this")
    parser.add_argument("--variants", default="", help="only mla_decode variants whose name contains this")
    parser.add_argument("--skip-checks", action="store_true", help="only the checks that go with each measurement")
    parser.add_argument("--checks-only", action="store_true", help="no measurement")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels: there is no GPU here", file=sys.stderr)
        return 1
    wanted = set(options.only.split(","))
    if unknown := wanted - {"mla", "route", "moe"}:
        parser.error(f"--only knows mla, route and moe, not {', '.join(sorted(unknown))}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(time.time_ns())
    rows: list[Row] = []
    if "mla" in wanted:
        kernels = {name: kernel for name, kernel in mla_kernels().items() if options.variants in name}
        if not options.skip_checks:
            mla_checks(kernels)
        if not options.checks_only:
            rows += mla_rows(kernels, options.shape)
    if "route" in wanted and not options.checks_only:
        rows += route_rows()
    if "moe" in wanted:
        layers = [experts_of_v2l() for _ in range(1 if options.checks_only else 4)]
        if not options.skip_checks:
            moe_checks(layers[0])
        if not options.checks_only:
            rows += moe_rows(layers)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

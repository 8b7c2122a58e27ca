"""What the control plane allocates: calls a step in the steady state, and bytes a cached block.

`measure` runs this module in a child process whose memory functions are counted by a small library, compiled on the
spot and preloaded. There Python takes every object from malloc, so that its objects are counted too. Without a C++
compiler only the bytes are measured, by the child's resident set.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import msgspec
import numpy as np

from tokenspeed.bench.contestants import BLOCK_SIZE, STEP_SECONDS, BenchError, Ours, Sizes

NUM_BLOCKS = 1_000_000
PROMPT_BLOCKS = 2_000
STEPS = 1_000
ROWS = (1, 64)

COUNTER = r"""
#include <atomic>
#include <cstddef>
#include <malloc.h>
#include <new>

extern "C" void* __libc_malloc(std::size_t);
extern "C" void* __libc_calloc(std::size_t, std::size_t);
extern "C" void* __libc_realloc(void*, std::size_t);
extern "C" void* __libc_memalign(std::size_t, std::size_t);
extern "C" void __libc_free(void*);

static std::atomic<long long> mallocs, news, live;

static void* counted(void* block) {
  mallocs.fetch_add(1, std::memory_order_relaxed);
  live.fetch_add(static_cast<long long>(malloc_usable_size(block)), std::memory_order_relaxed);
  return block;
}
static void forget(void* block) {
  live.fetch_sub(static_cast<long long>(malloc_usable_size(block)), std::memory_order_relaxed);
}

extern "C" {
long long counted_mallocs() { return mallocs; }
long long counted_news() { return news; }
long long counted_bytes() { return live; }

void* malloc(std::size_t size) { return counted(__libc_malloc(size)); }
void* calloc(std::size_t count, std::size_t size) { return counted(__libc_calloc(count, size)); }
void* memalign(std::size_t alignment, std::size_t size) { return counted(__libc_memalign(alignment, size)); }
void* aligned_alloc(std::size_t alignment, std::size_t size) { return counted(__libc_memalign(alignment, size)); }
int posix_memalign(void** block, std::size_t alignment, std::size_t size) {
  *block = counted(__libc_memalign(alignment, size));
  return *block ? 0 : 12;
}
void* realloc(void* block, std::size_t size) {
  forget(block);
  return counted(__libc_realloc(block, size));
}
void free(void* block) {
  forget(block);
  __libc_free(block);
}
}

void* operator new(std::size_t size) {
  news.fetch_add(1, std::memory_order_relaxed);
  if (void* block = malloc(size)) return block;
  throw std::bad_alloc();
}
"""


class Allocations(msgspec.Struct, frozen=True):
    """Calls a step: of C++ `operator new`, and of all ways to take memory, Python objects included."""

    news: float
    mallocs: float


class Report(msgspec.Struct, frozen=True):
    """`steps` is by decoding requests, empty where nothing could count; `source` says how bytes were found."""

    steps: dict[int, Allocations]
    num_blocks: int
    bytes_a_block: float
    source: str


def measure() -> Report:
    """Run the child and read its report; `BenchError` if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        library = _compile(Path(folder))
        if library is not None:
            environment |= {"LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"}
        child = subprocess.run(
            [sys.executable, "-m", "tokenspeed.bench.allocations"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise BenchError(f"the counting process failed: {child.stderr.strip() or child.returncode}")
    return msgspec.json.decode(child.stdout, type=Report)


def _compile(folder: Path) -> Path | None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    source, library = folder / "counter.cc", folder / "counter.so"
    source.write_text(COUNTER)
    built = subprocess.run(
        [compiler, "-O2", "-std=c++20", "-fPIC", "-shared", str(source), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        raise BenchError(f"{compiler} cannot build the allocation counter: {built.stderr.strip()}")
    return library


def _counters() -> tuple[Callable[[], int], Callable[[], int], Callable[[], int]] | None:
    """The preloaded library's counts: operator new, all, live bytes."""
    process = ctypes.CDLL(None)
    try:
        functions = process.counted_news, process.counted_mallocs, process.counted_bytes
    except AttributeError:
        return None
    for function in functions:
        function.restype = ctypes.c_longlong
    return functions


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steady_state(rows: int, news: Callable[[], int], mallocs: Callable[[], int]) -> Allocations:
    """Calls a step over a thousand steps of `rows` decoding requests, plan and commit only."""
    ours = Ours(Sizes(num_blocks=200 + rows * 24, max_rows=rows))
    for request_id in range(rows):
        ours.submit(request_id, np.full(100 + request_id % BLOCK_SIZE, request_id, np.int32), max_tokens=2 * STEPS)
    for _ in range(2 * rows + 8):
        ours.step()
    core, buffers, tokens, counts = ours.core, ours.buffers[0], ours.tokens, ours.counts
    now = 1e6
    before = news(), mallocs()
    for _ in repeat(None, STEPS):
        plan = core.plan(now, buffers)
        if plan is None:
            raise BenchError("there was nothing to plan")
        core.commit(plan.step, tokens, counts, STEP_SECONDS)
    after = news(), mallocs()
    if core.stats().running != rows:
        raise BenchError(f"{core.stats().running} of {rows} requests ran to the end of the count")
    return Allocations((after[0] - before[0]) / STEPS, (after[1] - before[1]) / STEPS)


def filled_pool() -> Ours:
    """A pool whose blocks are all cached and hold nothing else: every request has ended."""
    prompt_tokens = PROMPT_BLOCKS * BLOCK_SIZE + 1
    ours = Ours(Sizes(NUM_BLOCKS + 1, max_rows=1, max_tokens=prompt_tokens, max_len=prompt_tokens + BLOCK_SIZE))
    prompt = np.arange(prompt_tokens, dtype=np.int32)
    for request_id in range(NUM_BLOCKS // PROMPT_BLOCKS):
        prompt[0] = request_id  # a chain of hashes differs from its first token on
        ours.submit(request_id, prompt, max_tokens=1)
        ours.step()
    stats = ours.core.stats()
    if (stats.blocks_cached, stats.running) != (NUM_BLOCKS, 0):
        raise BenchError(f"{stats.blocks_cached} blocks are cached and {stats.running} requests run")
    return ours


def main() -> None:
    """The child: print one report as JSON."""
    counters = _counters()
    if counters is None:
        before, count, source = _resident_bytes(), _resident_bytes, "resident set"
    else:
        before, count, source = counters[2](), counters[2], "allocated"
    pool = filled_pool()
    bytes_a_block = (count() - before) / pool.core.stats().blocks_cached
    steps = {} if counters is None else {rows: steady_state(rows, counters[0], counters[1]) for rows in ROWS}
    print(msgspec.json.encode(Report(steps, NUM_BLOCKS, bytes_a_block, source)).decode())


if __name__ == "__main__":
    main()

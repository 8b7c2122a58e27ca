"""The pool of threads of the CPU kernels, in processes of its own: helpers, forks, and the CPUs that they stay on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tokenspeed.config import MAX_THREADS
from tokenspeed.kernels.cpu import _ops


def test_helpers_start_once_and_a_forked_child_has_its_own() -> None:
    # In a process of its own: a fork of this one would copy what pytest holds.
    script = """
import os, torch
from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.numerics.attention_cases import Paged
from tokenspeed.kernels.platform import Platform
torch.set_num_threads(3)
linear = ops.linear(ops.Target(Platform.of(torch.device("cpu")), torch.float32))
x, weight = torch.randn(4, 576), torch.randn(3072, 576)
assert _ops.num_helpers() == 0
y = [linear(x, weight) for _ in range(50)]
assert _ops.num_helpers() == 2, _ops.num_helpers()
child = os.fork()
if child == 0:
    right = _ops.num_helpers() == 0 and torch.equal(linear(x, weight), y[0]) and _ops.num_helpers() == 2
    os._exit(0 if right else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(linear(x, weight), y[-1])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_more_threads_than_the_one_core_that_is_allowed_end_with_the_same_bits() -> None:
    # In a process of its own, whose affinity is its own. A helper that has no core may not be waited for by spinning.
    script = """
import os, torch
from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.platform import Platform
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
linear = ops.linear(ops.Target(Platform.of(torch.device("cpu")), torch.float32))
x, weight = torch.randn(4, 576), torch.randn(3072, 576)
torch.set_num_threads(1)
wanted = linear(x, weight)
for threads in (5, 1000):
    torch.set_num_threads(threads)
    assert all(torch.equal(linear(x, weight), wanted) for _ in range(20))
    assert _ops.num_helpers() < _ops.MAX_THREADS
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU is allowed here")
@pytest.mark.parametrize("threads", ["as many as CPUs", "more"])
def test_helpers_have_a_cpu_of_their_own_where_there_is_one_for_each_thread(threads: str) -> None:
    script = f"""
import os, torch
from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.platform import Platform
allowed = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, allowed)
torch.set_num_threads({2 if threads == "as many as CPUs" else 3})
linear = ops.linear(ops.Target(Platform.of(torch.device("cpu")), torch.float32))
x, weight = torch.randn(4, 576), torch.randn(3072, 576)
before = set(os.listdir("/proc/self/task"))
for _ in range(20):
    linear(x, weight)
helpers = set(os.listdir("/proc/self/task")) - before
places = sorted(sorted(os.sched_getaffinity(int(each))) for each in helpers)
assert len(places) == _ops.num_helpers() > 0
assert places == {"[allowed[1:]]" if threads == "as many as CPUs" else "[allowed, allowed]"}, places
assert sorted(os.sched_getaffinity(0)) == allowed
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_flag_for_threads_allows_as_many_as_the_pool_has() -> None:
    assert MAX_THREADS == _ops.MAX_THREADS

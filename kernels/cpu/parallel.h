// Threads for the kernels: one pool a process. A helper spins for SPIN_US after a run, then sleeps, so a step
// finds it awake and an idle engine costs nothing. Whoever runs takes the next task, and a run waits only for
// tasks that were begun: a helper that lost its core to another process costs one task, never a barrier.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {

// One task of a parallel run. `worker` is in [0, threads): it names scratch memory that is the task's alone.
using Task = void (*)(const void* context, int64_t task, int worker);

constexpr int MAX_THREADS = 256;

// Runs tasks 0 to count-1, each once, on at most `threads` threads, the caller among them; returns when all are
// done. A task must not throw. Serial while another thread is inside: results never depend on it. Helpers
// start with the first run that wants them and live as long as the process; a forked child starts its own. A helper
// that starts for as many threads as the caller may use CPUs stays on one of its own; others share the caller's.
void run_tasks(int64_t count, int threads, Task task, const void* context);

template <class Body>
void parallel(int64_t count, int threads, const Body& body) {
    run_tasks(
        count, threads,
        [](const void* context, int64_t task, int worker) { (*static_cast<const Body*>(context))(task, worker); },
        &body);
}

// Runs body(begin, end) over [0, count) in as many pieces as threads, in one when there are fewer than
// `grain` elements of work in all (`cost` elements each): waking a thread costs microseconds.
template <class Body>
void parallel_ranges(int64_t count, int64_t cost, int threads, const Body& body) {
    constexpr int64_t grain = 1 << 15;
    const int64_t pieces = count * cost < grain || threads < 1 ? 1 : (count < threads ? count : threads);
    parallel(pieces, threads,
             [&](int64_t piece, int) { body(count * piece / pieces, count * (piece + 1) / pieces); });
}

// Who holds scratch memory: a kernel, or a block while its kernels run.
enum class Scratch { kernel, block };

// Grow-only memory of the calling thread, 64-byte aligned; valid until its next call for the same holder. Throws
// std::bad_alloc.
float* scratch(size_t floats, Scratch holder = Scratch::kernel);

// Helpers that this process has started so far.
int num_helpers();

}  // namespace tokenspeed::cpu

// Threads for the kernels: torch's own OpenMP team, so that two pools never fight for the same cores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {

// One task of a parallel run. `worker` is in [0, threads): it names scratch memory that is the task's alone.
using Task = void (*)(const void* context, int64_t task, int worker);

// Runs tasks 0 to count-1, each once, on at most `threads` threads; returns when all are done.
// Tasks are handed out one by one, so a busy core takes fewer. Serial where no OpenMP is loaded.
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

// Grow-only memory of the calling thread, 64-byte aligned; valid until its next call. Throws std::bad_alloc.
float* scratch(size_t floats);

// Whether an OpenMP runtime was found in this process.
bool has_threads();

}  // namespace tokenspeed::cpu

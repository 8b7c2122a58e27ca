#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <new>

namespace tokenspeed::cpu {
namespace {

// The entry point that GCC's `#pragma omp parallel` compiles to; LLVM's and Intel's runtimes have it too.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Looked up instead of linked: linking would load a second OpenMP runtime beside the one torch brings.
Parallel find_parallel() {
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Run {
    Task task;
    const void* context;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int> joined{0};
};

void work(void* data) {
    Run& run = *static_cast<Run*>(data);
    const int worker = run.joined.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
        const int64_t task = run.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= run.count) return;
        run.task(run.context, task, worker);
    }
}

struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

}  // namespace

void run_tasks(int64_t count, int threads, Task task, const void* context) {
    const Parallel start = threads > 1 && count > 1 ? find_parallel() : nullptr;
    if (start == nullptr) {
        for (int64_t i = 0; i < count; ++i) task(context, i, 0);
        return;
    }
    Run run{task, context, count};
    start(work, &run, static_cast<unsigned>(count < threads ? count : threads), 0);
}

float* scratch(size_t floats) {
    thread_local std::unique_ptr<float[], Free> memory;
    thread_local size_t size = 0;
    if (floats > size) {
        memory.reset();
        size = 0;
        memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{64})));
        size = floats;
    }
    return memory.get();
}

bool has_threads() { return find_parallel() != nullptr; }

}  // namespace tokenspeed::cpu

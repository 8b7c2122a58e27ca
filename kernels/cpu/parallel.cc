#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace tokenspeed::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto SPIN = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Until `done()`, at most for SPIN. The clock is read rarely: it costs as much as 20 rounds.
template <class Done>
bool spin(const Done& done) {
    const auto end = Clock::now() + SPIN;
    for (;;) {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
        if (Clock::now() > end) return false;
    }
}

// The CPUs that the calling thread may use, where they are exactly so many: then no two threads of the pool want the
// same one, and none stands empty that another could have had. Otherwise none, and the system places them.
std::vector<int> cpus_of(int threads) {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != threads) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
    }
#endif
    return cpus;
}

// Where a thread may not be, it runs where it does.
void place([[maybe_unused]] std::thread& thread, [[maybe_unused]] int cpu) {
#if defined(__linux__)
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);
#endif
}

// The tasks of a run are taken from `open_`: the run's number above, how many are left below. A task is taken
// by exchanging exactly the value that was seen, so a helper that slept through the end of its run takes
// nothing of a later one, whatever it has read of it meanwhile.
class Pool {
public:
    // False if another thread has the pool.
    bool run(uint32_t count, int threads, Task task, const void* context) {
        if (taken_.exchange(true, std::memory_order_acquire)) return false;
        const int most = threads;
        if (count < static_cast<uint32_t>(threads)) threads = static_cast<int>(count);
        start_helpers(threads - 1, most);
        const uint64_t number = (open_.load(std::memory_order_relaxed) >> 32) + 1;
        task_.store(task, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        threads_.store(threads, std::memory_order_relaxed);
        left_.store(count, std::memory_order_relaxed);
        open_.store(number << 32 | count, std::memory_order_release);
        const int awake = helpers() < threads - 1 ? helpers() : threads - 1;
        for (int helper = 1; helper <= awake; ++helper) {
            calls_[helper].number.store(static_cast<uint32_t>(number), std::memory_order_seq_cst);
            calls_[helper].number.notify_one();  // no system call for one that is awake
        }
        work(0);
        if (!spin([&] { return left_.load(std::memory_order_acquire) == 0; })) {
            // Whoever has the last tasks may have lost its core: leave it this one.
            for (uint32_t left; (left = left_.load(std::memory_order_acquire)) != 0;) left_.wait(left);
        }
        taken_.store(false, std::memory_order_release);
        return true;
    }

    int helpers() const { return helpers_.load(std::memory_order_relaxed); }

private:
    // The first CPU is the caller's, which stays free to move: whatever it starts would inherit its place.
    void start_helpers(int wanted, int threads) {
        int helpers = helpers_.load(std::memory_order_relaxed);
        if (helpers >= wanted) return;
        // Signals are for the threads that the interpreter knows.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            const std::vector<int> cpus = cpus_of(threads);
            for (; helpers < wanted; ++helpers) {
                std::thread helper([this, worker = helpers + 1] { help(worker); });
                if (!cpus.empty()) place(helper, cpus[helpers + 1]);
                helper.detach();
            }
        } catch (const std::exception&) {
            // The system allows no more threads, or has no memory for one: those there are do the work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        helpers_.store(helpers, std::memory_order_relaxed);
    }

    [[noreturn]] void help(int worker) {
        std::atomic<uint32_t>& number = calls_[worker].number;
        for (uint32_t seen = 0;;) {
            if (!spin([&] { return number.load(std::memory_order_acquire) != seen; })) {
                number.wait(seen, std::memory_order_seq_cst);
            }
            seen = number.load(std::memory_order_acquire);
            work(worker);
        }
    }

    void work(int worker) {
        uint64_t open = open_.load(std::memory_order_acquire);
        while (const uint32_t tasks = static_cast<uint32_t>(open)) {
            const Task task = task_.load(std::memory_order_relaxed);
            const void* context = context_.load(std::memory_order_relaxed);
            if (worker >= threads_.load(std::memory_order_relaxed)) return;
            if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
                continue;
            }
            task(context, tasks - 1, worker);
            if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_all();
            open = open_.load(std::memory_order_acquire);
        }
    }

    alignas(64) std::atomic<uint64_t> open_{0};
    alignas(64) std::atomic<Task> task_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int> threads_{0};
    alignas(64) std::atomic<uint32_t> left_{0};
    struct alignas(64) Call {
        std::atomic<uint32_t> number{0};  // of the last run that a helper was called to
    };
    Call calls_[MAX_THREADS];
    alignas(64) std::atomic<bool> taken_{false};
    std::atomic<int> helpers_{0};
};

// Never destroyed: helpers use it until the process is gone.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    static const bool started = [] {
        current = new Pool;
        // A child has no helpers, and a parent's run may have been under way.
        pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
        return true;
    }();
    (void)started;
    return *current.load(std::memory_order_acquire);
}

struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

}  // namespace

void run_tasks(int64_t count, int threads, Task task, const void* context) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    const bool shared = threads > 1 && count > 1 && count <= UINT32_MAX;
    if (shared && pool().run(static_cast<uint32_t>(count), threads, task, context)) return;
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
}

float* scratch(size_t floats, Scratch holder) {
    struct Held {
        std::unique_ptr<float[], Free> memory;
        size_t size = 0;
    };
    thread_local Held held[2];
    Held& of = held[static_cast<int>(holder)];
    if (floats > of.size) {
        of.memory.reset();
        of.size = 0;
        of.memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{64})));
        of.size = floats;
    }
    return of.memory.get();
}

int num_helpers() { return pool().helpers(); }

}  // namespace tokenspeed::cpu

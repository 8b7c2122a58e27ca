#include <algorithm>
#include <functional>

#include "kernels.h"
#include "parallel.h"
#include "sampling_cut.h"

namespace tokenspeed::cpu {
namespace {

uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

}  // namespace

void select_descending(float* values, int64_t count, int64_t n) {
    std::nth_element(values, values + n, values + count, std::greater<>());
}

void sort_descending(float* values, int64_t count) { std::sort(values, values + count, std::greater<>()); }

double uniform(int64_t seed, int64_t position) {
    const uint64_t steps = static_cast<uint64_t>(position) + 1;
    const uint64_t state = mix(static_cast<uint64_t>(seed)) + steps * 0x9E3779B97F4A7C15u;
    return static_cast<double>(mix(state) >> 11) * 0x1p-53;
}

int64_t sample(const Kernels& kernels, const Sampling& s, int64_t rows, int threads) {
    for (int64_t row = 0; row < rows; ++row) {
        if (s.slots[row] >= s.num_slots) return row;
    }
    if (threads < 1) threads = 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    const int workers = rows < threads ? static_cast<int>(rows) : threads;
    const int64_t each = (kernels.sample_scratch(s.vocab) + 15) / 16 * 16;
    float* memory = scratch(static_cast<size_t>(each * workers));
    parallel(rows, workers, [&](int64_t row, int worker) {
        const int64_t slot = s.slots[row];
        if (slot < 0) {
            s.tokens[row] = NO_TOKEN;  // padding
            return;
        }
        const int32_t token = kernels.sample_row(s, row, memory + worker * each);
        s.tokens[row] = token;
        s.last_token[slot] = token == NO_TOKEN ? 0 : token;
        if (token != NO_TOKEN && (s.features[slot] & SAMPLE_HISTORY) != 0) ++s.seen[slot * s.vocab + token];
    });
    return OK;
}

}  // namespace tokenspeed::cpu

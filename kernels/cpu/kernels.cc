// What is the same on every instruction set: the choice of a table, checks, and the cutting into tasks.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace tokenspeed::cpu {

namespace portable {
const Kernels* table(Type);
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels* table(Type);
}
namespace avx512 {
const Kernels* table(Type);
}
namespace avx512_bf16 {
const Kernels* table(Type);
}
namespace amx {
const Kernels* table(Type);
}
#endif

#if defined(__x86_64__)
namespace {
// Whether the processor has bfloat16 tiles and the system lets this process use them: it must be asked, once.
bool tiles_allowed() {
#if defined(__linux__)
    static const bool allowed = [] {
        constexpr unsigned BFLOAT16 = 1u << 22, TILE = 1u << 24;
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;
        unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
        const bool known = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
        return known && (edx & BFLOAT16) != 0 && (edx & TILE) != 0 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return allowed;
#else
    return false;
#endif
}
}  // namespace
#endif

bool supports(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return true;
#if defined(__x86_64__)
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                   __builtin_cpu_supports("bmi2");
        case Isa::avx512:
            return supports(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx512_bf16:
            return supports(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
        case Isa::amx:
            return supports(Isa::avx512_bf16) && tiles_allowed();
#endif
        default:
            return false;
    }
}

bool full_rate_pairs() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned GENU = 0x756e6547;  // "Genu" of "GenuineIntel"
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return supports(Isa::avx512_bf16) && __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx != GENU;
#else
    return supports(Isa::avx512_bf16);
#endif
}

const Kernels* kernels(Isa isa, Type type) {
    if (!supports(isa)) return nullptr;
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx2:
            return avx2::table(type);
        case Isa::avx512:
            return avx512::table(type);
        case Isa::avx512_bf16:
            return avx512_bf16::table(type);
        case Isa::amx:
            return amx::table(type);
#endif
        default:
            return portable::table(type);
    }
}

namespace {

// The first of the tokens whose position (or slot) is not below `limit`.
int64_t check_positions(const int64_t* positions, int64_t tokens, int64_t limit) {
    for (int64_t t = 0; t < tokens; ++t) {
        if (positions[t] < 0 || positions[t] >= limit) return t;
    }
    return OK;
}

int64_t round_up(int64_t floats) { return (floats + 15) / 16 * 16; }

constexpr int64_t TASKS_OF_THREAD = 4;  // at least: one that lost its core for a while costs the others a quarter

}  // namespace

// The first row whose length or blocks are out of range: a wrong table must not become a wild read.
int64_t check_rows(const Attention& a) {
    for (int row = 0; row < a.rows; ++row) {
        const int64_t length = a.kv_len[row];
        const int64_t blocks = (length + a.block_size - 1) / a.block_size;
        if (length < 0 || blocks > a.table_width) return row;
        const int32_t* table = a.block_table + row * a.table_stride;
        for (int64_t i = 0; i < blocks; ++i) {
            if (table[i] < 0 || table[i] >= a.num_blocks) return row;
        }
    }
    return OK;
}

int64_t mha_decode(const Kernels& kernels, const Attention& a, int threads) {
    if (const int64_t bad = check_rows(a); bad != OK) return bad;
    if (a.rows == 0) return OK;
    std::vector<Split> splits;
    std::vector<int64_t> first(a.rows + 1);
    for (int32_t row = 0; row < a.rows; ++row) {
        first[row] = static_cast<int64_t>(splits.size());
        for (int32_t begin = 0; begin < a.kv_len[row]; begin += SPLIT_TOKENS) {
            const int32_t end = std::min(begin + SPLIT_TOKENS, a.kv_len[row]);
            splits.push_back({row, begin, end, end, 0, a.num_kv_heads});
        }
    }
    const int64_t num_splits = static_cast<int64_t>(splits.size());
    first[a.rows] = num_splits;
    const int64_t each = round_up(kernels.decode_scratch(a));
    float* memory = scratch(each * threads + num_splits * partial_size(a));
    float* partials = memory + each * threads;
    // Few and short rows: every head by itself, so that no thread is without work. No sum runs over heads.
    const int64_t cuts = num_splits < 2 * threads ? a.num_kv_heads : 1;
    // Many splits: some of them together, of which all but the first find their first tokens fetched.
    const int64_t together = std::max<int64_t>(1, num_splits / (TASKS_OF_THREAD * threads));
    parallel((num_splits + together - 1) / together * cuts, threads, [&](int64_t task, int worker) {
        const int64_t begin = task / cuts * together, end = std::min(begin + together, num_splits);
        for (int64_t i = begin; i < end; ++i) {
            Split part = splits[i];
            if (i + 1 < end && splits[i + 1].row == part.row) part.ahead = splits[i + 1].end;
            if (cuts > 1) part.kv_begin = static_cast<int32_t>(task % cuts), part.kv_end = part.kv_begin + 1;
            kernels.decode_split(a, part, partials + i * partial_size(a), memory + worker * each);
        }
    });
    parallel_ranges(a.rows, num_splits / a.rows * partial_size(a), threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            if (first[row] == first[row + 1]) {
                const int64_t bytes = int64_t{a.num_heads} * a.head_dim * kernels.item_size;
                std::memset(static_cast<char*>(a.out) + row * bytes, 0, static_cast<size_t>(bytes));
                continue;
            }
            kernels.decode_combine(a, static_cast<int>(row), partials + first[row] * partial_size(a),
                                   static_cast<int>(first[row + 1] - first[row]));
        }
    });
    return OK;
}

int64_t mha_prefill(const Kernels& kernels, const Attention& a, const int32_t* query_start, int threads) {
    if (const int64_t bad = check_rows(a); bad != OK) return bad;
    std::vector<QueryTile> tiles;
    // Large tiles read the KV less often; smaller ones, where there is little to do, keep four for each thread.
    const int64_t wanted = int64_t{query_start[a.rows] - query_start[0]} * a.num_heads / (4 * threads);
    const int64_t tile_rows = std::clamp<int64_t>(wanted, TILE_ROWS, kernels.prefill_rows);
    const int32_t most = std::max<int32_t>(1, static_cast<int32_t>(tile_rows / a.group()));
    for (int32_t row = 0; row < a.rows; ++row) {
        const int32_t begin = query_start[row] - query_start[0], end = query_start[row + 1] - query_start[0];
        if (end <= begin || end - begin > a.kv_len[row]) return row;
        const int32_t cuts = (end - begin + most - 1) / most, tile_tokens = (end - begin + cuts - 1) / cuts;
        for (int32_t t = begin; t < end; t += tile_tokens) {
            const int32_t last = t + tile_tokens < end ? t + tile_tokens : end;
            for (int32_t head = 0; head < a.num_kv_heads; ++head) {
                tiles.push_back({row, head, t, last, a.kv_len[row] - (end - begin) + (t - begin) + 1});
            }
        }
    }
    const int64_t num_tiles = static_cast<int64_t>(tiles.size());
    const int64_t each = round_up(kernels.prefill_scratch(a));
    float* memory = scratch(each * threads);
    // From the back: the last tiles of a row see the most tokens, and the small ones fill the gaps at the end.
    parallel(num_tiles, threads, [&](int64_t i, int worker) {
        kernels.prefill_tile(a, tiles[num_tiles - 1 - i], memory + worker * each);
    });
    return OK;
}

int64_t rotary(const Kernels& kernels, void* q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, void* k,
               int64_t k_stride, int64_t k_head_stride, int64_t k_heads, int64_t head_dim, bool interleaved,
               const int64_t* positions, const float* cos_sin, int64_t num_positions, int64_t tokens, int threads) {
    if (const int64_t bad = check_positions(positions, tokens, num_positions); bad != OK) return bad;
    parallel_ranges(tokens, (q_heads + k_heads) * head_dim, threads, [&](int64_t begin, int64_t end) {
        kernels.rotary(q, q_stride, q_head_stride, q_heads, head_dim, interleaved, positions, cos_sin, begin, end);
        kernels.rotary(k, k_stride, k_head_stride, k_heads, head_dim, interleaved, positions, cos_sin, begin, end);
    });
    return OK;
}

int64_t kv_store(const void* source, int64_t source_stride, void* cache, const int64_t* slots, int64_t tokens,
                 int64_t bytes, int64_t num_slots, int threads) {
    for (int64_t t = 0; t < tokens; ++t) {
        if (slots[t] < NOT_STORED || slots[t] >= num_slots) return t;
    }
    parallel_ranges(tokens, bytes / 2, threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            if (slots[t] == NOT_STORED) continue;
            std::memcpy(static_cast<char*>(cache) + slots[t] * bytes,
                        static_cast<const char*>(source) + t * source_stride, static_cast<size_t>(bytes));
        }
    });
    return OK;
}

void rms_norm(const Kernels& kernels, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
              const void* weight, void* y, void* residual_out, int64_t tokens, int64_t hidden, float eps, int threads) {
    parallel_ranges(tokens, hidden, threads, [&](int64_t begin, int64_t end) {
        kernels.rms_norm(x, x_stride, residual, residual_stride, weight, y, residual_out, hidden, eps, begin, end);
    });
}

void silu_mul(const Kernels& kernels, const void* gate_up, int64_t stride, void* out, int64_t tokens, int64_t size,
              int threads) {
    // An exponential costs about as much as moving eight elements.
    parallel_ranges(tokens, 8 * size, threads, [&](int64_t begin, int64_t end) {
        kernels.silu_mul(gate_up, stride, out, size, begin, end);
    });
}

namespace {

// Cuts a product into tasks of `block` tokens × weight rows: about `size` multiplications each, as many for every
// thread. Consecutive tasks use the same weights. body(first token, last, first row, last, worker).
template <class Body>
void product_tasks(const Linear& a, int64_t block, int64_t row_step, int64_t size, int threads, const Body& body) {
    const int64_t blocks = (a.tokens + block - 1) / block;
    const int64_t wanted = (a.rows * a.columns * block / size + threads) / threads * threads;
    const int64_t rows = (a.rows + wanted * row_step - 1) / (wanted * row_step) * row_step;
    parallel((a.rows + rows - 1) / rows * blocks, threads, [&](int64_t task, int worker) {
        const int64_t begin = task % blocks * block, first = task / blocks * rows;
        body(begin, begin + block < a.tokens ? begin + block : a.tokens, first,
             first + rows < a.rows ? first + rows : a.rows, worker);
    });
}

// Tokens of a block: as even as they can be, not more than LINEAR_BLOCK.
int64_t block_tokens(int64_t tokens) {
    const int64_t blocks = (tokens + LINEAR_BLOCK - 1) / LINEAR_BLOCK;
    return (tokens + 6 * blocks - 1) / (6 * blocks) * 6;
}

void linear_few(const Kernels& kernels, const Linear& a, int threads) {
    const int64_t packed_size = round_up(a.tokens * a.packed_stride()), each = round_up(LINEAR_ROWS * a.tokens);
    float* packed = scratch(packed_size + each * threads);
    kernels.linear_few_pack(a, 0, a.tokens, packed);
    // 25 µs: 256 KiB of bfloat16 weights at one core's share of the memory, or the products of many tokens. Half of
    // it costs 3% of the rate in cold starts.
    const int64_t size = (int64_t{1} << 17) * (a.tokens < 8 ? a.tokens : 8);
    product_tasks(a, a.tokens, LINEAR_ROWS, size, threads,
                  [&](int64_t begin, int64_t end, int64_t first, int64_t last, int worker) {
                      float* totals = packed + packed_size + worker * each;
                      kernels.linear_few_rows(a, packed, begin, end, first, last, totals);
                  });
}

void linear_many(const Kernels& kernels, const Linear& a, int threads) {
    const int64_t block = block_tokens(a.tokens);
    const int64_t widened_size = round_up(a.tokens * a.packed_stride());
    const int64_t each = round_up(kernels.linear_many_scratch(block));
    float* widened = scratch(widened_size + each * threads);
    parallel_ranges(a.tokens, a.columns, threads,
                    [&](int64_t begin, int64_t end) { kernels.linear_many_widen(a, begin, end, widened); });
    // 30 µs, as a rule one strip.
    product_tasks(a, block, kernels.linear_strip, 1 << 20, threads,
                  [&](int64_t begin, int64_t end, int64_t first, int64_t last, int worker) {
                      float* memory = widened + widened_size + worker * each;
                      kernels.linear_many_rows(a, widened, begin, end, first, last, memory);
                  });
}

void panels_few(const Kernels& kernels, const Linear& a, int threads) {
    float* widened = scratch(round_up(a.tokens * a.packed_stride()));
    kernels.panels_widen(a, 0, a.tokens, widened);
    Linear panels = a;  // its rows are panels of as many weights as PANEL_ROWS rows
    panels.rows = a.panels(), panels.columns = a.columns * PANEL_ROWS;
    product_tasks(panels, a.tokens, 2, int64_t{1} << 17, threads,
                  [&](int64_t, int64_t, int64_t first, int64_t last, int) {
                      kernels.forms[static_cast<int>(a.form)].few(a, widened, first, last);
                  });
}

void panels_many(const Kernels& kernels, const Linear& a, int threads) {
    const int64_t block = block_tokens(a.tokens), strip = kernels.linear_strip / PANEL_ROWS;
    const int64_t widened_size = round_up(a.tokens * a.packed_stride());
    const int64_t each = round_up(kernels.linear_many_scratch(block));
    float* widened = scratch(widened_size + each * threads);
    parallel_ranges(a.tokens, a.columns, threads,
                    [&](int64_t begin, int64_t end) { kernels.panels_widen(a, begin, end, widened); });
    Linear panels = a;
    panels.rows = a.panels(), panels.columns = a.columns * PANEL_ROWS;
    product_tasks(panels, block, strip, 1 << 20, threads,
                  [&](int64_t begin, int64_t end, int64_t first, int64_t last, int worker) {
                      float* memory = widened + widened_size + worker * each;
                      kernels.forms[static_cast<int>(a.form)].many(a, widened, begin, end, first, last, memory);
                  });
}

// Tokens of a block: they stay in half of a cache of 2 MiB, and are as even as whole pairs of tiles can be.
int64_t pair_block(const Linear& a) {
    constexpr int64_t CACHED = int64_t{1} << 20, STEP = 2 * PAIR_ROWS;
    const int64_t fit = CACHED / (a.packed_stride() * 2 + 1) / STEP * STEP;
    const int64_t most = fit < STEP ? STEP : fit < PAIR_BLOCK ? fit : PAIR_BLOCK;
    const int64_t blocks = (a.tokens + most - 1) / most;
    return a.tokens <= STEP ? a.tokens : (a.tokens + STEP * blocks - 1) / (STEP * blocks) * STEP;
}

void panels_pairs(const Kernels& kernels, const Linear& a, int threads) {
    const FormKernels& form = kernels.forms[static_cast<int>(a.form)];
    const int64_t block = pair_block(a), blocks = (a.tokens + block - 1) / block;
    const int64_t packed_each = round_up(pair_floats(block, a.groups())), each = round_up(pair_scratch(block));
    float* packed = scratch(packed_each * blocks + each * threads);
    const auto end_of = [&](int64_t begin) { return begin + block < a.tokens ? begin + block : a.tokens; };
    parallel(blocks, a.tokens * a.columns < 1 << 15 ? 1 : threads, [&](int64_t i, int) {
        form.pairs_pack(a, i * block, end_of(i * block), packed + i * packed_each);
    });
    Linear panels = a;
    panels.rows = a.panels(), panels.columns = a.columns * PANEL_ROWS;
    // 12 µs for few tokens: 256 KiB of bfloat16 weights.
    product_tasks(panels, block, PAIR_PANELS, block << 17, threads,
                  [&](int64_t begin, int64_t end, int64_t first, int64_t last, int worker) {
                      float* memory = packed + packed_each * blocks + worker * each;
                      form.pairs(a, packed + begin / block * packed_each, begin, end, first, last, memory);
                  });
}

}  // namespace

void linear(const Kernels& kernels, const Linear& a, int threads) {
    if (a.tokens == 0 || a.rows == 0) return;
    // Less than 5 µs of work is done before a helper is awake.
    const bool small = a.tokens * a.rows * a.columns < 1 << 15;
    threads = small || threads < 1 ? 1 : (threads < MAX_THREADS ? threads : MAX_THREADS);
    const bool packed = a.form != Form::rows;
    const FormKernels& form = kernels.forms[static_cast<int>(a.form)];
    const bool many = a.tokens > PAIRS_FEW && !a.float_out;
    const bool pairs = packed && form.pairs != nullptr && (many || !form.pairs_of_many);
    if (pairs && a.tokens <= PAIR_BLOCK) return panels_pairs(kernels, a, threads);
    if (packed && !pairs && a.tokens <= PANELS_FEW) return panels_few(kernels, a, threads);
    if (!packed && a.tokens <= LINEAR_FEW) return linear_few(kernels, a, threads);
    // Widened tokens stay below 16 MiB.
    const int64_t fit = LINEAR_BLOCK + (int64_t{1} << 22) / (a.columns < 1 ? 1 : a.columns);
    // As even as they can be: a last part of a few tokens would be summed in another order.
    const int64_t parts = (a.tokens + fit - 1) / fit, most = (a.tokens + parts - 1) / parts;
    const int64_t item = kernels.item_size, out_item = a.float_out ? static_cast<int64_t>(sizeof(float)) : item;
    for (int64_t t = 0; t < a.tokens; t += most) {
        Linear part = a;
        part.x = static_cast<const char*>(a.x) + t * a.x_stride * item;
        part.out = static_cast<char*>(a.out) + t * a.rows * out_item;
        part.tokens = a.tokens - t < most ? a.tokens - t : most;
        if (pairs) {
            panels_pairs(kernels, part, threads);
        } else if (packed) {
            panels_many(kernels, part, threads);
        } else {
            linear_many(kernels, part, threads);
        }
    }
}

int64_t embedding(const Kernels& kernels, Form form, const void* table, int64_t num_rows, int64_t columns,
                  const int64_t* ids, int64_t tokens, void* out) {
    if (const int64_t bad = check_positions(ids, tokens, num_rows); bad != OK) return bad;
    for (int64_t t = 0; t < tokens; ++t) {
        kernels.forms[static_cast<int>(form)].row(table, ids[t], columns,
                                                  static_cast<char*>(out) + t * columns * kernels.item_size);
    }
    return OK;
}

}  // namespace tokenspeed::cpu

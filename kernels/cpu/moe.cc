// A mixture of experts, cut into tasks.
#include "moe.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace tokenspeed::cpu {
namespace {

constexpr int64_t PACK_PAIRS = 32;   // tokens of a task that packs or activates
constexpr int64_t COLUMN_STEP = 64;  // columns of the sums that one thread has alone: whole vectors and cache lines

int64_t round_up(int64_t floats) { return (floats + 15) / 16 * 16; }

// A token at one of its experts.
struct Pair {
    int32_t token;
    float weight;
};

// Pairs [begin, end) of one expert. Its number of tokens decides how all of them are multiplied, as in `linear`.
struct Piece {
    int32_t expert;
    bool many;
    int64_t begin;
    int64_t end;

    int64_t size() const { return end - begin; }
};

// Pairs, or weight rows, [begin, end) of a piece.
struct PieceTask {
    const Piece* piece;
    int64_t begin;
    int64_t end;
};

// The pairs expert by expert, each expert's in the order of the tokens; starts[e] is the first of expert e.
std::vector<Pair> sorted_pairs(const Experts& e, std::vector<int64_t>& starts) {
    starts.assign(static_cast<size_t>(e.experts) + 1, 0);
    for (int64_t i = 0; i < e.tokens * e.slots; ++i) {
        if (e.ids[i] >= 0) ++starts[static_cast<size_t>(e.ids[i]) + 1];
    }
    for (int64_t i = 0; i < e.experts; ++i) starts[i + 1] += starts[i];
    std::vector<Pair> pairs(static_cast<size_t>(starts[e.experts]));
    std::vector<int64_t> next(starts);
    for (int64_t i = 0; i < e.tokens * e.slots; ++i) {
        if (e.ids[i] >= 0) pairs[next[e.ids[i]]++] = {static_cast<int32_t>(i / e.slots), e.weights[i]};
    }
    return pairs;
}

std::vector<Piece> pieces_of(const std::vector<int64_t>& starts) {
    std::vector<Piece> pieces;
    for (size_t e = 0; e + 1 < starts.size(); ++e) {
        const int64_t tokens = starts[e + 1] - starts[e], cuts = (tokens + LINEAR_BLOCK - 1) / LINEAR_BLOCK;
        for (int64_t i = 0; i < cuts; ++i) {
            pieces.push_back({static_cast<int32_t>(e), tokens > LINEAR_FEW, starts[e] + tokens * i / cuts,
                              starts[e] + tokens * (i + 1) / cuts});
        }
    }
    return pieces;
}

// The pieces [first, last) from their tokens to their outputs, which are then added to the tokens' sums.
class Wave {
public:
    Wave(const Kernels& kernels, const Experts& e, const Piece* first, const Piece* last, int threads)
        : kernels_(kernels), e_(e), first_(first), last_(last), threads_(threads) {}

    // Floats of memory that `pairs` pairs need, what threads have for themselves aside.
    static int64_t memory(const Kernels& kernels, const Experts& e, int64_t pairs) {
        return pairs * (packed_stride(e.hidden) + packed_stride(e.inner) + e.hidden) +
               2 * round_up(pairs * 2 * e.inner * kernels.item_size / 4 + 16);
    }
    static int64_t memory_of_a_thread(const Kernels& kernels) {
        return std::max(round_up(LINEAR_ROWS * LINEAR_FEW), round_up(kernels.linear_many_scratch(LINEAR_BLOCK)));
    }

    void run(const Pair* pairs, float* memory, float* of_threads, float* sums) {
        const int64_t base = first_->begin, size = last_[-1].end - base, inner = e_.inner;
        float* tokens = memory;
        float* hidden = tokens + size * packed_stride(e_.hidden);
        float* outputs = hidden + size * packed_stride(inner);
        char* gate_up = reinterpret_cast<char*>(outputs + round_up(size * e_.hidden));
        char* activated = gate_up + size * 2 * inner * kernels_.item_size;
        const auto at = [&](char* rows, int64_t pair, int64_t width) {
            return rows + (pair - base) * width * kernels_.item_size;
        };
        for_pairs([&](const PieceTask& task) {
            for (int64_t i = task.begin; i < task.end; ++i) {
                const char* x = static_cast<const char*>(e_.x) + pairs[i].token * e_.x_stride * kernels_.item_size;
                pack(*task.piece, x, i, e_.hidden, tokens);
            }
        });
        multiply(e_.gate_up, 2 * inner, e_.hidden, tokens, gate_up, false, of_threads);
        for_pairs([&](const PieceTask& task) {
            char* of = at(activated, task.begin, inner);
            kernels_.silu_mul(at(gate_up, task.begin, 2 * inner), 2 * inner, of, inner, 0, task.end - task.begin);
            for (int64_t i = task.begin; i < task.end; ++i) {
                pack(*task.piece, at(activated, i, inner), i, inner, hidden);
            }
        });
        multiply(e_.down, e_.hidden, inner, hidden, reinterpret_cast<char*>(outputs), true, of_threads);
        // By columns, so that the sums of a token run over its experts in their order, whoever adds them.
        const int64_t steps = (e_.hidden + COLUMN_STEP - 1) / COLUMN_STEP;
        parallel_ranges(steps, COLUMN_STEP * size, threads_, [&](int64_t begin, int64_t end) {
            const int64_t column = begin * COLUMN_STEP, width = std::min(end * COLUMN_STEP, e_.hidden) - column;
            for (int64_t i = 0; i < size; ++i) {
                const Pair& pair = pairs[base + i];
                kernels_.add_weighted(sums + pair.token * e_.hidden + column, outputs + i * e_.hidden + column,
                                      pair.weight, width);
            }
        });
    }

private:
    static int64_t packed_stride(int64_t columns) {
        Linear a;
        a.columns = columns;
        return a.packed_stride();
    }

    Linear linear_of(const Piece& piece, int64_t columns) const {
        Linear a;
        a.bias = nullptr, a.form = Form::rows;
        a.tokens = piece.size(), a.columns = columns, a.weight_stride = columns;
        return a;
    }

    // Where the packed tokens of a piece begin.
    float* packed_of(const Piece& piece, int64_t columns, float* packed) const {
        return packed + (piece.begin - first_->begin) * packed_stride(columns);
    }

    // One pair's input, laid out as its product takes it.
    void pack(const Piece& piece, const char* x, int64_t pair, int64_t columns, float* packed) const {
        Linear a = linear_of(piece, columns);
        a.x = x, a.x_stride = 0;  // whatever its place in the piece, its elements are at x
        const int64_t i = pair - piece.begin;
        if (piece.many) {
            kernels_.linear_many_widen(a, i, i + 1, packed_of(piece, columns, packed));
        } else {
            kernels_.linear_few_pack(a, i, i + 1, packed_of(piece, columns, packed));
        }
    }

    template <class Body>
    void for_pairs(const Body& body) const {
        std::vector<PieceTask> tasks;
        for (const Piece* piece = first_; piece != last_; ++piece) {
            for (int64_t i = piece->begin; i < piece->end; i += PACK_PAIRS) {
                tasks.push_back({piece, i, std::min(i + PACK_PAIRS, piece->end)});
            }
        }
        parallel(static_cast<int64_t>(tasks.size()), threads_, [&](int64_t task, int) { body(tasks[task]); });
    }

    // Every piece with its expert's matrix [rows, columns], in tasks of as many multiplications as those of `linear`.
    void multiply(const void* weights, int64_t rows, int64_t columns, float* packed, char* out, bool float_out,
                  float* of_threads) const {
        std::vector<PieceTask> tasks;
        for (const Piece* piece = first_; piece != last_; ++piece) {
            const int64_t step = piece->many ? kernels_.linear_strip : LINEAR_ROWS;
            const int64_t size = piece->many ? 1 << 20 : (int64_t{1} << 17) * std::min<int64_t>(piece->size(), 8);
            const int64_t each = std::max<int64_t>(size / (piece->size() * columns * step), 1) * step;
            for (int64_t row = 0; row < rows; row += each) tasks.push_back({piece, row, std::min(row + each, rows)});
        }
        const int64_t item = float_out ? static_cast<int64_t>(sizeof(float)) : kernels_.item_size;
        const int64_t of_a_thread = memory_of_a_thread(kernels_);
        parallel(static_cast<int64_t>(tasks.size()), threads_, [&](int64_t i, int worker) {
            const PieceTask& task = tasks[i];
            const Piece& piece = *task.piece;
            Linear a = linear_of(piece, columns);
            a.rows = rows, a.float_out = float_out;
            a.weight = static_cast<const char*>(weights) + piece.expert * rows * columns * kernels_.item_size;
            a.out = out + (piece.begin - first_->begin) * rows * item;
            float* x = packed_of(piece, columns, packed);
            float* memory = of_threads + worker * of_a_thread;
            if (piece.many) {
                kernels_.linear_many_rows(a, x, 0, a.tokens, task.begin, task.end, memory);
            } else {
                kernels_.linear_few_rows(a, x, 0, a.tokens, task.begin, task.end, memory);
            }
        });
    }

    const Kernels& kernels_;
    const Experts& e_;
    const Piece* first_;
    const Piece* last_;
    int threads_;
};

}  // namespace

void moe_route(const Kernels& kernels, const Route& r, int threads) {
    const int64_t cost = int64_t{16} * r.experts;  // in elements that are copied
    const int64_t pieces = r.tokens * cost < 1 << 15 ? 1 : std::clamp<int64_t>(threads, 1, r.tokens);
    float* memory = scratch(static_cast<size_t>(r.scratch() * std::max(threads, 1)));
    parallel(pieces, threads, [&](int64_t piece, int worker) {
        kernels.moe_route(r, r.tokens * piece / pieces, r.tokens * (piece + 1) / pieces, memory + worker * r.scratch());
    });
}

int64_t moe_experts(const Kernels& kernels, const Experts& e, int threads) {
    for (int64_t i = 0; i < e.tokens * e.slots; ++i) {
        if (e.ids[i] < -1 || e.ids[i] >= e.experts) return i / e.slots;
    }
    if (e.tokens == 0) return OK;
    std::vector<int64_t> starts;
    const std::vector<Pair> pairs = sorted_pairs(e, starts);
    const std::vector<Piece> pieces = pieces_of(starts);
    const int64_t num_pairs = static_cast<int64_t>(pairs.size());
    const bool small = num_pairs * e.hidden * e.inner < 1 << 15;
    threads = small ? 1 : std::clamp(threads, 1, MAX_THREADS);

    const int64_t most = std::min<int64_t>(num_pairs, EXPERT_PAIRS), sums_size = round_up(e.tokens * e.hidden);
    const int64_t of_threads = Wave::memory_of_a_thread(kernels) * threads;
    float* sums = scratch(static_cast<size_t>(sums_size + of_threads + Wave::memory(kernels, e, most)));
    std::memset(sums, 0, static_cast<size_t>(sums_size) * sizeof(float));
    for (const Piece *first = pieces.data(), *end = first + pieces.size(), *last; first != end; first = last) {
        last = first + 1;
        while (last != end && last->end - first->begin <= EXPERT_PAIRS) ++last;
        Wave(kernels, e, first, last, threads).run(pairs.data(), sums + sums_size + of_threads, sums + sums_size, sums);
    }
    parallel_ranges(e.tokens, e.hidden, threads, [&](int64_t begin, int64_t end) {
        kernels.round_all(sums + begin * e.hidden, static_cast<char*>(e.out) + begin * e.hidden * kernels.item_size,
                          (end - begin) * e.hidden);
    });
    return OK;
}

}  // namespace tokenspeed::cpu

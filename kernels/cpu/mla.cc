// Latent attention, cut into tasks.
#include "mla.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace tokenspeed::cpu {
namespace {

constexpr int64_t EXPANDED = int64_t{1} << 24;  // floats of keys and values held at once, unless one head has more
constexpr int32_t FEW_ROWS = 16;                // query rows of a task where tasks are few
constexpr int32_t HEAD_ROWS = 1024;             // query tokens that share a head's keys and values, at most

int64_t round_up(int64_t floats) { return (floats + 15) / 16 * 16; }

// Head by head, each expanded where it is used: by each of its tasks, of which there are several for many tokens, and two
// where there are twice as many threads as heads. More threads would only expand what others have expanded.
void heads_in_pairs(const Kernels& kernels, const LatentPrefill& a, int threads) {
    threads = std::min(threads, 2 * a.num_heads);
    const int32_t cuts = std::max((a.tokens + HEAD_ROWS - 1) / HEAD_ROWS,
                                  std::min((a.tokens + TILE_ROWS - 1) / TILE_ROWS, threads / a.num_heads));
    const int64_t each = round_up(kernels.latent_head_scratch(a, (a.tokens + cuts - 1) / cuts));
    float* memory = scratch(static_cast<size_t>(each * threads));
    parallel(int64_t{cuts} * a.num_heads, threads, [&](int64_t task, int worker) {
        // From the back, as below.
        const int32_t head = static_cast<int32_t>(task % a.num_heads);
        const int64_t i = cuts - 1 - task / a.num_heads;
        const HeadTile tile = {head, static_cast<int32_t>(a.tokens * i / cuts),
                               static_cast<int32_t>(a.tokens * (i + 1) / cuts)};
        kernels.latent_head(a, tile, memory + worker * each);
    });
}

}  // namespace

int64_t mla_decode(const Kernels& kernels, const LatentDecode& a, int threads) {
    if (const int64_t bad = check_rows(a); bad != OK) return bad;
    if (a.rows == 0 || a.query_rows() == 0) return OK;
    std::vector<LatentSplit> splits;
    std::vector<int64_t> first(a.rows + 1);
    for (int32_t row = 0; row < a.rows; ++row) {
        first[row] = static_cast<int64_t>(splits.size());
        for (int32_t begin = 0; begin < a.kv_len[row]; begin += SPLIT_TOKENS) {
            splits.push_back({row, begin, std::min(begin + SPLIT_TOKENS, a.kv_len[row]), 0, a.query_rows()});
        }
    }
    const int64_t num_splits = static_cast<int64_t>(splits.size());
    first[a.rows] = num_splits;
    // No sum runs over query rows: where they are cut is nobody's concern but the threads'.
    const int64_t even = (a.query_rows() + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t cuts = num_splits * even < 2 * threads ? (a.query_rows() + FEW_ROWS - 1) / FEW_ROWS : even;
    const int64_t each = round_up(kernels.latent_split_scratch(a, (a.query_rows() + static_cast<int>(cuts) - 1) /
                                                                      static_cast<int>(cuts)));
    const int64_t size = a.query_rows() * a.partial_stride();
    float* memory = scratch(static_cast<size_t>(each * threads + num_splits * size));
    float* partials = memory + each * threads;
    parallel(num_splits * cuts, threads, [&](int64_t task, int worker) {
        const int64_t i = task / cuts, cut = task % cuts;
        LatentSplit part = splits[i];
        part.first = static_cast<int32_t>(a.query_rows() * cut / cuts);
        part.last = static_cast<int32_t>(a.query_rows() * (cut + 1) / cuts);
        kernels.latent_split(a, part, partials + i * size + part.first * a.partial_stride(), memory + worker * each);
    });
    const int64_t rows = int64_t{a.rows} * a.query_rows();
    parallel_ranges(rows, num_splits / a.rows * a.partial_stride(), threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int row = static_cast<int>(i / a.query_rows()), m = static_cast<int>(i % a.query_rows());
            kernels.latent_combine(a, row, m, m + 1, partials + first[row] * size,
                                   static_cast<int>(first[row + 1] - first[row]));
        }
    });
    return OK;
}

int64_t mla_prefill(const Kernels& kernels, const LatentPrefill& a, int threads) {
    if (const int64_t bad = check_rows(a); bad != OK) return bad;
    if (a.tokens < 1 || a.tokens > a.kv_len[0]) return 0;
    if (kernels.latent_head != nullptr && kernels.latent_head_scratch(a, a.tokens) > 0) {
        heads_in_pairs(kernels, a, threads);
        return OK;
    }
    const int64_t tiles = a.tiles(), padded = a.v_padded();
    const int64_t of_head = tiles * TILE_TOKENS * (a.nope + padded) + a.rank * (a.nope + padded);
    const int32_t together = static_cast<int32_t>(std::clamp<int64_t>(EXPANDED / of_head, 1, a.num_heads));
    const int64_t each = round_up(std::max(kernels.latent_expand_scratch(a), kernels.latent_tile_scratch(a)));
    const int64_t rope = tiles * TILE_TOKENS * a.rope();
    float* memory = scratch(static_cast<size_t>(each * threads + rope + together * of_head));
    for (int32_t start = 0; start < a.num_heads; start += together) {
        ExpandedHeads heads{start, std::min(start + together, a.num_heads), {}, {}, {}, {}, memory + each * threads};
        const int64_t count = heads.last - heads.first;
        heads.keys = heads.rope + rope;
        heads.values = heads.keys + count * tiles * TILE_TOKENS * a.nope;
        heads.k_up = heads.values + count * tiles * TILE_TOKENS * padded;
        heads.v_up = heads.k_up + count * a.rank * a.nope;
        parallel(count, threads,
                 [&](int64_t i, int) { kernels.latent_project(a, heads, heads.first + static_cast<int>(i)); });
        // A tile is transposed once for all heads, unless there are too few tiles for all threads.
        const int64_t cuts = tiles < 4 * threads ? count : 1;
        parallel(tiles * cuts, threads, [&](int64_t task, int worker) {
            const int64_t cut = task % cuts;
            const int first = heads.first + static_cast<int>(count * cut / cuts);
            const int last = heads.first + static_cast<int>(count * (cut + 1) / cuts);
            kernels.latent_expand(a, heads, static_cast<int>(task / cuts), first, last, memory + worker * each);
        });
        std::vector<HeadTile> queries;
        const int32_t pieces = (a.tokens + TILE_ROWS - 1) / TILE_ROWS;
        // From the back, as in mha_prefill: the last tokens see the most.
        for (int32_t i = pieces; i-- > 0;) {
            for (int32_t head = heads.first; head < heads.last; ++head) {
                queries.push_back({head, static_cast<int32_t>(int64_t{a.tokens} * i / pieces),
                                   static_cast<int32_t>(int64_t{a.tokens} * (i + 1) / pieces)});
            }
        }
        parallel(static_cast<int64_t>(queries.size()), threads,
                 [&](int64_t i, int worker) { kernels.latent_tile(a, heads, queries[i], memory + worker * each); });
    }
    return OK;
}

}  // namespace tokenspeed::cpu

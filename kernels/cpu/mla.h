// Latent attention over a paged cache of latents: absorbed for a few queries a row, expanded for chunks.
//
// The cache is one KV head of head_dim = rank + rope: `k` of Attention, whose rows, blocks and lengths hold here too.
// `v` is not looked at, the values are latents.
#pragma once

#include "kernels.h"

namespace tokenspeed::cpu {

// q (of the latents) and q_rope [rows, queries, num_heads, rank or rope], strides of the first three in elements; out
// [rows, queries, num_heads, rank] is contiguous. Query i of a row sees its first kv_len - queries + 1 + i tokens.
struct LatentDecode : Attention {
    const void* q_rope;
    int64_t q_query_stride;  // q_stride is of rows
    int64_t q_head_stride;
    int64_t rope_row_stride;
    int64_t rope_query_stride;
    int64_t rope_head_stride;
    int32_t queries;
    int32_t rank;

    int query_rows() const { return queries * num_heads; }
    int visible(int row, int query_row) const { return kv_len[row] - queries + 1 + query_row / num_heads; }
    int64_t partial_stride() const { return int64_t{rank} + 2; }
};

// KV tokens [begin, end) of a row for its query rows (queries × heads) [first, last).
struct LatentSplit {
    int32_t row;
    int32_t begin;
    int32_t end;
    int32_t first;
    int32_t last;
};

// A chunk of one row: q [tokens, num_heads, nope + rope], heads together; k_up [num_heads, nope, rank] and v_up
// [num_heads, v_dim, rank], heads that far apart, rows contiguous; out [tokens, num_heads, v_dim], contiguous.
struct LatentPrefill : Attention {
    const void* k_up;
    const void* v_up;
    int64_t k_up_stride;
    int64_t v_up_stride;
    int32_t tokens;
    int32_t nope;
    int32_t v_dim;
    int32_t rank;

    int rope() const { return head_dim - rank; }
    int v_padded() const { return (v_dim + 15) / 16 * 16; }
    int tiles() const { return (kv_len[0] + TILE_TOKENS - 1) / TILE_TOKENS; }
};

// Keys and values of some heads, in tiles of TILE_TOKENS tokens, and the projections that they come from: of each head
// k_up [nope, rank], v_up [rank, v_padded], and of each of its tiles keys [nope, TILE_TOKENS] and values [TILE_TOKENS,
// v_padded]; of each tile the part of the keys that all heads share, rope [rope, TILE_TOKENS].
struct ExpandedHeads {
    int32_t first;
    int32_t last;
    float* k_up;
    float* v_up;
    float* keys;
    float* values;
    float* rope;
};

// Query tokens [begin, end) of one head.
struct HeadTile {
    int32_t head;
    int32_t begin;
    int32_t end;
};

// These return OK, or the first row whose lengths or blocks are out of range; nothing is written then.
int64_t mla_decode(const Kernels&, const LatentDecode&, int threads);
int64_t mla_prefill(const Kernels&, const LatentPrefill&, int threads);

}  // namespace tokenspeed::cpu

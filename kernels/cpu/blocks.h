// Whole blocks of a decode step: chains of the kernels in kernels.h, entered once.
#pragma once

#include <vector>

#include "kernels.h"

namespace tokenspeed::cpu {

struct Matrix {
    const void* data;
    const void* bias;  // or null
    int64_t rows;
    int64_t columns;
    int64_t stride;  // of `rows`
    Form form;
};

// What a block adds to: y is its contribution [tokens, hidden]. With a gain, x + residual (x alone without one) is
// normed first, and their sum is residual_out.
struct Stream {
    const void* x;
    const void* residual;
    const void* gain;
    void* y;
    void* residual_out;
    int64_t x_stride;
    int64_t residual_stride;
    int64_t tokens;
    float eps;
};

struct GqaBlock {
    Matrix qkv;
    Matrix out;
    const void* q_gain;  // norms of the heads, or null
    const void* k_gain;
    const float* cos_sin;
    int64_t num_positions;
    void* k_cache;
    void* v_cache;
    int64_t num_blocks;
    int32_t block_size;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    float scale;
    float head_eps;
    bool interleaved;
};

struct BlockRows {
    const int64_t* positions;
    const int64_t* kv_slots;
    const int32_t* kv_len;
    const int32_t* block_table;
    int64_t table_stride;
    int64_t table_width;
};

struct MlpBlock {
    Matrix gate_up;
    Matrix down;
};

// A layer of a dense decoder: x += attention(norm(x)); x += mlp(norm(x)).
struct StackLayer {
    GqaBlock attention;
    MlpBlock mlp;
    const void* attention_gain;
    const void* mlp_gain;
    float eps;
};

// All layers, whose caches have as many blocks and whose tables of angles as many positions.
using Stack = std::vector<StackLayer>;

// x [tokens, hidden] through a stack and the last norm, into y [tokens, hidden].
struct Passage {
    const void* x;
    const void* gain;
    void* y;
    int64_t x_stride;
    int64_t tokens;
    float eps;
};

// Returns OK, or the first row whose position, slot, length or block is out of range; nothing is written then.
int64_t gqa_block(const Kernels&, const GqaBlock&, const BlockRows&, const Stream&, int threads);
void mlp_block(const Kernels&, const MlpBlock&, const Stream&, int threads);
int64_t stack(const Kernels&, const Stack&, const BlockRows&, const Passage&, int threads);

}  // namespace tokenspeed::cpu

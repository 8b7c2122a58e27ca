#include "blocks.h"

#include <algorithm>

#include "parallel.h"

namespace tokenspeed::cpu {
namespace {

// Intermediate results one behind the other, each on its own cache lines.
class Arena {
public:
    Arena(const Kernels& kernels, std::initializer_list<int64_t> elements) : item_(kernels.item_size) {
        int64_t total = 0;
        for (const int64_t each : elements) total += padded(each);
        at_ = reinterpret_cast<char*>(scratch(static_cast<size_t>(total) / sizeof(float), Scratch::block));
    }
    void* take(int64_t elements) {
        void* memory = at_;
        at_ += padded(elements);
        return memory;
    }

private:
    int64_t padded(int64_t elements) const { return (elements * item_ + 63) / 64 * 64; }
    int64_t item_;
    char* at_;
};

// What the block multiplies: x as it is, or normed into `normed` with the sum in residual_out.
struct Input {
    const void* x;
    int64_t stride;
};

Input enter(const Kernels& kernels, const Stream& s, int64_t hidden, void* normed, int threads) {
    if (s.gain == nullptr) return {s.x, s.x_stride};
    rms_norm(kernels, s.x, s.x_stride, s.residual, s.residual_stride, s.gain, normed, s.residual_out, s.tokens, hidden,
             s.eps, threads);
    return {normed, hidden};
}

void multiply(const Kernels& kernels, const Matrix& m, Input input, int64_t tokens, void* out, int threads) {
    Linear a;
    a.x = input.x, a.x_stride = input.stride, a.tokens = tokens, a.out = out;
    a.weight = m.data, a.bias = m.bias, a.weight_stride = m.stride, a.rows = m.rows, a.columns = m.columns;
    a.form = m.form, a.float_out = false;
    linear(kernels, a, threads);
}

char* offset(const Kernels& kernels, void* memory, int64_t elements) {
    return static_cast<char*>(memory) + elements * kernels.item_size;
}

// Each head normed in place.
void norm_heads(const Kernels& kernels, char* heads, int64_t token_stride, int64_t num_heads, int64_t head_dim,
                const void* gain, float eps, int64_t tokens) {
    if (gain == nullptr) return;
    for (int64_t t = 0; t < tokens; ++t, heads += token_stride * kernels.item_size) {
        kernels.rms_norm(heads, head_dim, nullptr, 0, gain, heads, nullptr, head_dim, eps, 0, num_heads);
    }
}

// Everything that must hold before anything is written.
int64_t check(const GqaBlock& b, const BlockRows& rows, const Attention& a) {
    const int64_t num_slots = b.num_blocks * b.block_size;
    for (int64_t t = 0; t < a.rows; ++t) {
        const bool positioned = rows.positions[t] >= 0 && rows.positions[t] < b.num_positions;
        if (!positioned || rows.kv_slots[t] < NOT_STORED || rows.kv_slots[t] >= num_slots) return t;
    }
    return check_rows(a);
}

}  // namespace

int64_t gqa_block(const Kernels& kernels, const GqaBlock& b, const BlockRows& rows, const Stream& s, int threads) {
    const int64_t tokens = s.tokens, hidden = b.qkv.columns, d = b.head_dim, width = b.qkv.rows;
    const int64_t q_size = b.num_heads * d, k_size = b.num_kv_heads * d;
    Attention a;
    a.k = b.k_cache, a.v = b.v_cache, a.num_blocks = b.num_blocks, a.block_size = b.block_size;
    a.block_table = rows.block_table, a.table_stride = rows.table_stride, a.table_width = rows.table_width;
    a.kv_len = rows.kv_len, a.rows = static_cast<int32_t>(tokens), a.q_stride = width, a.scale = b.scale;
    a.num_heads = b.num_heads, a.num_kv_heads = b.num_kv_heads, a.head_dim = b.head_dim;
    if (const int64_t bad = check(b, rows, a); bad != OK) return bad;
    Arena arena(kernels, {tokens * hidden, tokens * width, tokens * q_size});
    void* normed = arena.take(tokens * hidden);
    void* qkv = arena.take(tokens * width);
    void* attended = arena.take(tokens * q_size);
    multiply(kernels, b.qkv, enter(kernels, s, hidden, normed, threads), tokens, qkv, threads);
    char* k = offset(kernels, qkv, q_size);
    char* v = offset(kernels, qkv, q_size + k_size);
    norm_heads(kernels, static_cast<char*>(qkv), width, b.num_heads, d, b.q_gain, b.head_eps, tokens);
    norm_heads(kernels, k, width, b.num_kv_heads, d, b.k_gain, b.head_eps, tokens);
    rotary(kernels, qkv, width, d, b.num_heads, k, width, d, b.num_kv_heads, d, b.interleaved, rows.positions,
           b.cos_sin, b.num_positions, tokens, threads);
    const int64_t num_slots = b.num_blocks * b.block_size, item = kernels.item_size;
    kv_store(k, width * item, b.k_cache, rows.kv_slots, tokens, k_size * item, num_slots, threads);
    kv_store(v, width * item, b.v_cache, rows.kv_slots, tokens, k_size * item, num_slots, threads);
    a.q = qkv, a.out = attended;
    mha_decode(kernels, a, threads);
    multiply(kernels, b.out, {attended, q_size}, tokens, s.y, threads);
    return OK;
}

void mlp_block(const Kernels& kernels, const MlpBlock& b, const Stream& s, int threads) {
    const int64_t tokens = s.tokens, hidden = b.gate_up.columns, size = b.down.columns;
    Arena arena(kernels, {tokens * hidden, tokens * 2 * size, tokens * size});
    void* normed = arena.take(tokens * hidden);
    void* gate_up = arena.take(tokens * 2 * size);
    void* product = arena.take(tokens * size);
    multiply(kernels, b.gate_up, enter(kernels, s, hidden, normed, threads), tokens, gate_up, threads);
    silu_mul(kernels, gate_up, 2 * size, product, tokens, size, threads);
    multiply(kernels, b.down, {product, size}, tokens, s.y, threads);
}

}  // namespace tokenspeed::cpu

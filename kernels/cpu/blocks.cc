#include "blocks.h"

#include <cstring>

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

// Where a block's intermediate results lie.
struct GqaMemory {
    void* normed;
    void* qkv;
    void* attended;
};
struct MlpMemory {
    void* normed;
    void* gate_up;
    void* product;
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

// Each head of tokens [begin, end) normed in place.
void norm_heads(const Kernels& kernels, char* heads, int64_t token_stride, int64_t num_heads, int64_t head_dim,
                const void* gain, float eps, int64_t begin, int64_t end) {
    if (gain == nullptr) return;
    for (int64_t t = begin; t < end; ++t) {
        char* of = heads + t * token_stride * kernels.item_size;
        kernels.rms_norm(of, head_dim, nullptr, 0, gain, of, nullptr, head_dim, eps, 0, num_heads);
    }
}

// Tokens [begin, end) of k or v into their slots, `size` bytes each.
void store(const char* source, int64_t stride, void* cache, const int64_t* slots, int64_t size, int64_t begin,
           int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        if (slots[t] == NOT_STORED) continue;
        std::memcpy(static_cast<char*>(cache) + slots[t] * size, source + t * stride, static_cast<size_t>(size));
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

Attention attention_of(const GqaBlock& b, const BlockRows& rows, int64_t tokens) {
    Attention a;
    a.k = b.k_cache, a.v = b.v_cache, a.num_blocks = b.num_blocks, a.block_size = b.block_size;
    a.block_table = rows.block_table, a.table_stride = rows.table_stride, a.table_width = rows.table_width;
    a.kv_len = rows.kv_len, a.rows = static_cast<int32_t>(tokens), a.q_stride = b.qkv.rows, a.scale = b.scale;
    a.num_heads = b.num_heads, a.num_kv_heads = b.num_kv_heads, a.head_dim = b.head_dim;
    return a;
}

// The block over rows that have been checked.
void attend(const Kernels& kernels, const GqaBlock& b, const BlockRows& rows, const Stream& s, const GqaMemory& memory,
            int threads) {
    const int64_t tokens = s.tokens, d = b.head_dim, width = b.qkv.rows, item = kernels.item_size;
    const int64_t q_size = b.num_heads * d, k_size = b.num_kv_heads * d;
    multiply(kernels, b.qkv, enter(kernels, s, b.qkv.columns, memory.normed, threads), tokens, memory.qkv, threads);
    char* q = static_cast<char*>(memory.qkv);
    char* k = q + q_size * item;
    char* v = k + k_size * item;
    parallel_ranges(tokens, width, threads, [&](int64_t begin, int64_t end) {
        norm_heads(kernels, q, width, b.num_heads, d, b.q_gain, b.head_eps, begin, end);
        norm_heads(kernels, k, width, b.num_kv_heads, d, b.k_gain, b.head_eps, begin, end);
        kernels.rotary(q, width, d, b.num_heads, d, b.interleaved, rows.positions, b.cos_sin, begin, end);
        kernels.rotary(k, width, d, b.num_kv_heads, d, b.interleaved, rows.positions, b.cos_sin, begin, end);
        store(k, width * item, b.k_cache, rows.kv_slots, k_size * item, begin, end);
        store(v, width * item, b.v_cache, rows.kv_slots, k_size * item, begin, end);
    });
    Attention a = attention_of(b, rows, tokens);
    a.q = q, a.out = memory.attended;
    mha_decode(kernels, a, threads);
    multiply(kernels, b.out, {memory.attended, q_size}, tokens, s.y, threads);
}

void feed(const Kernels& kernels, const MlpBlock& b, const Stream& s, const MlpMemory& memory, int threads) {
    const int64_t tokens = s.tokens, size = b.down.columns;
    const Input input = enter(kernels, s, b.gate_up.columns, memory.normed, threads);
    multiply(kernels, b.gate_up, input, tokens, memory.gate_up, threads);
    silu_mul(kernels, memory.gate_up, 2 * size, memory.product, tokens, size, threads);
    multiply(kernels, b.down, {memory.product, size}, tokens, s.y, threads);
}

}  // namespace

int64_t gqa_block(const Kernels& kernels, const GqaBlock& b, const BlockRows& rows, const Stream& s, int threads) {
    if (const int64_t bad = check(b, rows, attention_of(b, rows, s.tokens)); bad != OK) return bad;
    const int64_t normed = s.tokens * b.qkv.columns, qkv = s.tokens * b.qkv.rows, attended = s.tokens * b.out.columns;
    Arena arena(kernels, {normed, qkv, attended});
    attend(kernels, b, rows, s, {arena.take(normed), arena.take(qkv), arena.take(attended)}, threads);
    return OK;
}

void mlp_block(const Kernels& kernels, const MlpBlock& b, const Stream& s, int threads) {
    const int64_t normed = s.tokens * b.gate_up.columns, size = s.tokens * b.down.columns;
    Arena arena(kernels, {normed, 2 * size, size});
    feed(kernels, b, s, {arena.take(normed), arena.take(2 * size), arena.take(size)}, threads);
}

int64_t stack(const Kernels& kernels, const Stack& layers, const BlockRows& rows, const Passage& p, int threads) {
    const GqaBlock& first = layers.front().attention;
    if (const int64_t bad = check(first, rows, attention_of(first, rows, p.tokens)); bad != OK) return bad;
    const int64_t wide = p.tokens * first.qkv.columns, qkv = p.tokens * first.qkv.rows;
    const int64_t attended = p.tokens * first.out.columns, size = p.tokens * layers.front().mlp.down.columns;
    Arena arena(kernels, {wide, wide, wide, qkv, attended, 2 * size, size});
    void* sum = arena.take(wide);
    Stream s;
    s.y = arena.take(wide), s.residual_out = sum, s.tokens = p.tokens, s.residual_stride = first.qkv.columns;
    void* normed = arena.take(wide);
    const GqaMemory attention{normed, arena.take(qkv), arena.take(attended)};
    const MlpMemory mlp{normed, arena.take(2 * size), arena.take(size)};
    // The first block has no residual: what it adds to is x as it came. Later ones add to the sum in its place.
    s.x = p.x, s.x_stride = p.x_stride, s.residual = nullptr;
    const auto follow = [&](const void* residual, int64_t stride) {
        s.x = s.y, s.x_stride = first.qkv.columns, s.residual = residual, s.residual_stride = stride;
    };
    for (const StackLayer& layer : layers) {
        s.gain = layer.attention_gain, s.eps = layer.eps;
        attend(kernels, layer.attention, rows, s, attention, threads);
        if (s.residual == nullptr) {
            follow(p.x, p.x_stride);
        } else {
            follow(sum, first.qkv.columns);
        }
        s.gain = layer.mlp_gain;
        feed(kernels, layer.mlp, s, mlp, threads);
        follow(sum, first.qkv.columns);
    }
    rms_norm(kernels, s.x, s.x_stride, s.residual, s.residual_stride, p.gain, p.y, sum, p.tokens, first.qkv.columns,
             p.eps, threads);
    return OK;
}

}  // namespace tokenspeed::cpu

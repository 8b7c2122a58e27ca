// The C++ face of the CPU kernels, and the table that each instruction set fills.
#pragma once

#include <cstddef>
#include <cstdint>

#include "forms.h"
#include "moe.h"

namespace tokenspeed::cpu {

enum class Type { f32, bf16 };
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// Attention over a paged cache. Heads of q and out lie together (head h at h * head_dim); tokens of q are
// q_stride elements apart, those of out num_heads * head_dim. Caches: [num_blocks, block_size, num_kv_heads,
// head_dim], contiguous. Row r reads block_table[r * table_stride + i], i < ceil(kv_len[r] / block_size).
struct Attention {
    const void* q;
    void* out;
    const void* k;
    const void* v;
    const int32_t* block_table;
    const int32_t* kv_len;
    int64_t q_stride;
    int64_t table_stride;
    int64_t table_width;  // entries of a row of the table
    int64_t num_blocks;
    int32_t rows;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t block_size;
    float scale;

    int group() const { return num_heads / num_kv_heads; }
    int64_t token_stride() const { return int64_t{num_kv_heads} * head_dim; }
};

// KV tokens [begin, end) of a row for the KV heads [kv_begin, kv_end): the part of a decode with a partial of its own.
// The same thread computes the row's tokens up to `ahead` next.
struct Split {
    int32_t row;
    int32_t begin;
    int32_t end;
    int32_t ahead;
    int32_t kv_begin;
    int32_t kv_end;
};

// Query tokens [begin, end) of q, all of one row, for one KV head. The first of them sees `visible`
// tokens, each later one sees one more.
struct QueryTile {
    int32_t row;
    int32_t kv_head;
    int32_t begin;
    int32_t end;
    int32_t visible;
};

// A product with a weight stored as [out, in]: out[t, n] = x[t] · weight[n] + bias[n]; out is contiguous, bias
// may be null. Tokens are packed before they are used, each to packed_stride() elements.
struct Linear {
    const void* x;
    const void* weight;
    const void* bias;
    void* out;
    int64_t x_stride;
    int64_t weight_stride;
    int64_t tokens;
    int64_t columns;  // of the weight: K
    int64_t rows;     // of the weight: N
    bool float_out;   // out is float32, whatever the type of x
    Form form;        // of the weight; weight_stride is of `rows` alone

    int64_t packed_stride() const { return (columns + 31) / 32 * 32; }
    int64_t groups() const { return (columns + GROUP - 1) / GROUP; }
    int64_t panels() const { return (rows + PANEL_ROWS - 1) / PANEL_ROWS; }
};

struct LatentDecode;  // mla.h
struct LatentSplit;
struct LatentPrefill;
struct ExpandedHeads;
struct HeadTile;

constexpr int LINEAR_FEW = 32;      // tokens up to which weights are used as they lie
constexpr int PANELS_FEW = 4;       // tokens up to which packed weights are unpacked in registers
constexpr int LINEAR_ROWS = 8;      // few: weight rows that share one pass over the tokens
constexpr int LINEAR_PANEL = 1024;  // few: elements of a row between two reductions of the sums
constexpr int LINEAR_BLOCK = 252;   // many: tokens that share a strip of transposed weights
constexpr int LINEAR_DEPTH = 256;   // many: elements of a row in a strip
constexpr int PAIRS_FEW = 32;       // pairs: tokens up to which quantised weights are not rounded
constexpr int ORDERED_FEW = 3;      // pairs: tokens up to which quantised weights may be multiplied in vectors
constexpr int PAIR_ROWS = 16;       // pairs: tokens of a tile
constexpr int PAIR_PANELS = 4;      // pairs: panels that share one pass over the tokens
constexpr int PAIR_BLOCK = 512;     // pairs: tokens that share a panel while it is in the cache
constexpr int SPLIT_TOKENS = 256;  // a constant, so that a row's result does not depend on its batch
constexpr int TILE_TOKENS = 64;    // KV tokens between two rescalings of the online softmax
constexpr int TILE_ROWS = 96;      // query rows (tokens × heads of the group) that share one pass over the KV

// The tables of sampler_state.py, of `num_slots` slots, and the rows that sample: logits [rows, vocab], overwritten;
// the slot of each, distinct, or negative for padding; their tokens.
struct Sampling {
    float* logits;
    const int32_t* slots;
    int32_t* tokens;
    const int32_t* features;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const float* repetition;
    const float* presence;
    const float* frequency;
    const int32_t* min_length;
    const int64_t* seed;
    const int64_t* length;
    int64_t* last_token;
    const float* bias;
    int32_t* seen;
    const int32_t* mask;
    int64_t vocab;
    int64_t mask_words;
    int64_t num_slots;
};

// Bits of a slot's features and of what it has seen, as sampler_state.py has them.
constexpr int32_t SAMPLE_RANDOM = 1, SAMPLE_EDITS = 1 << 3, SAMPLE_HISTORY = 1 << 4, SAMPLE_MASKED = 1 << 6;
constexpr int32_t SEEN_PROMPT = 1 << 28, SEEN_STOP = 1 << 29, SEEN_COUNT = SEEN_PROMPT - 1;
constexpr int32_t NO_TOKEN = -1;

// Products with one form of packed weights. `x`: tokens widened to packed_stride() floats. Where bfloat16 is multiplied
// in pairs, tokens are packed as such (pairs.h) in blocks, each of pair_floats(); elsewhere those two are null.
struct FormKernels {
    void (*few)(const Linear&, const float* x, int64_t first_panel, int64_t last_panel);
    void (*many)(const Linear&, const float* x, int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel,
                 float* scratch);
    void (*row)(const void* table, int64_t row, int64_t columns, void* out);
    void (*pairs_pack)(const Linear&, int64_t begin, int64_t end, float* packed) = nullptr;
    bool pairs_of_many = false;  // only of more than PAIRS_FEW tokens, with outputs in the type of x
    void (*pairs)(const Linear&, const float* packed, int64_t begin, int64_t end, int64_t first_panel,
                  int64_t last_panel, float* scratch) = nullptr;
};

// Tokens of each tile of a block of so many: all of them or PAIR_ROWS, as a power of two.
constexpr int64_t pair_rows(int64_t tokens) {
    int64_t rows = 1;
    while (rows < tokens && rows < PAIR_ROWS) rows *= 2;
    return rows;
}
// Tokens of whole tiles.
constexpr int64_t pair_tokens(int64_t tokens) {
    const int64_t rows = pair_rows(tokens);
    return (tokens + rows - 1) / rows * rows;
}
// A few may be floats instead of pairs, so that fewer tokens can take more; a group has its sum too.
constexpr int64_t pair_floats(int64_t tokens, int64_t groups) {
    return pair_tokens(tokens) * groups * ((tokens <= ORDERED_FEW ? GROUP : GROUP / 2) + 1);
}
constexpr int64_t pair_scratch(int64_t tokens) { return 10240 + PAIR_PANELS * PANEL_ROWS * pair_tokens(tokens); }

// What each instruction set provides for each type. Elementwise functions work on tokens [begin, end).
// A partial of a split is num_heads × (head_dim accumulators, maximum, sum).
struct Kernels {
    int64_t item_size;  // bytes of the type
    int64_t (*decode_scratch)(const Attention&);
    void (*decode_split)(const Attention&, const Split&, float* partial, float* scratch);
    void (*decode_combine)(const Attention&, int row, float* partials, int splits);
    int prefill_rows;  // query rows (tokens × heads of the group) that share one pass over the KV, at most
    int64_t (*prefill_scratch)(const Attention&);
    void (*prefill_tile)(const Attention&, const QueryTile&, float* scratch);
    void (*rms_norm)(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride, const void* weight,
                     void* y, void* residual_out, int64_t hidden, float eps, int64_t begin, int64_t end);
    void (*rotary)(void* x, int64_t token_stride, int64_t head_stride, int64_t heads, int64_t head_dim,
                   bool interleaved, const int64_t* positions, const float* cos_sin, int64_t begin, int64_t end);
    void (*silu_mul)(const void* gate_up, int64_t stride, void* out, int64_t size, int64_t begin, int64_t end);
    void (*linear_few_pack)(const Linear&, int64_t begin, int64_t end, void* packed);
    void (*linear_few_rows)(const Linear&, const void* packed, int64_t begin, int64_t end, int64_t first_row,
                            int64_t last_row, float* totals);
    void (*linear_many_widen)(const Linear&, int64_t begin, int64_t end, float* widened);
    int64_t linear_strip;  // weight rows that are transposed together
    int64_t (*linear_many_scratch)(int64_t tokens);
    void (*linear_many_rows)(const Linear&, const float* widened, int64_t begin, int64_t end, int64_t first_row,
                             int64_t last_row, float* scratch);
    void (*panels_widen)(const Linear&, int64_t begin, int64_t end, float* widened);
    int64_t (*sample_scratch)(int64_t vocab);
    int32_t (*sample_row)(const Sampling&, int64_t row, float* scratch);  // or NO_TOKEN
    FormKernels forms[NUM_FORMS];  // by Form; `rows` has none
    void (*moe_route)(const Route&, int64_t begin, int64_t end, float* scratch);
    void (*add_weighted)(float* sums, const float* values, float weight, int64_t size);
    void (*round_all)(const float* values, void* out, int64_t size);
    int64_t (*latent_split_scratch)(const LatentDecode&, int rows);
    void (*latent_split)(const LatentDecode&, const LatentSplit&, float* partial, float* scratch);
    void (*latent_combine)(const LatentDecode&, int row, int first, int last, const float* partials, int splits);
    void (*latent_project)(const LatentPrefill&, const ExpandedHeads&, int head);
    int64_t (*latent_expand_scratch)(const LatentPrefill&);
    void (*latent_expand)(const LatentPrefill&, const ExpandedHeads&, int tile, int first, int last, float* scratch);
    int64_t (*latent_tile_scratch)(const LatentPrefill&);
    void (*latent_tile)(const LatentPrefill&, const ExpandedHeads&, const HeadTile&, float* scratch);
    // Where pairs are multiplied, all of the above for one head; 0 floats if not in this shape.
    int64_t (*latent_head_scratch)(const LatentPrefill&, int rows) = nullptr;
    void (*latent_head)(const LatentPrefill&, const HeadTile&, float* scratch) = nullptr;
};

// Whether this processor runs it, and this build has it.
bool supports(Isa);
// Whether it starts bfloat16's products of pairs as often as float32's, which Intel's do not: 1.1 against 4.2 billion a
// second were counted on a Sapphire Rapids.
bool full_rate_pairs();
const Kernels* kernels(Isa, Type);

// Partial floats of one split.
inline int64_t partial_size(const Attention& a) { return int64_t{a.num_heads} * (a.head_dim + 2); }

constexpr int64_t OK = -1;
constexpr int64_t NOT_STORED = -1;  // kv_store's slot of a token that has none

// What returns a number returns OK, or the first row or token whose length, block, position or slot is out of
// range; nothing is written then. Strides are in elements, of kv_store in bytes.
int64_t check_rows(const Attention&);
int64_t mha_decode(const Kernels&, const Attention&, int threads);
int64_t mha_prefill(const Kernels&, const Attention&, const int32_t* query_start, int threads);
int64_t rotary(const Kernels&, void* q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, void* k,
               int64_t k_stride, int64_t k_head_stride, int64_t k_heads, int64_t head_dim, bool interleaved,
               const int64_t* positions, const float* cos_sin, int64_t num_positions, int64_t tokens, int threads);
int64_t kv_store(const void* source, int64_t source_stride, void* cache, const int64_t* slots, int64_t tokens,
                 int64_t bytes, int64_t num_slots, int threads);
void rms_norm(const Kernels&, const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
              const void* weight, void* y, void* residual_out, int64_t tokens, int64_t hidden, float eps, int threads);
void silu_mul(const Kernels&, const void* gate_up, int64_t stride, void* out, int64_t tokens, int64_t size,
              int threads);
void linear(const Kernels&, const Linear&, int threads);
// Returns OK, or the first row whose slot is not below num_slots.
int64_t sample(const Kernels&, const Sampling&, int64_t rows, int threads);
// Rows of a packed table; or the place of the first id that is not below num_rows.
int64_t embedding(const Kernels&, Form, const void* table, int64_t num_rows, int64_t columns, const int64_t* ids,
                  int64_t tokens, void* out);

}  // namespace tokenspeed::cpu

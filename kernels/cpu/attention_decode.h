// Decode: one query token a row. Included by each isa_*.cc inside its namespace, after simd.h.
//
// A tile of up to TILE_TOKENS tokens at a time, for each KV head: scores of the group's heads by dot
// products, then the online softmax (Milakov and Gimelshein, 2018), then the weighted sum of V. Float32
// tiles are read where they lie; bfloat16 tiles are widened once into scratch and shared by the group.

// Where the tokens [first, first + count) of a row lie, in elements from the start of a cache.
inline void locate(const Attention& a, int row, int first, int count, int64_t* offset) {
    const int32_t* table = a.block_table + row * a.table_stride;
    for (int n = 0; n < count; ++n) {
        const int position = first + n;
        const int64_t slot = int64_t{table[position / a.block_size]} * a.block_size + position % a.block_size;
        offset[n] = slot * a.token_stride();
    }
}

// Rows of floats: a float32 tile in place.
inline void widen(const float* base, const int64_t* offset, int count, int, float*, const float** rows) {
    for (int n = 0; n < count; ++n) rows[n] = base + offset[n];
}

// Rows of floats: a bfloat16 tile copied into `memory` [count, head_dim].
inline void widen(const BFloat16* base, const int64_t* offset, int count, int head_dim, float* memory,
                  const float** rows) {
    for (int n = 0; n < count; ++n) {
        float* row = memory + n * head_dim;
        for (int d = 0; d < head_dim; d += LANES) store(row + d, load(base + offset[n] + d));
        rows[n] = row;
    }
}

// scores[g][n] = q[g] · rows[n]. The rows past `count` up to a whole vector repeat the last one.
inline void dot_products(const float* q, int group, int head_dim, const float** rows, int count, float* scores) {
    for (int n = 0; n < count; n += LANES) {
        const float* row[LANES];
        for (int i = 0; i < LANES; ++i) row[i] = rows[n + i < count ? n + i : count - 1];
        for (int g = 0; g < group; ++g) {
            Floats dot[LANES] = {};
            for (int d = 0; d < head_dim; d += LANES) {
                const Floats query = load(q + g * head_dim + d);
                for (int i = 0; i < LANES; ++i) dot[i] += query * load(row[i] + d);
            }
            store(scores + g * TILE_TOKENS + n, sum_each(dot));
        }
    }
}

// Turns TILE_TOKENS scores, of which the first `valid` count, into weights 2^(score - maximum), 0 elsewhere.
// Updates the running maximum and sum; returns the factor that what was accumulated before must take.
inline float soften(float* scores, int valid, float* running_maximum, float* running_sum) {
    const Floats never = splat(-1e38f);
    Floats most = never;
    for (int n = 0; n < TILE_TOKENS; n += LANES) {
        const Floats masked = lane_index() + n < valid ? load(scores + n) : never;
        store(scores + n, masked);
        most = maximum(most, masked);
    }
    const float before = *running_maximum;
    const float now = maximum(most) > before ? maximum(most) : before;
    Floats total = {};
    for (int n = 0; n < TILE_TOKENS; n += LANES) {
        const Floats weight = exp2(load(scores + n) - now);
        store(scores + n, weight);
        total += weight;
    }
    const float factor = exp2(splat(before - now))[0];
    *running_maximum = now;
    *running_sum = *running_sum * factor + sum(total);
    return factor;
}

// out[0..C·LANES) = out · factor + Σ weights[n] · rows[n][0..C·LANES).
template <int C>
inline void weighted_sum(const float* weights, const float** rows, int offset, int count, float factor, float* out) {
    Floats accumulated[C];
    for (int c = 0; c < C; ++c) accumulated[c] = load(out + c * LANES) * factor;
    for (int n = 0; n < count; ++n) {
        const Floats weight = splat(weights[n]);
        for (int c = 0; c < C; ++c) accumulated[c] += weight * load(rows[n] + offset + c * LANES);
    }
    for (int c = 0; c < C; ++c) store(out + c * LANES, accumulated[c]);
}

inline void weighted_sums(const float* weights, const float** rows, int count, int head_dim, float factor, float* out) {
    int d = 0;
    for (; d + 8 * LANES <= head_dim; d += 8 * LANES) weighted_sum<8>(weights, rows, d, count, factor, out + d);
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) weighted_sum<4>(weights, rows, d, count, factor, out + d);
    for (; d < head_dim; d += LANES) weighted_sum<1>(weights, rows, d, count, factor, out + d);
}

// Queries in float32, times the scale and log2(e), so that the softmax is in powers of two.
template <class T>
inline void scaled_queries(const T* q, int64_t size, float scale, float* out) {
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(q + i) * (scale * LOG2_E));
}

inline int64_t decode_scratch(const Attention& a) {
    return int64_t{a.num_heads} * a.head_dim + int64_t{a.group()} * TILE_TOKENS + int64_t{TILE_TOKENS} * a.head_dim;
}

// The part of its KV heads of the partial [heads, head_dim + 2] of one split: accumulators, then the maximum and the sum.
template <class T>
void decode_split(const Attention& a, const Split& split, float* partial, float* scratch) {
    const int group = a.group(), head_dim = a.head_dim, stride = head_dim + 2;
    float* q = scratch;
    float* scores = q + int64_t{a.num_heads} * head_dim;
    float* widened = scores + int64_t{group} * TILE_TOKENS;
    const int first_head = split.kv_begin * group, last_head = split.kv_end * group;
    const int64_t skipped = int64_t{first_head} * head_dim;
    scaled_queries(static_cast<const T*>(a.q) + split.row * a.q_stride + skipped,
                   int64_t{last_head - first_head} * head_dim, a.scale, q + skipped);
    for (int h = first_head; h < last_head; ++h) {
        for (int d = 0; d < head_dim; ++d) partial[h * stride + d] = 0;
        partial[h * stride + head_dim] = -1e38f;
        partial[h * stride + head_dim + 1] = 0;
    }
    for (int first = split.begin; first < split.end; first += TILE_TOKENS) {
        const int count = split.end - first < TILE_TOKENS ? split.end - first : TILE_TOKENS;
        int64_t offset[TILE_TOKENS];
        const float* rows[TILE_TOKENS];
        locate(a, split.row, first, count, offset);
        for (int kv_head = split.kv_begin; kv_head < split.kv_end; ++kv_head) {
            const int64_t start = int64_t{kv_head} * head_dim;
            widen(static_cast<const T*>(a.k) + start, offset, count, head_dim, widened, rows);
            dot_products(q + kv_head * group * head_dim, group, head_dim, rows, count, scores);
            float* heads = partial + int64_t{kv_head} * group * stride;
            widen(static_cast<const T*>(a.v) + start, offset, count, head_dim, widened, rows);
            for (int g = 0; g < group; ++g) {
                float* out = heads + g * stride;
                const float rescale = soften(scores + g * TILE_TOKENS, count, out + head_dim, out + head_dim + 1);
                weighted_sums(scores + g * TILE_TOKENS, rows, count, head_dim, rescale, out);
            }
        }
    }
}

// The output of a row from the partials of its splits, in their order.
template <class T>
void decode_combine(const Attention& a, int row, const float* partials, int splits) {
    const int head_dim = a.head_dim, stride = head_dim + 2;
    const int64_t size = int64_t{a.num_heads} * stride;
    T* out = static_cast<T*>(a.out) + int64_t{row} * a.num_heads * head_dim;
    for (int h = 0; h < a.num_heads; ++h, out += head_dim) {
        const float* part = partials + h * stride;
        float most = part[head_dim];
        for (int s = 1; s < splits; ++s) most = part[s * size + head_dim] > most ? part[s * size + head_dim] : most;
        float total = 0;
        for (int s = 0; s < splits; ++s) {
            total += part[s * size + head_dim + 1] * exp2(splat(part[s * size + head_dim] - most))[0];
        }
        for (int d = 0; d < head_dim; d += LANES) {
            Floats value = {};
            for (int s = 0; s < splits; ++s) {
                value += load(part + s * size + d) * exp2(splat(part[s * size + head_dim] - most));
            }
            store(out + d, value / total);
        }
    }
}

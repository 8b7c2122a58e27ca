// Decode: one query token a row. Included by each isa_*.cc inside its namespace, after simd.h.
//
// A tile of up to TILE_TOKENS tokens at a time, for each KV head: scores of the group's heads by dot
// products, then the online softmax (Milakov and Gimelshein, 2018), then the weighted sum of V, which reads a row once
// for several heads. A tile is read where it lies, except bfloat16 keys without bfloat16 products, which are widened
// once into scratch. While a tile is computed the next one is fetched: 6.1 → 8.5 GB/s of bfloat16 from memory.

// Where the tokens [first, first + count) of a row lie, in elements from the start of a cache.
inline void locate(const Attention& a, int row, int first, int count, int64_t* offset) {
    if (count <= 0) return;
    const int32_t* block = a.block_table + row * a.table_stride + first / a.block_size;
    int within = first % a.block_size;
    int64_t slot = int64_t{*block} * a.block_size + within;
    for (int n = 0; n < count; ++n, ++within, ++slot) {
        if (within == a.block_size) slot = int64_t{*++block} * a.block_size, within = 0;
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

// The offsets of a tile and of the next one of the row, which is fetched line by line while this one is computed: a
// burst of prefetches stalls the loads behind it. Tokens that are not there repeat one that is.
struct Tile {
    const int64_t* offset;
    const int64_t* next;
    int count;
};

// Into the first-level cache, or, of the processors that have these products and no tiles, the second: a tile of the next
// tokens fills the first one of a Zen 4 (bfloat16, 1 × 8,000, one core: 885 → 633 µs).
#if defined(TOKENSPEED_BFLOAT16_PRODUCTS) && !defined(TOKENSPEED_TILES)
constexpr int NEAR = 2;
#else
constexpr int NEAR = 3;
#endif
template <int BYTES>
inline void fetch(const void* p) {
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line, 0, NEAR);
}

// Queries in float32, times the scale and log2(e), so that the softmax is in powers of two.
template <class T>
inline void scaled_queries(const T* q, int64_t size, float scale, float* out) {
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(q + i) * (scale * LOG2_E));
}

// scores[g][n] = q[g] · key n for the heads of one KV head, times the scale and log2(e).
template <class T>
struct Scores {
    struct Held {};  // what a thread must hold meanwhile

    // Floats of scratch for the queries of one KV head.
    static int64_t query_size(const Attention& a) { return int64_t{a.group()} * a.head_dim; }

    // Queries of so many KV heads as tile() takes them.
    static void queries(const Attention& a, const T* q, int kv_heads, float* out) {
        scaled_queries(q, kv_heads * query_size(a), a.scale, out);
    }

    static void tile(const Attention& a, const float* q, const T* keys, const Tile& t, float* widened, float* scores) {
        const int head_dim = a.head_dim, group = a.group();
        const float* rows[TILE_TOKENS];
        widen(keys, t.offset, (t.count + LANES - 1) / LANES * LANES, head_dim, widened, rows);
        for (int n = 0; n < t.count; n += LANES) {
            for (int g = 0; g < group; ++g) {
                Floats dot[LANES] = {};
                for (int d = 0; d < head_dim; d += LANES) {
                    const Floats query = load(q + g * head_dim + d);
                    for (int i = 0; i < LANES; ++i) dot[i] = fused(query, load(rows[n + i] + d), dot[i]);
                    if (g > 0) continue;
                    for (int i = 0; i < LANES; ++i) fetch<LANES * sizeof(T)>(keys + t.next[n + i] + d);
                }
                store(scores + g * TILE_TOKENS + n, sum_each(dot));
            }
        }
    }
};

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
    const float before = *running_maximum, here = largest(most);
    const float now = here > before ? here : before;
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

// V vectors of a row: in pairs of vectors where there are two, and of those bfloat16 as its even and its odd
// elements, which are widened without a shuffle; in_order() gives a pair back its order.
template <int V>
inline void read_vectors(const float* p, Floats* x) {
    for (int v = 0; v < V; ++v) x[v] = load(p + v * LANES);
}
template <int V>
inline void read_vectors(const BFloat16* p, Floats* x) {
    if constexpr (V == 1) {
        x[0] = load(p);
    } else {
        for (int v = 0; v < V; v += 2) {
            Words pairs;
            __builtin_memcpy(&pairs, p + v * LANES, sizeof pairs);
            x[v] = bit_copy<Floats>(pairs << 16);
            x[v + 1] = bit_copy<Floats>(pairs & 0xffff0000u);
        }
    }
}

inline void in_order(const float*, float*, int) {}
inline void in_order(const BFloat16*, float* sums, int head_dim) {
    for (int d = 0; d + 2 * LANES <= head_dim; d += 2 * LANES) {
        Floats even = load(sums + d), odd = load(sums + d + LANES);
        interleave(even, odd, AllLanes{});
        store(sums + d, even), store(sums + d + LANES, odd);
    }
}

// sums[h][0..V·LANES) = sums · factor[h] + Σ weights[h][n] · row n of `values`, for H heads, which share what is read.
template <int V, int H, class T>
inline void weighted_sum(const float* weights, const float* factor, const T* values, const Tile& t, float* sums,
                         int stride) {
    Floats accumulated[H][V];
    for (int h = 0; h < H; ++h) {
        for (int v = 0; v < V; ++v) accumulated[h][v] = load(sums + h * stride + v * LANES) * factor[h];
    }
    for (int n = 0; n < t.count; ++n) {
        Floats row[V];
        read_vectors<V>(values + t.offset[n], row);
        fetch<V * LANES * sizeof(T)>(values + t.next[n]);
        for (int h = 0; h < H; ++h) {
            const Floats weight = splat(weights[h * TILE_TOKENS + n]);
            for (int v = 0; v < V; ++v) accumulated[h][v] = fused(weight, row[v], accumulated[h][v]);
        }
    }
    for (int h = 0; h < H; ++h) {
        for (int v = 0; v < V; ++v) store(sums + h * stride + v * LANES, accumulated[h][v]);
    }
}

constexpr int HEADS = LANES == 16 ? 4 : 2;  // sums of so many heads and of four vectors of each fit in the registers

// The same for a group of heads and whole rows. Heads are cut evenly.
template <class T>
inline void weighted_sums(const float* weights, const float* factor, int group, const T* values, const Tile& t,
                          int head_dim, float* sums, int stride) {
    const int steps = (group + HEADS - 1) / HEADS;
    int d = 0;
    const auto strip = [&](auto width) {
        constexpr int V = decltype(width)::value;
        for (; d + V * LANES <= head_dim; d += V * LANES) {
            for (int step = 0; step < steps; ++step) {
                const int h = group * step / steps;
                const auto run = [&](auto heads) {
                    weighted_sum<V, decltype(heads)::value>(weights + h * TILE_TOKENS, factor + h, values + d, t,
                                                            sums + h * stride + d, stride);
                };
                const int together = group * (step + 1) / steps - h;
                if constexpr (HEADS == 4) {
                    if (together == 4) run(Width<4>{});
                    if (together == 3) run(Width<3>{});
                }
                if (together == 2) run(Width<2>{});
                if (together == 1) run(Width<1>{});
            }
        }
    };
    strip(Width<4>{});
    strip(Width<2>{});
    strip(Width<1>{});
}

template <class T>
int64_t decode_scratch(const Attention& a) {
    const int64_t queries = a.num_kv_heads * Scores<T>::query_size(a);
    return queries + int64_t{a.group()} * (TILE_TOKENS + 1) + int64_t{TILE_TOKENS} * a.head_dim;
}

// The part of its KV heads of the partial [heads, head_dim + 2] of one split: accumulators, maximum and sum.
template <class T>
void decode_split(const Attention& a, const Split& split, float* partial, float* scratch) {
    const int group = a.group(), head_dim = a.head_dim, stride = head_dim + 2;
    const int64_t query_size = Scores<T>::query_size(a);
    float* q = scratch;
    float* widened = scratch + a.num_kv_heads * query_size;
    float* scores = widened + int64_t{TILE_TOKENS} * head_dim;
    float* factor = scores + int64_t{group} * TILE_TOKENS;
    const int first_head = split.kv_begin * group, last_head = split.kv_end * group;
    const T* k = static_cast<const T*>(a.k);
    const T* v = static_cast<const T*>(a.v);
    Scores<T>::queries(a, static_cast<const T*>(a.q) + split.row * a.q_stride + int64_t{first_head} * head_dim,
                       split.kv_end - split.kv_begin, q + split.kv_begin * query_size);
    for (int h = first_head; h < last_head; ++h) {
        for (int d = 0; d < head_dim; ++d) partial[h * stride + d] = 0;
        partial[h * stride + head_dim] = -1e38f;
        partial[h * stride + head_dim + 1] = 0;
    }
    [[maybe_unused]] const typename Scores<T>::Held held;
    int64_t offsets[2][TILE_TOKENS];
    const auto tile_at = [&](int first, int end, int64_t* offset) {
        const int left = end - first, count = left < TILE_TOKENS ? left : TILE_TOKENS;
        locate(a, split.row, first, count, offset);
        for (int n = count; n < TILE_TOKENS; ++n) offset[n] = offset[0];
        return count;
    };
    int64_t *offset = offsets[0], *next = offsets[1];
    int count = tile_at(split.begin, split.end, offset);
    for (int first = split.begin; first < split.end; first += TILE_TOKENS) {
        const int after = first + count, end = after < split.end ? split.end : split.ahead;
        const int next_count = after < end ? tile_at(after, end, next) : 0;
        const Tile tile = {offset, next_count == 0 ? offset : next, count};
        for (int kv_head = split.kv_begin; kv_head < split.kv_end; ++kv_head) {
            const int64_t start = int64_t{kv_head} * head_dim;
            Scores<T>::tile(a, q + kv_head * query_size, k + start, tile, widened, scores);
            float* heads = partial + int64_t{kv_head} * group * stride;
            for (int g = 0; g < group; ++g) {
                float* state = heads + g * stride + head_dim;
                factor[g] = soften(scores + g * TILE_TOKENS, count, state, state + 1);
            }
            weighted_sums(scores, factor, group, v + start, tile, head_dim, heads, stride);
        }
        int64_t* const before = offset;
        offset = next, next = before, count = next_count;
    }
    for (int h = first_head; h < last_head; ++h) in_order(v, partial + h * stride, head_dim);
}

// The output of a row from the partials of its splits, in their order. A partial's maximum becomes its weight.
template <class T>
void decode_combine(const Attention& a, int row, float* partials, int splits) {
    const int head_dim = a.head_dim, stride = head_dim + 2;
    const int64_t size = int64_t{a.num_heads} * stride;
    T* out = static_cast<T*>(a.out) + int64_t{row} * a.num_heads * head_dim;
    for (int h = 0; h < a.num_heads; ++h, out += head_dim) {
        float* part = partials + h * stride;
        float most = part[head_dim];
        for (int s = 1; s < splits; ++s) most = part[s * size + head_dim] > most ? part[s * size + head_dim] : most;
        float total = 0;
        for (int s = 0; s < splits; ++s) {
            float* state = part + s * size + head_dim;
            state[0] = exp2(splat(state[0] - most))[0];
            total += state[0] * state[1];
        }
        for (int d = 0; d < head_dim; d += LANES) {
            Floats value = {};
            for (int s = 0; s < splits; ++s) {
                value = fused(load(part + s * size + d), splat(part[s * size + head_dim]), value);
            }
            store(out + d, value / total);
        }
    }
}

// Prefill of bfloat16 where pairs of numbers are multiplied. Included by each isa_*.cc that does so inside its
// namespace, after attention_prefill.h and attention_columns.h or attention_tiles.h, whose multiply_columns it uses.
//
// A tile of keys and values is packed once for all query rows, and weights are multiplied as bfloat16: a weight is then
// off by up to 2^-9 of itself, an output by 2.8e-3 of its size where one in float32 has 2.0e-3, most of which is the
// rounding of the result.

constexpr int PAIR_TOKENS = 128;  // KV tokens between two rescalings

// A matrix lies in tiles: a left factor in 16 rows × 16 pairs of columns, a right factor in 16 pairs of rows ×
// 16 columns, a product in 16 × 16; each 1 KiB without a gap, those of one sum one behind the other.

// Keys of `tokens` tokens, a multiple of 16 → tiles (of 16 tokens, of 16 pairs).
inline void pack_keys(const BFloat16* base, const int64_t* offset, int tokens, int head_dim, float* keys) {
    for (int n = 0; n < tokens; n += SIDE) {
        for (int d = 0; d < head_dim; d += 2 * SIDE, keys += TILE_WORDS) {
            Floats square[LANES];
            for (int i = 0; i < SIDE; ++i) {
                square[i] = bit_copy<Floats>(pair_words(base + offset[n + i] + d, head_dim - d));
            }
            transpose(square);
            for (int i = 0; i < SIDE; ++i) store(keys + i * SIDE, square[i]);
        }
    }
}

// Values of `tokens` tokens, a multiple of 32 → tiles (of 16 columns, of 16 pairs of tokens). Of 32 columns the even
// ones are a tile and the odd ones the next, as in read_vectors().
inline void pack_values(const BFloat16* base, const int64_t* offset, int tokens, int head_dim, float* values) {
    constexpr int64_t NEXT = int64_t{PAIR_TOKENS} / (2 * SIDE) * TILE_WORDS;  // tile of columns
    for (int n = 0; n < tokens; n += 2, values += SIDE) {
        const BFloat16 *a = base + offset[n], *b = base + offset[n + 1];
        float* to = values;
        int d = 0;
        for (; d + 2 * SIDE <= head_dim; d += 2 * SIDE, to += 2 * NEXT) {
            const Words first = pair_words(a + d, 2 * SIDE), second = pair_words(b + d, 2 * SIDE);
            store(to, bit_copy<Floats>((first & 0xffff) | (second << 16)));
            store(to + NEXT, bit_copy<Floats>((first >> 16) | (second & 0xffff0000u)));
        }
        if (d == head_dim) continue;
        Halves first, second;
        __builtin_memcpy(&first, a + d, sizeof first);
        __builtin_memcpy(&second, b + d, sizeof second);
        const Words low = __builtin_convertvector(first, Words), high = __builtin_convertvector(second, Words);
        store(to, bit_copy<Floats>(low | (high << 16)));
    }
}

// 2^x for x ≤ 0, of which bfloat16 is kept: a cubic fitted on [0, 1), relative error 7.5e-5.
inline Floats rough_exp2(Floats x) {
    const __m512 whole = bit_copy<__m512>(x);
    const Floats r = bit_copy<Floats>(_mm512_maskz_reduce_ps(0xffff, whole, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    Floats p = fused(splat(7.802452222e-2f), r, splat(2.260671711e-1f));
    p = fused(p, r, splat(6.958335265e-1f));
    p = fused(p, r, splat(9.999252208e-1f));
    return bit_copy<Floats>(_mm512_maskz_scalef_ps(0xffff, bit_copy<__m512>(p), whole));
}

// Lane i of the result is the largest lane of x[i].
template <int S = 1>
inline Floats largest_each(Floats* x) {
    for (int i = 0; i < LANES; i += 2 * S) {
        x[i] = maximum(low<S>(x[i], x[i + S], AllLanes{}), high<S>(x[i], x[i + S], AllLanes{}));
    }
    if constexpr (S * 2 < LANES) {
        return largest_each<S * 2>(x);
    } else {
        return x[0];
    }
}

// soften() of 16 rows in tiles: scores of `tiles` × 16 tokens, an even number, become weights in pairs. Of row i the
// first valid[i] count.
template <bool MASKED>
inline Floats soften_tiles(const float* scores, int tiles, const int32_t* valid, float scale, float* running_maximum,
                           float* running_sum, float* weights) {
    const Floats never = splat(-1e38f);
    Floats row[SIDE];
    for (int i = 0; i < SIDE; ++i) {
        row[i] = never;
        for (int t = 0; t < tiles; ++t) {
            Floats x = load(scores + t * TILE_WORDS + i * SIDE);
            if constexpr (MASKED) x = lane_index() + t * SIDE < valid[i] ? x : never;
            row[i] = maximum(row[i], x);
        }
    }
    const Floats before = load(running_maximum), now = maximum(before, largest_each(row) * scale);
    store(running_maximum, now);
    for (int i = 0; i < SIDE; ++i) {
        const Floats most = splat(running_maximum[i]);
        row[i] = Floats{};
        for (int t = 0; t < tiles; t += 2) {
            Floats w[2];
            for (int j = 0; j < 2; ++j) {
                w[j] = rough_exp2(load(scores + (t + j) * TILE_WORDS + i * SIDE) * scale - most);
                if constexpr (MASKED) w[j] = lane_index() + (t + j) * SIDE < valid[i] ? w[j] : Floats{};
                row[i] += w[j];
            }
            const __m512bh pairs = _mm512_cvtne2ps_pbh(bit_copy<__m512>(w[1]), bit_copy<__m512>(w[0]));
            store(weights + t / 2 * TILE_WORDS + i * SIDE, bit_copy<Floats>(pairs));
        }
    }
    const Floats factor = exp2(before - now);  // exactly 1 where the maximum stays: it is applied once a tile
    store(running_sum, fused(load(running_sum), factor, sum_each(row)));
    return factor;
}

// c (from zero, or from itself) += the `depth` tiles of 16 rows at a times those of each of `columns` tiles of columns
// at b, b_stride words apart.
template <bool ACCUMULATE>
inline void multiply_block(const float* a, const float* b, int64_t b_stride, int depth, int columns, float* c) {
    const auto strip = [&](auto width) {
        constexpr int V = decltype(width)::value;
        for (; columns >= V; columns -= V, b += V * b_stride, c += V * TILE_WORDS) {
            multiply_columns<V, ACCUMULATE>(a, b, b_stride, depth, c);
        }
    };
    strip(Width<4>{});
    strip(Width<2>{});
    strip(Width<1>{});
}

template <>
constexpr int prefill_rows<BFloat16>() {
    return 768;  // with 128 numbers each they take 600 KB
}

// What a task has of its query rows, in blocks of 16: row m of a block is row m of each of its tiles.
struct Rows {
    int64_t rows, depth, columns;  // rows in whole blocks; tiles of queries and of results a block
    float* q;
    float* out;
    float* keys;
    float* values;
    float* scores;
    float* weights;
    float* running_maximum;
    float* running_sum;
    int32_t* visible;  // tokens that a row sees
    int64_t size = 0;  // of the memory

    // Queries of query_size numbers each, results of out_size.
    Rows(int count, int query_size, int out_size, float* memory)
        : rows((count + SIDE - 1) / SIDE * SIDE), depth(vectors_of_pairs(query_size)), columns(out_size / SIDE) {
        const auto take = [&](int64_t floats) {
            size += floats;
            return memory == nullptr ? nullptr : memory + size - floats;
        };
        q = take(rows * depth * SIDE), out = take(rows * columns * SIDE);
        keys = take(PAIR_TOKENS * depth * SIDE), values = take(PAIR_TOKENS / 2 * columns * SIDE);
        scores = take(PAIR_TOKENS * SIDE), weights = take(PAIR_TOKENS / 2 * SIDE);
        running_maximum = take(rows), running_sum = take(rows);
        visible = reinterpret_cast<int32_t*>(take(rows));
    }

    // Row m. The maximum is taken before scores are scaled: a negative scale turns the query instead.
    void enter(int m, const BFloat16* from, int query_size, float scale, int sees) const {
        const uint32_t sign = scale < 0 ? 0x80008000u : 0;
        float* to = q_block(m / SIDE) + m % SIDE * SIDE;
        for (int d = 0; d < query_size; d += 2 * SIDE, to += TILE_WORDS) {
            store(to, bit_copy<Floats>(pair_words(from + d, query_size - d) ^ sign));
        }
        visible[m] = sees;
        running_maximum[m] = -1e38f, running_sum[m] = 0;
    }
    void clear() const {
        for (int64_t i = 0; i < rows * columns * SIDE; i += LANES) store(out + i, Floats{});
    }
    // Its sums over `total`, in the order of the numbers of the values.
    template <class To>
    void leave(int m, float total, To* to) const {
        const float* sums = out_block(m / SIDE) + m % SIDE * SIDE;
        const Floats all = splat(total);
        int64_t i = 0;
        for (; i + 2 <= columns; i += 2, sums += 2 * TILE_WORDS) {
            Floats even = load(sums) / all, odd = load(sums + TILE_WORDS) / all;
            interleave(even, odd, AllLanes{});
            store(to + i * SIDE, even), store(to + (i + 1) * SIDE, odd);
        }
        if (i < columns) store(to + i * SIDE, load(sums) / all);
    }
    float* q_block(int block) const { return q + block * depth * TILE_WORDS; }
    float* out_block(int block) const { return out + block * columns * TILE_WORDS; }
};

template <>
int64_t prefill_scratch<BFloat16>(const Attention& a) {
    constexpr int most = prefill_rows<BFloat16>();
    return Rows(a.group() > most ? a.group() : most, a.head_dim, a.head_dim, nullptr).size;
}

inline void enter_rows(const Attention& a, const QueryTile& tile, int count, const Rows& r) {
    const int group = a.group(), head_dim = a.head_dim;
    const BFloat16* first = static_cast<const BFloat16*>(a.q) + int64_t{tile.kv_head} * group * head_dim;
    for (int m = 0; m < r.rows; ++m) {
        const int row = m < count ? m : count - 1, t = row / group;
        const BFloat16* from = first + (tile.begin + t) * a.q_stride + int64_t{row % group} * head_dim;
        r.enter(m, from, head_dim, a.scale, tile.visible + t);
    }
    r.clear();
}

inline void leave_rows(const Attention& a, const QueryTile& tile, int count, const Rows& r) {
    const int group = a.group(), head_dim = a.head_dim;
    BFloat16* first = static_cast<BFloat16*>(a.out) + int64_t{tile.kv_head} * group * head_dim;
    for (int m = 0; m < count; ++m) {
        r.leave(m, r.running_sum[m], first + (int64_t{tile.begin + m / group} * a.num_heads + m % group) * head_dim);
    }
}

// The sums of a block, so many tiles, times a factor of each row.
inline void rescale(Floats factor, int64_t columns, float* sums) {
    if (!(largest(splat(1.f) - factor) > 0)) return;
    float factors[SIDE];
    store(factors, factor);
    for (int64_t i = 0; i < columns * TILE_WORDS; i += SIDE) store(sums + i, load(sums + i) * factors[i / SIDE % SIDE]);
}

// One block of rows against the packed keys and values of the tokens [first, first + count).
inline void attend(const Rows& r, int block, int first, int count, float scale) {
    int32_t valid[SIDE];
    for (int i = 0; i < SIDE; ++i) valid[i] = r.visible[block * SIDE + i] - first;
    if (valid[SIDE - 1] <= 0) return;  // wholly behind the causal edge
    const int seen = valid[SIDE - 1] < count ? valid[SIDE - 1] : count, depth = vectors_of_pairs(seen);
    const int64_t width = r.depth * TILE_WORDS;
    multiply_block<false>(r.q_block(block), r.keys, width, static_cast<int>(r.depth), 2 * depth, r.scores);
    float* most = r.running_maximum + block * SIDE;
    float* total = r.running_sum + block * SIDE;
    const Floats factor = valid[0] < 2 * SIDE * depth
                              ? soften_tiles<true>(r.scores, 2 * depth, valid, scale, most, total, r.weights)
                              : soften_tiles<false>(r.scores, 2 * depth, valid, scale, most, total, r.weights);
    rescale(factor, r.columns, r.out_block(block));
    multiply_block<true>(r.weights, r.values, PAIR_TOKENS / 2 * SIDE, depth, static_cast<int>(r.columns),
                         r.out_block(block));
}

template <>
void prefill_tile<BFloat16>(const Attention& a, const QueryTile& tile, float* scratch) {
    const int head_dim = a.head_dim, rows = (tile.end - tile.begin) * a.group();
    const Rows r(rows, head_dim, head_dim, scratch);
    enter_rows(a, tile, rows, r);
    const float scale = (a.scale < 0 ? -a.scale : a.scale) * LOG2_E;
    const BFloat16* k = static_cast<const BFloat16*>(a.k) + int64_t{tile.kv_head} * head_dim;
    const BFloat16* v = static_cast<const BFloat16*>(a.v) + int64_t{tile.kv_head} * head_dim;
    const int last_visible = tile.visible + (tile.end - tile.begin) - 1;
    // Weights of tokens behind the last one are 0, but what is read for them must be a number.
    int64_t offsets[2][PAIR_TOKENS] = {};
    const auto locate_tile = [&](int first, int64_t* offset) {
        const int left = last_visible - first, count = left < PAIR_TOKENS ? left : PAIR_TOKENS;
        if (count > 0) locate(a, tile.row, first, count, offset);
        for (int n = count < 0 ? 0 : count; n < PAIR_TOKENS; ++n) offset[n] = offset[0];
        return count;
    };
    [[maybe_unused]] const ColumnProducts held;
    int64_t *offset = offsets[0], *next = offsets[1];
    int count = locate_tile(0, offset);
    for (int first = 0; first < last_visible; first += PAIR_TOKENS) {
        const int padded = vectors_of_pairs(count) * 2 * SIDE;
        pack_keys(k, offset, padded, head_dim, r.keys);
        pack_values(v, offset, padded, head_dim, r.values);
        count = locate_tile(first + PAIR_TOKENS, next);
        for (int block = 0; block < r.rows / SIDE; ++block) {
            for (int n = block * SIDE; n < (block + 1) * SIDE && n < PAIR_TOKENS; ++n) {
                for (int d = 0; d < head_dim; d += 2 * SIDE) fetch<64>(k + next[n] + d), fetch<64>(v + next[n] + d);
            }
            attend(r, block, first, padded, scale);
        }
        int64_t* const before = offset;
        offset = next, next = before;
    }
    leave_rows(a, tile, rows, r);
}

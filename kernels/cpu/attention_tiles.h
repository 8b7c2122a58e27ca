// Attention of bfloat16 in AMX tiles. Included by isa_amx.cc inside its namespace, after attention_prefill.h,
// attention_pairs.h and pair_tiles.h.
//
// Decode multiplies keys as they lie. Prefill packs a tile of keys and values once for all query rows, and
// multiplies weights as bfloat16: a weight is then off by up to 2^-9 of itself, an output by 2.8e-3 of its size where
// one in float32 has 2.0e-3, most of which is the rounding of the result.

constexpr int TILE_WORDS = SIDE * SIDE;
constexpr int PAIR_TOKENS = 128;  // KV tokens between two rescalings in prefill

template <>
struct Scores<BFloat16> {
    struct Held {
        Tiles tiles{SIDE};
    };

    // Whether 16 tokens are rows of a tile where they lie. Reading tokens of a block that are not there does no harm,
    // since a row of a product depends on no other row; in a column it would.
    static bool in_place(const Attention& a) { return a.head_dim % (2 * SIDE) == 0 && a.block_size % SIDE == 0; }

    static int64_t query_size(const Attention& a) {
        if (!in_place(a)) return PairScores::query_size(a);
        return int64_t{(a.group() + SIDE - 1) / SIDE} * SIDE * (a.head_dim / 2);
    }

    // Tiles of 16 pairs × 16 heads, zeros for heads that are not there.
    static void queries(const Attention& a, const BFloat16* q, int kv_heads, float* out) {
        if (!in_place(a)) return PairScores::queries(a, q, kv_heads, out);
        const int group = a.group(), pairs = a.head_dim / 2;
        for (int h = 0; h < kv_heads; ++h, q += group * a.head_dim, out += query_size(a)) {
            for (int64_t i = 0; i < query_size(a); i += LANES) store(out + i, Floats{});
            for (int g = 0; g < group; ++g) {
                float* column = out + g / SIDE * SIDE * pairs + g % SIDE;
                const BFloat16* from = q + g * a.head_dim;
                for (int p = 0; p < pairs; ++p) __builtin_memcpy(column + p * SIDE, from + 2 * p, sizeof(float));
            }
        }
    }

    static void tile(const Attention& a, const float* q, const BFloat16* keys, const Tile& t, float* products,
                     float* scores) {
        if (!in_place(a)) return PairScores::tile(a, q, keys, t, scores);
        static_assert(TILE_TOKENS == 4 * SIDE);
        const int group = a.group(), depth = a.head_dim / (2 * SIDE);
        for (int g = 0; g < group; g += SIDE, q += depth * TILE_WORDS) {
            each<4>([](auto i) { tile_zero<i.value>(); });
            for (int d = 0; d < depth; ++d) {
                tile_load<4>(q + d * TILE_WORDS);
                each<4>([&](auto i) {
                    constexpr int n = i.value * SIDE, LEFT = 5 + i.value % 3;
                    if (n >= t.count) return;
                    tile_load<LEFT>(keys + t.offset[n] + d * 2 * SIDE, a.token_stride() * sizeof(BFloat16));
                    tile_multiply<i.value, LEFT, 4>();
                    if (g > 0) return;
                    for (int row = 0; row < SIDE; ++row) fetch<64>(keys + t.next[n + row] + d * 2 * SIDE);
                });
            }
            each<4>([&](auto i) { tile_store<i.value>(products + i.value * TILE_WORDS); });
            const int heads = group - g < SIDE ? group - g : SIDE;
            for (int n = 0; n < t.count; n += SIDE) {
                for (int h = 0; h < heads; h += 4) {
                    Floats row[4];
                    four_columns(products + n * SIDE + h, row);
                    for (int i = 0; i < 4 && h + i < heads; ++i) {
                        store(scores + (g + h + i) * TILE_TOKENS + n, row[i] * (a.scale * LOG2_E));
                    }
                }
            }
        }
    }

    // Four columns of a product as rows.
    static void four_columns(const float* product, Floats* row) {
        Floats x[4];  // x[i]: four numbers of each of the rows i, 4 + i, 8 + i and 12 + i
        for (int i = 0; i < 4; ++i) {
            const auto quarter = [&](int n) { return _mm_loadu_ps(product + (n * 4 + i) * SIDE); };
            __m512 four = _mm512_maskz_broadcast_f32x4(0x000f, quarter(0));
            four = _mm512_mask_broadcast_f32x4(four, 0x00f0, quarter(1));
            four = _mm512_mask_broadcast_f32x4(four, 0x0f00, quarter(2));
            x[i] = bit_copy<Floats>(_mm512_mask_broadcast_f32x4(four, 0xf000, quarter(3)));
        }
        const Floats a = low<1>(x[0], x[1], AllLanes{}), b = high<1>(x[0], x[1], AllLanes{});
        const Floats c = low<1>(x[2], x[3], AllLanes{}), d = high<1>(x[2], x[3], AllLanes{});
        row[0] = low<2>(a, c, AllLanes{}), row[1] = low<2>(b, d, AllLanes{});
        row[2] = high<2>(a, c, AllLanes{}), row[3] = high<2>(b, d, AllLanes{});
    }
};

// Prefill. A matrix lies in tiles: a left factor in 16 rows × 16 pairs of columns, a right factor in 16 pairs of rows ×
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

// V tiles of columns: tiles 0 … V−1 are sums, 4 of a, 5 of b.
template <int V, bool ACCUMULATE>
inline void multiply_columns(const float* a, const float* b, int64_t b_stride, int depth, float* c) {
    each<V>([&](auto v) {
        if constexpr (ACCUMULATE) {
            tile_load<v.value>(c + v.value * TILE_WORDS);
        } else {
            tile_zero<v.value>();
        }
    });
    for (int t = 0; t < depth; ++t, a += TILE_WORDS, b += TILE_WORDS) {
        tile_load<4>(a);
        each<V>([&](auto v) {
            constexpr int RIGHT = 5 + v.value % 3;
            tile_load<RIGHT>(b + v.value * b_stride);
            tile_multiply<v.value, 4, RIGHT>();
        });
    }
    each<V>([&](auto v) { tile_store<v.value>(c + v.value * TILE_WORDS); });
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

    Rows(const Attention& a, int count, float* memory)
        : rows((count + SIDE - 1) / SIDE * SIDE), depth(vectors_of_pairs(a.head_dim)), columns(a.head_dim / SIDE) {
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

    float* q_block(int block) const { return q + block * depth * TILE_WORDS; }
    float* out_block(int block) const { return out + block * columns * TILE_WORDS; }
};

template <>
int64_t prefill_scratch<BFloat16>(const Attention& a) {
    constexpr int most = prefill_rows<BFloat16>();
    return Rows(a, a.group() > most ? a.group() : most, nullptr).size;
}

inline void enter_rows(const Attention& a, const QueryTile& tile, int count, const Rows& r) {
    const int group = a.group(), head_dim = a.head_dim;
    const BFloat16* first = static_cast<const BFloat16*>(a.q) + int64_t{tile.kv_head} * group * head_dim;
    // The maximum is taken before scores are scaled: a negative scale turns the queries instead.
    const uint32_t sign = a.scale < 0 ? 0x80008000u : 0;
    for (int m = 0; m < r.rows; ++m) {
        const int row = m < count ? m : count - 1, t = row / group;
        const BFloat16* from = first + (tile.begin + t) * a.q_stride + int64_t{row % group} * head_dim;
        float* to = r.q_block(m / SIDE) + m % SIDE * SIDE;
        for (int d = 0; d < head_dim; d += 2 * SIDE, to += TILE_WORDS) {
            store(to, bit_copy<Floats>(pair_words(from + d, head_dim - d) ^ sign));
        }
        r.visible[m] = tile.visible + t;
        r.running_maximum[m] = -1e38f, r.running_sum[m] = 0;
    }
    for (int64_t i = 0; i < r.rows * r.columns * SIDE; i += LANES) store(r.out + i, Floats{});
}

inline void leave_rows(const Attention& a, const QueryTile& tile, int count, const Rows& r) {
    const int group = a.group(), head_dim = a.head_dim;
    BFloat16* first = static_cast<BFloat16*>(a.out) + int64_t{tile.kv_head} * group * head_dim;
    for (int m = 0; m < count; ++m) {
        BFloat16* to = first + (int64_t{tile.begin + m / group} * a.num_heads + m % group) * head_dim;
        const float* sums = r.out_block(m / SIDE) + m % SIDE * SIDE;
        const Floats total = splat(r.running_sum[m]);
        int d = 0;
        for (; d + 2 * SIDE <= head_dim; d += 2 * SIDE, sums += 2 * TILE_WORDS) {
            Floats even = load(sums) / total, odd = load(sums + TILE_WORDS) / total;
            interleave(even, odd, AllLanes{});
            store(to + d, even), store(to + d + SIDE, odd);
        }
        if (d < head_dim) store(to + d, load(sums) / total);
    }
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
    float* sums = r.out_block(block);
    if (largest(splat(1.f) - factor) > 0) {
        float factors[SIDE];
        store(factors, factor);
        for (int64_t i = 0; i < r.columns * TILE_WORDS; i += SIDE) {
            store(sums + i, load(sums + i) * factors[i / SIDE % SIDE]);
        }
    }
    multiply_block<true>(r.weights, r.values, PAIR_TOKENS / 2 * SIDE, depth, static_cast<int>(r.columns), sums);
}

template <>
void prefill_tile<BFloat16>(const Attention& a, const QueryTile& tile, float* scratch) {
    const int head_dim = a.head_dim, rows = (tile.end - tile.begin) * a.group();
    const Rows r(a, rows, scratch);
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
    const Tiles tiles(SIDE);
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

inline Kernels with_attention_tiles(Kernels kernels) {
    kernels.decode_scratch = decode_scratch<BFloat16>;
    kernels.decode_split = decode_split<BFloat16>;
    kernels.prefill_rows = prefill_rows<BFloat16>();
    kernels.prefill_scratch = prefill_scratch<BFloat16>;
    kernels.prefill_tile = prefill_tile<BFloat16>;
    return kernels;
}

// Attention of bfloat16 in AMX tiles. Included by isa_amx.cc inside its namespace, after attention_pairs.h and
// pair_tiles.h; attention_packed.h follows. Decode multiplies keys as they lie.

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

// What a thread must hold to multiply_columns.
struct ColumnProducts {
    Tiles tiles{SIDE};
};

// The products of attention_packed.h: c [V tiles] (from zero, or from itself) += the `depth` tiles of 16 rows at a
// times those of each of V tiles of columns at b. Tiles 0 … V−1 are sums, 4 of a, 5 to 7 of b.
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

// c [16 × 16, one for each 16 rows] = rows where they lie, 16 from each of `count` (≤ 4) places on, `stride` numbers
// apart, times the `depth` tiles of columns at b. Of `next`, if not null, the rows are fetched meanwhile.
inline void multiply_in_place(const BFloat16* base, const int64_t* offset, int count, int64_t stride, const float* b,
                              int depth, const int64_t* next, float* c) {
    each<4>([](auto i) { tile_zero<i.value>(); });
    for (int t = 0; t < depth; ++t) {
        tile_load<4>(b + t * TILE_WORDS);
        each<4>([&](auto i) {
            constexpr int n = i.value * SIDE, LEFT = 5 + i.value % 3;
            if (i.value >= count) return;
            tile_load<LEFT>(base + offset[n] + t * 2 * SIDE, stride * int64_t{sizeof(BFloat16)});
            tile_multiply<i.value, LEFT, 4>();
            if (next == nullptr) return;
            for (int r = 0; r < SIDE; ++r) fetch<64>(base + next[n + r] + t * 2 * SIDE);
        });
    }
    each<4>([&](auto i) {
        if (i.value < count) tile_store<i.value>(c + i.value * TILE_WORDS);
    });
}

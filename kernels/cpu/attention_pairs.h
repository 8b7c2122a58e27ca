// Decode of bfloat16 where one instruction multiplies pairs of numbers: scores from keys as they lie. Weights and
// values are multiplied in float32. Included by each isa_*.cc that has the instruction inside its namespace, after
// attention_decode.h.

constexpr int SIDE = 16;  // pairs of numbers in a vector
constexpr int TILE_WORDS = SIDE * SIDE;

inline int vectors_of_pairs(int numbers) { return (numbers + 2 * SIDE - 1) / (2 * SIDE); }

inline Floats dot_pairs(Floats sums, Words a, Words b) {
    return bit_copy<Floats>(_mm512_dpbf16_ps(bit_copy<__m512>(sums), bit_copy<__m512bh>(a), bit_copy<__m512bh>(b)));
}

// 2 · SIDE numbers, or if fewer are left, SIDE and zeros.
inline Words pair_words(const BFloat16* p, int left) {
    const __mmask32 mask = left >= 2 * SIDE ? 0xffffffff : (1u << SIDE) - 1;
    return bit_copy<Words>(_mm512_maskz_loadu_epi16(mask, p));
}

struct PairScores {
    static int64_t query_size(const Attention& a) { return int64_t{a.group()} * vectors_of_pairs(a.head_dim) * SIDE; }

    static void queries(const Attention& a, const BFloat16* q, int kv_heads, float* out) {
        for (int h = 0; h < kv_heads * a.group(); ++h, q += a.head_dim) {
            for (int d = 0; d < a.head_dim; d += 2 * SIDE, out += SIDE) {
                store(out, bit_copy<Floats>(pair_words(q + d, a.head_dim - d)));
            }
        }
    }

    static void tile(const Attention& a, const float* q, const BFloat16* keys, const Tile& t, float* scores) {
        const int whole = a.head_dim / (2 * SIDE) * (2 * SIDE), group = a.group();
        for (int n = 0; n < t.count; n += LANES) {
            const float* query = q;
            for (int g = 0; g < group; ++g) {
                Floats dot[LANES] = {};
                for (int d = 0; d < whole; d += 2 * SIDE, query += SIDE) {
                    const Words pairs = bit_copy<Words>(load(query));
                    for (int i = 0; i < LANES; ++i) {
                        dot[i] = dot_pairs(dot[i], pairs, pair_words(keys + t.offset[n + i] + d, 2 * SIDE));
                    }
                    if (g > 0) continue;
                    for (int i = 0; i < LANES; ++i) fetch<64>(keys + t.next[n + i] + d);
                }
                if (whole < a.head_dim) {
                    const Words pairs = bit_copy<Words>(load(query));
                    for (int i = 0; i < LANES; ++i) {
                        dot[i] = dot_pairs(dot[i], pairs, pair_words(keys + t.offset[n + i] + whole, SIDE));
                    }
                    query += SIDE;
                }
                store(scores + g * TILE_TOKENS + n, sum_each(dot) * (a.scale * LOG2_E));
            }
        }
    }
};

#ifndef TOKENSPEED_TILES
template <>
struct Scores<BFloat16> : PairScores {
    struct Held {};
    static void tile(const Attention& a, const float* q, const BFloat16* keys, const Tile& t, float*, float* scores) {
        PairScores::tile(a, q, keys, t, scores);
    }
};
#endif

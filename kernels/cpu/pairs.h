// Products of bfloat16 tokens with packed weights (forms.h) where one instruction multiplies pairs of numbers: y = x · weightᵀ
// + bias. Included by each isa_*.cc that has them inside its namespace, after panels.h; pair_vectors.h or pair_tiles.h
// follows, which multiply.
//
// A word of a bfloat16 panel is the pair (k, 16 + k) of a group, so tokens are put into such pairs, once, and weights are
// used as they lie: a group of a panel is 16 × 16 words. Quantised weights become words of small whole numbers, which
// bfloat16 holds exactly, for a strip of groups and all tokens; scales and minimums are applied to the group's sums in
// float32, so that a weight is the number of the file here too. An output is the same sum in the same order for any
// number of tokens beside it.
//
// Tokens lie in tiles of Pairs::rows: words [tiles, groups, rows, 16], zeros behind the last token, then, for forms with
// minimums, the tokens' sums [tiles, groups, rows].

constexpr int64_t GROUP_WORDS = GROUP / 2;
constexpr int64_t GROUP_BYTES = PANEL_ROWS * GROUP_WORDS * 4;  // a group of words
constexpr int64_t STRIP_GROUPS = 16;                          // two panels of them stay in L1
constexpr int64_t STRIP_FLOATS = STRIP_GROUPS * (GROUP_BYTES / 4 + 2 * PANEL_ROWS);

struct Pairs {
    const float* words;
    const float* sums;
    int64_t groups;
    int64_t tiles;
    int64_t tokens;
    int rows;

    Pairs(const float* packed, int64_t count, int64_t num_groups)
        : words(packed),
          sums(packed + pair_tokens(count) * num_groups * GROUP_WORDS),
          groups(num_groups),
          tiles(pair_tokens(count) / pair_rows(count)),
          tokens(count),
          rows(static_cast<int>(pair_rows(count))) {}
    const char* tile(int64_t t, int64_t group) const {
        return reinterpret_cast<const char*>(words + (t * groups + group) * rows * GROUP_WORDS);
    }
    int64_t tile_bytes() const { return groups * rows * GROUP_WORDS * 4; }
    const float* sums_of(int64_t t, int64_t group) const { return sums + (t * groups + group) * rows; }
};

// Quantised forms: head() gives what each row's sum over the group is multiplied with, and what the tokens' sum is;
// expand() the group's words. The words of four bits are 16 + value: an "or" makes them, and the 16 goes into the minimum.
template <class Scale, bool HAS_MINIMUMS>
struct NibblePairs {
    using Floats_ = Nibbles<Scale, HAS_MINIMUMS>;
    static constexpr int64_t BYTES = Floats_::BYTES;
    static constexpr bool MINIMUMS = true;

    static void head(const char* group, float* scales, float* minimums) {
        const Scale* at = reinterpret_cast<const Scale*>(group);
        const Floats scale = load(at);
        store(scales, scale);
        if constexpr (HAS_MINIMUMS) {
            store(minimums, fused(scale, splat(-16.f), load(at + PANEL_ROWS)));
        } else {
            store(minimums, scale * -24.f);
        }
    }
    static void expand(const char* group, char* to) {
        const char* words = group + (HAS_MINIMUMS ? 2 : 1) * Floats_::HEAD;
        for (int w = 0; w < 4; ++w) {
            const Words word = words_at(words + w * PANEL_ROWS * 4);
            const auto part = [&](int i, Words shifted) {
                const Words pair = (shifted & 0x00780078u) | 0x41804180u;
                __builtin_memcpy(to + (i * 4 + w) * PANEL_ROWS * 4, &pair, sizeof pair);
            };
            part(0, word << 3);
            part(1, word >> 1);
            part(2, word >> 5);
            part(3, word >> 9);
        }
    }
};

// Eight bits: converted in the upper byte of an integer, 2^24 too large.
struct BytePairs {
    static constexpr int64_t BYTES = Bytes::BYTES;
    static constexpr bool MINIMUMS = false;

    static void head(const char* group, float* scales, float*) {
        store(scales, load(reinterpret_cast<const Half*>(group)) * 0x1p-24f);
    }
    static void expand(const char* group, char* to) {
        const char* words = group + Bytes::HEAD;
        const auto number = [](Words byte) {
            return bit_copy<Words>(__builtin_convertvector(bit_copy<Ints>(byte), Floats));
        };
        for (int w = 0; w < 8; ++w) {
            const Words word = words_at(words + w * PANEL_ROWS * 4);
            const auto part = [&](int i, Words low, Words high) {
                const Words pair = number(low) >> 16 | number(high);
                __builtin_memcpy(to + (i * 8 + w) * PANEL_ROWS * 4, &pair, sizeof pair);
            };
            part(0, word << 24, word << 8 & 0xff000000u);
            part(1, word << 16 & 0xff000000u, word & 0xff000000u);
        }
    }
};

// A strip of groups of one quantised panel as words, with its scales and minimums.
template <class F>
struct Strip {
    char* words;
    float* scales;
    float* minimums;

    explicit Strip(float* memory)
        : words(reinterpret_cast<char*>(memory)),
          scales(memory + STRIP_GROUPS * GROUP_BYTES / 4),
          minimums(scales + STRIP_GROUPS * PANEL_ROWS) {}
    // The next of the `left` groups that lie at `group`, which moves behind them; how many they are.
    int64_t expand(const char*& group, int64_t left) {
        const int64_t depth = left < STRIP_GROUPS ? left : STRIP_GROUPS;
        for (int64_t i = 0; i < depth; ++i, group += F::BYTES) {
            F::head(group, scales + i * PANEL_ROWS, minimums + i * PANEL_ROWS);
            F::expand(group, words + i * GROUP_BYTES);
        }
        return depth;
    }
};

// Of all lanes, in four steps.
template <int S>
inline float halved_sum(Floats x) {
    x = low<S>(x, x, AllLanes{}) + high<S>(x, x, AllLanes{});
    if constexpr (S * 2 < LANES) {
        return halved_sum<S * 2>(x);
    } else {
        return x[0];
    }
}

// Tokens [begin, end) as the tiles of one block.
template <bool SUMS>
void pairs_pack(const Linear& a, int64_t begin, int64_t end, float* packed) {
    const Pairs x(packed, end - begin, a.groups());
    for (int64_t t = 0; t < x.tiles * x.rows; ++t) {
        float* words = packed + (t / x.rows * x.groups * x.rows + t % x.rows) * GROUP_WORDS;
        float* sums = const_cast<float*>(x.sums) + t / x.rows * x.groups * x.rows + t % x.rows;
        const BFloat16* token = static_cast<const BFloat16*>(a.x) + (begin + t) * a.x_stride;
        for (int64_t g = 0; g < x.groups; ++g, words += x.rows * GROUP_WORDS, sums += x.rows) {
            const int64_t left = t < x.tokens ? a.columns - g * GROUP : 0;
            BFloat16 group[GROUP] = {};
            if (left > 0) __builtin_memcpy(group, token + g * GROUP, static_cast<std::size_t>(left < GROUP ? left : GROUP) * 2);
            Halves low, high;
            __builtin_memcpy(&low, group, sizeof low);
            __builtin_memcpy(&high, group + GROUP / 2, sizeof high);
            const Words pairs = __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
            __builtin_memcpy(words, &pairs, sizeof pairs);
            if constexpr (SUMS) {
                *sums = halved_sum<1>(bit_copy<Floats>(pairs << 16) + bit_copy<Floats>(pairs & 0xffff0000u));
            }
        }
    }
}

// The outputs of one panel: sums [tiles, rows, 16], a tile `stride` floats behind the one before.
inline void write_pairs(const Linear& a, const Pairs& x, int64_t begin, int64_t panel, const float* sums, int64_t stride) {
    const BFloat16* bias = static_cast<const BFloat16*>(a.bias);
    const int64_t row = panel * PANEL_ROWS;
    const int rows = static_cast<int>(a.rows - row < PANEL_ROWS ? a.rows - row : PANEL_ROWS);
    const Floats added = bias == nullptr || rows < PANEL_ROWS ? Floats{} : load(bias + row);
    for (int64_t t = 0; t < x.tokens; ++t) {
        const float* of = sums + t / x.rows * stride + t % x.rows * PANEL_ROWS;
        if (rows < PANEL_ROWS) {
            write_sums(a, bias, begin + t, row, rows, of);
            continue;
        }
        const int64_t at = (begin + t) * a.rows + row;
        const Floats y = bias == nullptr ? load(of) : load(of) + added;
        if (a.float_out) {
            store(static_cast<float*>(a.out) + at, y);
        } else {
            const __m256bh rounded = _mm512_cvtneps_pbh(bit_copy<__m512>(y));
            __builtin_memcpy(static_cast<BFloat16*>(a.out) + at, &rounded, sizeof rounded);
        }
    }
}

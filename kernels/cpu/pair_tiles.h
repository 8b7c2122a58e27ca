// The products of pairs.h in AMX tiles: 16 tokens × 32 columns times 32 columns × 16 rows an instruction. Included by
// isa_amx.cc inside its namespace, after pairs.h and pair_order.h.
//
// Instructions are written out: compilers offer them only where the whole file may use them. No compiler keeps
// anything in a tile. Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights.

struct TileShapes {
    alignas(64) uint8_t palette = 1;
    uint8_t start = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
};

// Tiles for so many tokens are the thread's while this lives.
class Tiles {
public:
    explicit Tiles(int rows) {
        TileShapes shapes;
        for (int i = 0; i < 8; ++i) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = static_cast<uint8_t>(i < 6 ? rows : PANEL_ROWS);
        }
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
[[gnu::always_inline]] inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t row_bytes = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int TILE>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t row_bytes = 64) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int SUMS, int TOKENS, int WEIGHTS>
[[gnu::always_inline]] inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(TOKENS), "i"(WEIGHTS));
}

// Lines that are asked into the second-level cache, so many in a step: what comes next is read from memory evenly while
// the tiles are busy, not all at once when it is needed.
struct Stream {
    const char* at;
    int lines;

    void step() {
        for (int i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// Groups of each strip of as many: as even as they can be.
constexpr int64_t strip_depth(int64_t groups) {
    const int64_t strips = (groups + STRIP_GROUPS - 1) / STRIP_GROUPS;
    return strips == 0 ? 1 : (groups + strips - 1) / strips;
}

// sums (from zero if `first`) += T tiles of tokens · P panels of weights, `depth` groups of each. A tile's sums are
// `sums_stride` floats behind those of the one before, a panel's follow each other. The first tokens bring the
// weights near, and those AHEAD are fetched; behind a panel's end comes its successor in this stream, P panels
// on.
template <int T, int P, bool FETCH>
inline void multiply_tiles(const char* x, int64_t x_stride, int rows, const char* weight, int64_t panel_bytes,
                           int64_t depth, int64_t left, bool first, float* sums, int64_t sums_stride, Stream& next) {
    static_assert(T * P <= 4);
    constexpr int64_t AHEAD = T == 1 ? 4 : 2;
    const int64_t size = rows * PANEL_ROWS;
    each<T>([&](auto t) {
        each<P>([&](auto p) {
            if (first) {
                tile_zero<t.value * P + p.value>();
            } else {
                tile_load<t.value * P + p.value>(sums + t.value * sums_stride + p.value * size);
            }
        });
    });
    for (int64_t g = 0; g < depth; ++g, x += rows * GROUP_WORDS * 4, weight += GROUP_BYTES) {
        if constexpr (FETCH) {
            const int64_t ahead = AHEAD * GROUP_BYTES + (g + AHEAD < left ? 0 : (P - 1) * panel_bytes);
            for (int p = 0; p < P; ++p) {
                for (int64_t line = 0; line < GROUP_BYTES; line += 64) {
                    __builtin_prefetch(weight + p * panel_bytes + ahead + line);
                }
            }
        }
        next.step();
        each<T>([&](auto t) { tile_load<4 + t.value>(x + t.value * x_stride); });
        each<P>([&](auto p) {
            constexpr int WEIGHTS = 6 + p.value % 2;
            tile_load<WEIGHTS>(weight + p.value * panel_bytes);
            each<T>([&](auto t) { tile_multiply<t.value * P + p.value, 4 + t.value, WEIGHTS>(); });
        });
    }
    each<T>([&](auto t) {
        each<P>([&](auto p) { tile_store<t.value * P + p.value>(sums + t.value * sums_stride + p.value * size); });
    });
}

// The outputs of `count` panels for the tokens of the tiles [t, t + several), from their sums: whole lines where two
// panels make one.
inline void write_tiles(const Linear& a, const Pairs& x, int64_t begin, int64_t t, int64_t several, int64_t panel,
                        int64_t count, const float* sums, int64_t stride) {
    const int64_t size = x.rows * PANEL_ROWS, row = panel * PANEL_ROWS;
    const bool lines = count == 2 && !a.float_out && row + 2 * PANEL_ROWS <= a.rows;
    if (!lines) {
        for (int64_t p = 0; p < count; ++p) write_pairs(a, x, begin, panel + p, sums + p * size, stride, t, several);
        return;
    }
    const BFloat16* bias = static_cast<const BFloat16*>(a.bias);
    const Floats first = bias == nullptr ? Floats{} : load(bias + row);
    const Floats second = bias == nullptr ? Floats{} : load(bias + row + PANEL_ROWS);
    const int64_t end = (t + several) * x.rows < x.tokens ? (t + several) * x.rows : x.tokens;
    for (int64_t token = t * x.rows; token < end; ++token) {
        const float* of = sums + (token / x.rows - t) * stride + token % x.rows * PANEL_ROWS;
        Floats low = load(of), high = load(of + size);
        if (bias != nullptr) low += first, high += second;
        const __m512bh rounded = _mm512_cvtne2ps_pbh(bit_copy<__m512>(high), bit_copy<__m512>(low));
        __builtin_memcpy(static_cast<BFloat16*>(a.out) + (begin + token) * a.rows + row, &rounded, sizeof rounded);
    }
}

// Panels [first, last) against one block of tokens, as many as PANELS together. words(first panel, their number,
// first group, groups, stride) gives bfloat16 words of a strip of them, and sets the bytes from panel to panel. A panel
// of the weights has `bytes`. Outputs are written while the sums are near.
template <int PANELS, bool FETCH, class Words_>
inline void strips_of_tiles(const Linear& a, const Pairs& x, int64_t begin, int64_t first, int64_t last, int64_t depth,
                            int64_t bytes, float* sums, const Words_& words) {
    const int64_t size = x.rows * PANEL_ROWS, passes = (x.tiles + 1) / 2;
    const Tiles tiles(x.rows);
    for (int64_t panel = first; panel < last;) {
        const int64_t count = last - panel >= PANELS ? PANELS : last - panel >= 2 ? 2 : 1, stride = count * size;
        Stream next{static_cast<const char*>(a.weight) + (panel + count) * bytes, 0};
        if (panel + count < last && passes > 1 && x.groups > 0) {
            next.lines = static_cast<int>((count * bytes / 64 + passes * x.groups - 1) / (passes * x.groups));
        }
        for (int64_t g = 0; g == 0 || g < x.groups; g += depth) {
            const int64_t till = x.groups - g < depth ? x.groups - g : depth;
            int64_t t = 0, panel_bytes = 0;
            const char* weight = words(panel, count, g, till, panel_bytes);
            const auto run = [&](auto several, auto panels) {
                const auto multiply = FETCH && t == 0 ? multiply_tiles<several.value, panels.value, FETCH>
                                                      : multiply_tiles<several.value, panels.value, false>;
                float* of = sums + (depth < x.groups ? t * stride : 0);
                multiply(x.tile(t, g), x.tile_bytes(), x.rows, weight, panel_bytes, till, x.groups - g, g == 0, of,
                         stride, next);
                if (g + till >= x.groups) write_tiles(a, x, begin, t, several.value, panel, count, of, stride);
                t += several.value;
            };
            while (t + 2 <= x.tiles) count == 2 ? run(Width<2>{}, Width<2>{}) : run(Width<2>{}, Width<1>{});
            if (t < x.tiles) {
                count == PANELS ? run(Width<1>{}, Width<PANELS>{})
                                : count == 2 ? run(Width<1>{}, Width<2>{}) : run(Width<1>{}, Width<1>{});
            }
        }
        panel += count;
    }
}

// bfloat16 panels, as they lie.
inline void plain_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                        float* scratch) {
    const Pairs x(packed, end - begin, a.groups());
    const auto words = [&](int64_t panel, int64_t, int64_t g, int64_t, int64_t& panel_bytes) {
        panel_bytes = x.groups * GROUP_BYTES;
        return static_cast<const char*>(a.weight) + panel * panel_bytes + g * GROUP_BYTES;
    };
    // Tokens and weights come from the second-level cache either way: strips that fit L1 were 10% slower.
    const int64_t whole = x.groups + 1, bytes = x.groups * GROUP_BYTES;
    (x.tiles == 1 ? strips_of_tiles<4, true, decltype(words)> : strips_of_tiles<2, true, decltype(words)>)(
        a, x, begin, first, last, whole, bytes, scratch, words);
}

// Quantised panels, rounded to bfloat16 strip by strip: F is their view of panels.h.
template <class F>
inline void rounded_pairs(const Linear& a, const Pairs& x, int64_t begin, int64_t first, int64_t last, float* scratch) {
    const int64_t depth = strip_depth(x.groups);
    char* strip = reinterpret_cast<char*>(scratch);
    const auto words = [&](int64_t panel, int64_t count, int64_t g, int64_t till, int64_t& panel_bytes) {
        panel_bytes = depth * GROUP_BYTES;
        return round_strip<F>(a, panel, count, g, till, panel_bytes, strip);
    };
    float* sums = scratch + 2 * STRIP_GROUPS * GROUP_BYTES / 4;
    strips_of_tiles<2, false>(a, x, begin, first, last, depth, x.groups * F::BYTES, sums, words);
}

// A few groups of one quantised panel as words, with their scales and minimums.
template <class F>
struct Expanded {
    static constexpr int64_t GROUPS = 4;
    static constexpr int64_t FLOATS = GROUPS * (GROUP_BYTES / 4 + 2 * PANEL_ROWS);
    char* words;
    float* scales;
    float* minimums;

    explicit Expanded(float* memory)
        : words(reinterpret_cast<char*>(memory)),
          scales(memory + GROUPS * GROUP_BYTES / 4),
          minimums(scales + GROUPS * PANEL_ROWS) {}
    // `count` groups that lie at `group`; those AHEAD are fetched.
    void expand(const char* group, int64_t count) {
        constexpr int64_t AHEAD = 8;
        for (int64_t i = 0; i < count; ++i, group += F::BYTES) {
            for (int64_t line = 0; line < F::BYTES; line += 64) __builtin_prefetch(group + AHEAD * F::BYTES + line);
            F::head(group, scales + i * PANEL_ROWS, minimums + i * PANEL_ROWS);
            const typename F::Group of(group);
            each<GROUP_WORDS>([&](auto w) {
                const Words pair = of.template pair<w.value>();
                __builtin_memcpy(words + i * GROUP_BYTES + w.value * PANEL_ROWS * 4, &pair, sizeof pair);
            });
        }
    }
};

// sums [M, 16] (from zero if `first`) += scale · (tile · group) + minimum · (sum of the token) for N groups.
template <int M, int N, class F>
inline void scaled_tile(const char* x, const float* token_sums, const Expanded<F>& weights, bool first, float* products,
                        float* sums) {
    each<N>([&](auto i) {
        tile_zero<i.value>();
        tile_load<4 + i.value % 2>(x + i.value * M * GROUP_WORDS * 4);
        tile_load<6 + i.value % 2>(weights.words + i.value * GROUP_BYTES);
        tile_multiply<i.value, 4 + i.value % 2, 6 + i.value % 2>();
        tile_store<i.value>(products + i.value * M * PANEL_ROWS);
    });
    Floats totals[M];
    for (int m = 0; m < M; ++m) totals[m] = first ? Floats{} : load(sums + m * PANEL_ROWS);
    for (int i = 0; i < N; ++i) {
        const float* of = products + i * M * PANEL_ROWS;
        const Floats scale = load(weights.scales + i * PANEL_ROWS);
        for (int m = 0; m < M; ++m) totals[m] = fused(load(of + m * PANEL_ROWS), scale, totals[m]);
        if constexpr (F::MINIMUMS) {
            const Floats minimum = load(weights.minimums + i * PANEL_ROWS);
            for (int m = 0; m < M; ++m) totals[m] = fused(splat(token_sums[i * M + m]), minimum, totals[m]);
        }
    }
    for (int m = 0; m < M; ++m) store(sums + m * PANEL_ROWS, totals[m]);
}

// Quantised panels [first, last) against one block of tokens in tiles of M. The next groups are expanded before the
// ones at hand are multiplied: a product that goes through memory takes long, and vectors have nothing else to do.
template <int M, class F>
inline void scaled_panels(const Linear& a, const Pairs& x, int64_t begin, int64_t first, int64_t last, float* scratch) {
    constexpr int64_t MOST = Expanded<F>::GROUPS, SIZE = M * PANEL_ROWS;
    static_assert(MOST == 4);
    Expanded<F> now(scratch), next(scratch + Expanded<F>::FLOATS);
    float* products = scratch + 2 * Expanded<F>::FLOATS;
    float* sums = products + MOST * PANEL_ROWS * PANEL_ROWS;
    const char* group = static_cast<const char*>(a.weight) + first * x.groups * F::BYTES;
    const char* const end = group + (last - first) * x.groups * F::BYTES;
    int64_t panel_left = x.groups;
    const auto expand = [&] {
        if (group == end) return;
        const int64_t count = panel_left < MOST ? panel_left : MOST;
        next.expand(group, count);
        group += count * F::BYTES;
        panel_left = panel_left == count ? x.groups : panel_left - count;
    };
    const Tiles tiles(M);
    expand();
    for (int64_t panel = first; panel < last; ++panel) {
        if (x.groups == 0) __builtin_memset(sums, 0, static_cast<std::size_t>(x.tiles * SIZE) * sizeof(float));
        for (int64_t g = 0; g < x.groups; g += MOST) {
            const int64_t left = x.groups - g;
            const Expanded<F> free = now;
            now = next, next = free;
            expand();
            for (int64_t t = 0; t < x.tiles; ++t) {
                const auto run = [&](auto groups) {
                    scaled_tile<M, groups.value>(x.tile(t, g), x.sums_of(t, g), now, g == 0, products, sums + t * SIZE);
                };
                switch (left) {
                    case 1: run(Width<1>{}); break;
                    case 2: run(Width<2>{}); break;
                    case 3: run(Width<3>{}); break;
                    default: run(Width<4>{}); break;
                }
            }
        }
        write_pairs(a, x, begin, panel, sums, SIZE, 0, x.tiles);
    }
}

// Whether the tokens [begin, end) of a block are multiplied in vectors.
template <class F>
inline bool ordered(const Linear& a, int64_t begin, int64_t end) {
    return end - begin <= F::ORDERED && (a.tokens <= PAIRS_FEW || a.float_out);
}

template <class F>
void scaled_pack(const Linear& a, int64_t begin, int64_t end, float* packed) {
    (ordered<F>(a, begin, end) ? ordered_pack<F::MINIMUMS> : pairs_pack<F::MINIMUMS>)(a, begin, end, packed);
}

// Quantised panels [first, last) against one block of tokens.
template <class F>
void scaled_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                  float* scratch) {
    const Pairs x(packed, end - begin, a.groups());
    if (a.tokens > PAIRS_FEW && !a.float_out) {
        return rounded_pairs<typename F::View>(a, x, begin, first, last, scratch);
    }
    const NormalNumbers normal;
    if (ordered<F>(a, begin, end)) return ordered_pairs<F>(a, packed, begin, end, first, last);
    switch (x.rows) {
        case 1: return scaled_panels<1, F>(a, x, begin, first, last, scratch);
        case 2: return scaled_panels<2, F>(a, x, begin, first, last, scratch);
        case 4: return scaled_panels<4, F>(a, x, begin, first, last, scratch);
        case 8: return scaled_panels<8, F>(a, x, begin, first, last, scratch);
        default: return scaled_panels<16, F>(a, x, begin, first, last, scratch);
    }
}

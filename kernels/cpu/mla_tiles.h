// Absorbed latent attention of bfloat16 in AMX tiles. Included by isa_amx.cc inside its namespace, after
// attention_decode.h and pair_tiles.h and mla_soften.h.
//
// 16 tokens are the rows of a tile where they lie in the cache, 16 query rows the columns of another, packed once: their
// product is a tile of scores, transposed. Latents as values are interleaved in pairs of tokens once for all query
// rows. Weights are multiplied as bfloat16, each off by up to 2^-9 of itself; their sum is of what they were before.

constexpr int LATENT_SIDE = 16;  // tokens, query rows and columns of a tile
constexpr int LATENT_TILE = LATENT_SIDE * LATENT_SIDE;  // its words

inline bool latent_in_tiles(const LatentDecode& a) {
    return a.head_dim % 32 == 0 && a.rank % 64 == 0 && a.block_size % LATENT_SIDE == 0;
}

inline int64_t latent_tiles_scratch(const LatentDecode& a, int rows) {
    const int64_t padded = (rows + LATENT_SIDE - 1) / LATENT_SIDE * LATENT_SIDE;
    const int64_t ours = padded * (a.head_dim / 2 + a.rank + TILE_TOKENS + TILE_TOKENS / 2 + 3) +
                         int64_t{TILE_TOKENS} / 2 * a.rank + 4 * LATENT_TILE;
    const int64_t theirs = avx512_bf16::table(Type::bf16)->latent_split_scratch(a, rows);
    return ours > theirs ? ours : theirs;
}

// Query rows as tiles of 16 pairs × 16 rows, zeros for rows that are not there.
inline void latent_query_tiles(const LatentDecode& a, const LatentSplit& split, int64_t padded, float* q) {
    const int pairs = a.head_dim / 2;
    for (int64_t i = 0; i < padded * pairs; i += LANES) store(q + i, Floats{});
    for (int m = split.first; m < split.last; ++m) {
        const int query = m / a.num_heads, head = m % a.num_heads, row = m - split.first;
        const BFloat16* latent = static_cast<const BFloat16*>(a.q) + split.row * a.q_stride + query * a.q_query_stride +
                                 head * a.q_head_stride;
        const BFloat16* rotated = static_cast<const BFloat16*>(a.q_rope) + split.row * a.rope_row_stride +
                                  query * a.rope_query_stride + head * a.rope_head_stride;
        float* column = q + int64_t{row / LATENT_SIDE} * LATENT_SIDE * pairs + row % LATENT_SIDE;
        for (int p = 0; p < pairs; ++p) {
            const BFloat16* from = 2 * p < a.rank ? latent + 2 * p : rotated + 2 * p - a.rank;
            __builtin_memcpy(column + p * LATENT_SIDE, from, sizeof(float));
        }
    }
}

// scores [16, TILE_TOKENS] of one group of query rows. The tokens `next` are fetched meanwhile, if not null.
inline void latent_score_tiles(const LatentDecode& a, const float* q, const int64_t* offset, int count,
                               const int64_t* next, float* products, float* scores) {
    const BFloat16* keys = static_cast<const BFloat16*>(a.k);
    each<4>([](auto i) { tile_zero<i.value>(); });
    for (int d = 0; d < a.head_dim; d += 32, q += LATENT_TILE) {
        tile_load<4>(q);
        each<4>([&](auto i) {
            constexpr int n = i.value * LATENT_SIDE, TOKENS = 5 + i.value % 3;
            if (n < count) {
                tile_load<TOKENS>(keys + offset[n] + d, a.head_dim * int64_t{sizeof(BFloat16)});
                tile_multiply<i.value, TOKENS, 4>();
            }
            if (next == nullptr) return;
            for (int row = n; row < n + LATENT_SIDE; ++row) __builtin_prefetch(keys + next[row] + d);
        });
    }
    each<4>([&](auto i) { tile_store<i.value>(products + i.value * LATENT_TILE); });
    for (int n = 0; n < count; n += LATENT_SIDE) {
        Floats square[LANES];
        for (int i = 0; i < LANES; ++i) square[i] = load(products + (n + i) * LATENT_SIDE);
        transpose(square);
        for (int i = 0; i < LANES; ++i) store(scores + i * TILE_TOKENS + n, square[i] * (a.scale * LOG2_E));
    }
}

// Latents as tiles of 16 pairs of tokens × 16 columns, [TILE_TOKENS / 32, rank / 16] of them; zeros past `count`.
inline void latent_value_tiles(const LatentDecode& a, const int64_t* offset, int count, float* values) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) order[0][i] = static_cast<uint16_t>(i % 2 * 32 + i / 2), order[1][i] = order[0][i] + 16;
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    const BFloat16* keys = static_cast<const BFloat16*>(a.k);
    for (int n = 0; n < TILE_TOKENS; n += 2) {
        float* row = values + int64_t{n / 32} * a.rank * LATENT_SIDE + n % 32 / 2 * LATENT_SIDE;
        for (int d = 0; d < a.rank; d += 32, row += 2 * LATENT_TILE) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i first = n < count ? _mm512_loadu_si512(keys + offset[n] + d) : zero;
            const __m512i second = n + 1 < count ? _mm512_loadu_si512(keys + offset[n + 1] + d) : zero;
            _mm512_storeu_si512(row, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(row + LATENT_TILE, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

// sums [16, rank] = sums · factor + weights · values for one group of query rows.
inline void latent_sum_tiles(const LatentDecode& a, const float* scores, const float* factor, const float* values,
                             int count, float* weights, float* sums) {
    for (int m = 0; m < LATENT_SIDE; ++m) {
        for (int n = 0; n < TILE_TOKENS; n += 32) {
            const __m512 low = bit_copy<__m512>(load(scores + m * TILE_TOKENS + n));
            const __m512 high = bit_copy<__m512>(load(scores + m * TILE_TOKENS + n + LANES));
            store(weights + n / 32 * LATENT_TILE + m * LATENT_SIDE, bit_copy<Floats>(_mm512_cvtne2ps_pbh(high, low)));
        }
        if (factor[m] == 1) continue;
        for (int d = 0; d < a.rank; d += LANES) store(sums + m * a.rank + d, load(sums + m * a.rank + d) * factor[m]);
    }
    const int64_t bytes = a.rank * int64_t{sizeof(float)};
    for (int d = 0; d < a.rank; d += 4 * LATENT_SIDE) {
        each<4>([&](auto i) { tile_load<i.value>(sums + d + i.value * LATENT_SIDE, bytes); });
        for (int n = 0; n < count; n += 32) {
            tile_load<4>(weights + n / 32 * LATENT_TILE);
            const float* tile = values + int64_t{n / 32} * a.rank * LATENT_SIDE + d * LATENT_SIDE;
            each<4>([&](auto i) {
                constexpr int VALUES = 5 + i.value % 3;
                tile_load<VALUES>(tile + i.value * LATENT_TILE);
                tile_multiply<i.value, 4, VALUES>();
            });
        }
        each<4>([&](auto i) { tile_store<i.value>(sums + d + i.value * LATENT_SIDE, bytes); });
    }
}

// As latent_split of mla_decode.h.
inline void latent_split_tiles(const LatentDecode& a, const LatentSplit& split, float* partial, float* scratch) {
    if (!latent_in_tiles(a)) return avx512_bf16::table(Type::bf16)->latent_split(a, split, partial, scratch);
    const int rows = split.last - split.first;
    const int64_t padded = (rows + LATENT_SIDE - 1) / LATENT_SIDE * LATENT_SIDE, stride = a.partial_stride();
    float* q = scratch;
    float* sums = q + padded * a.head_dim / 2;
    float* scores = sums + padded * a.rank;
    float* weights = scores + padded * TILE_TOKENS;
    float* values = weights + padded * TILE_TOKENS / 2;
    float* products = values + int64_t{TILE_TOKENS} / 2 * a.rank;
    float* running_maximum = products + 4 * LATENT_TILE;
    float* running_sum = running_maximum + padded;
    float* factor = running_sum + padded;
    latent_query_tiles(a, split, padded, q);
    for (int64_t i = 0; i < padded * a.rank; i += LANES) store(sums + i, Floats{});
    for (int64_t m = 0; m < padded; ++m) running_maximum[m] = -1e38f, running_sum[m] = 0, factor[m] = 1;

    const int last_visible = a.visible(split.row, split.last - 1);
    const int end = split.end < last_visible ? split.end : last_visible;
    int64_t offset[TILE_TOKENS] = {}, next[TILE_TOKENS] = {};
    const int seen_here = end - split.begin;
    locate(a, split.row, split.begin, seen_here < TILE_TOKENS ? seen_here : TILE_TOKENS, next);
    const Tiles tiles(LATENT_SIDE);
    for (int first = split.begin; first < end; first += TILE_TOKENS) {
        const int left = end - first, count = left < TILE_TOKENS ? left : TILE_TOKENS;
        __builtin_memcpy(offset, next, sizeof offset);
        const int ahead = left - count < TILE_TOKENS ? left - count : TILE_TOKENS;
        locate(a, split.row, first + TILE_TOKENS, ahead, next);
        for (int64_t m = 0; m < padded; m += LATENT_SIDE) {
            latent_score_tiles(a, q + m * a.head_dim / 2, offset, count, m == 0 && ahead > 0 ? next : nullptr, products,
                               scores + m * TILE_TOKENS);
        }
        latent_soften(a, split, first, count, static_cast<int>(padded), scores, running_maximum, running_sum, factor);
        latent_value_tiles(a, offset, count, values);
        for (int64_t m = 0; m < padded; m += LATENT_SIDE) {
            latent_sum_tiles(a, scores + m * TILE_TOKENS, factor + m, values, count, weights + m * TILE_TOKENS / 2,
                             sums + m * a.rank);
        }
    }
    for (int m = 0; m < rows; ++m, partial += stride) {
        for (int d = 0; d < a.rank; d += LANES) store(partial + d, load(sums + int64_t{m} * a.rank + d));
        partial[a.rank] = running_maximum[m];
        partial[a.rank + 1] = running_sum[m];
    }
}

inline Kernels with_latent_tiles(Kernels kernels) {
    kernels.latent_split_scratch = latent_tiles_scratch;
    kernels.latent_split = latent_split_tiles;
    return kernels;
}

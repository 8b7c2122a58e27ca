// Latent attention of bfloat16 where pairs of numbers are multiplied. Included by each isa_*.cc that does so inside its
// namespace, after attention_packed.h and mla_decode.h.
//
// Absorbed: cached latents are rows of a left factor where they lie, 16 query rows the columns of a right one, packed
// once; their product is scores, transposed. As values, 64 columns of 128 tokens at a time are put into pairs, for all
// query rows. Expanded: keys and values of one head are made for 128 tokens, by the same product, and used by all of
// its query rows before the next are made. They are rounded to bfloat16, as a cache of them would be: an output is then
// off by 6e-3 of its size where one of keys in float32 has 2e-3, and an absorbed one, whose queries are rounded, 5e-3.
// Weights are multiplied as bfloat16 in both (attention_packed.h).

constexpr int LATENT_STRIP = 64;  // columns of values that are packed together
static_assert(SPLIT_TOKENS % PAIR_TOKENS == 0);

// 16 tokens lie together, and numbers in whole pairs and strips.
inline bool absorbs_packed(const LatentDecode& a) {
    return a.head_dim % (2 * SIDE) == 0 && a.rank % LATENT_STRIP == 0 && a.block_size % SIDE == 0;
}

// 16 rows as tiles of 16 pairs × 16 rows: the columns of a right factor.
template <class RowOf>
inline void pack_columns(const RowOf& row_of, int depth, float* to) {
    for (int t = 0; t < depth; ++t, to += TILE_WORDS) {
        Floats square[LANES];
        for (int i = 0; i < SIDE; ++i) {
            const BFloat16* row = row_of(i, t * 2 * SIDE);
            square[i] = row == nullptr ? Floats{} : load(reinterpret_cast<const float*>(row));
        }
        transpose(square);
        for (int i = 0; i < SIDE; ++i) store(to + i * SIDE, square[i]);
    }
}

// Where the next tokens of a row lie; those that are not there repeat the first.
inline void locate_pairs(const Attention& a, int row, int first, int count, int64_t* offset) {
    locate(a, row, first, count < PAIR_TOKENS ? count : PAIR_TOKENS, offset);
    for (int n = count < 0 ? 0 : count; n < PAIR_TOKENS; ++n) offset[n] = offset[0];
}

// What a split has of its query rows, in blocks of 16, and of a tile of tokens.
struct LatentRows : Rows {
    float* products;  // 4 tiles
    float* weights_of;  // of each block

    LatentRows(const LatentDecode& a, int count, float* memory) : Rows(count, a.head_dim, a.rank, memory) {
        products = memory == nullptr ? nullptr : memory + size;
        weights_of = memory == nullptr ? nullptr : products + 4 * TILE_WORDS;
        size += 4 * TILE_WORDS + rows * PAIR_TOKENS / 2;
    }
};

inline int64_t latent_split_packed_scratch(const LatentDecode& a, int rows) {
    const int64_t ours = LatentRows(a, rows, nullptr).size, theirs = latent_split_scratch(a, rows);
    return ours > theirs ? ours : theirs;
}

// The scores of a block of query rows, as tiles of 16 rows × 16 tokens.
inline void latent_scores(const LatentDecode& a, const LatentRows& r, int block, const int64_t* offset, int tiles,
                          const int64_t* next) {
    const int depth = static_cast<int>(r.depth);
    for (int t = 0; t < tiles; t += 4) {
        const int count = tiles - t < 4 ? tiles - t : 4;
        multiply_in_place(static_cast<const BFloat16*>(a.k), offset + t * SIDE, count, a.head_dim, r.q_block(block),
                          depth, next == nullptr ? nullptr : next + t * SIDE, r.products);
        for (int i = 0; i < count; ++i) {
            Floats square[LANES];
            for (int n = 0; n < SIDE; ++n) square[n] = load(r.products + i * TILE_WORDS + n * SIDE);
            transpose(square);
            for (int m = 0; m < SIDE; ++m) store(r.scores + (t + i) * TILE_WORDS + m * SIDE, square[m]);
        }
    }
}

// The query rows of a split as columns, and nothing summed yet.
inline void enter_latent_rows(const LatentDecode& a, const LatentSplit& split, const LatentRows& r) {
    const uint32_t sign = a.scale < 0 ? 0x80008000u : 0;  // as in Rows::enter
    for (int block = 0; block < r.rows / SIDE; ++block) {
        pack_columns(
            [&](int i, int d) -> const BFloat16* {
                const int m = split.first + block * SIDE + i, query = m / a.num_heads, head = m % a.num_heads;
                if (m >= split.last) return nullptr;
                if (d < a.rank) {
                    return static_cast<const BFloat16*>(a.q) + split.row * a.q_stride + query * a.q_query_stride +
                           head * a.q_head_stride + d;
                }
                return static_cast<const BFloat16*>(a.q_rope) + split.row * a.rope_row_stride +
                       query * a.rope_query_stride + head * a.rope_head_stride + d - a.rank;
            },
            static_cast<int>(r.depth), r.q_block(block));
    }
    for (int64_t i = 0; sign != 0 && i < r.rows * r.depth * SIDE; i += LANES) {
        store(r.q + i, bit_copy<Floats>(bit_copy<Words>(load(r.q + i)) ^ sign));
    }
    for (int m = 0; m < r.rows; ++m) {
        r.visible[m] = a.visible(split.row, m < split.last - split.first ? split.first + m : split.last - 1);
        r.running_maximum[m] = -1e38f, r.running_sum[m] = 0;
    }
    r.clear();
}

// As latent_split of mla_decode.h.
inline void latent_split_packed(const LatentDecode& a, const LatentSplit& split, float* partial, float* scratch) {
    if (!absorbs_packed(a)) return latent_split<BFloat16>(a, split, partial, scratch);
    const int rows = split.last - split.first;
    const LatentRows r(a, rows, scratch);
    const int blocks = static_cast<int>(r.rows / SIDE);
    enter_latent_rows(a, split, r);
    const float scale = (a.scale < 0 ? -a.scale : a.scale) * LOG2_E;
    const BFloat16* latents = static_cast<const BFloat16*>(a.k);
    const int last_visible = r.visible[r.rows - 1], end = split.end < last_visible ? split.end : last_visible;
    int64_t offsets[2][PAIR_TOKENS] = {};
    int64_t *offset = offsets[0], *next = offsets[1];
    locate_pairs(a, split.row, split.begin, end - split.begin, next);
    [[maybe_unused]] const ColumnProducts held;
    for (int first = split.begin; first < end; first += PAIR_TOKENS) {
        int64_t* const before = offset;
        offset = next, next = before;
        const int left = end - first, count = left < PAIR_TOKENS ? left : PAIR_TOKENS;
        // Of the next split too: whoever computes it finds it nearer.
        const int ahead = a.kv_len[split.row] - first - PAIR_TOKENS;
        if (ahead > 0) locate_pairs(a, split.row, first + PAIR_TOKENS, ahead, next);
        int begun = blocks;  // blocks before it see nothing here
        for (int block = blocks; block-- > 0;) {
            int32_t valid[SIDE];
            for (int i = 0; i < SIDE; ++i) valid[i] = r.visible[block * SIDE + i] - first;
            if (valid[SIDE - 1] <= 0) break;
            begun = block;
            const int tiles = 2 * vectors_of_pairs(count);
            const bool fetches = block == blocks - 1 && ahead > 0;
            latent_scores(a, r, block, offset, tiles, fetches ? next : nullptr);
            float* most = r.running_maximum + block * SIDE;
            float* total = r.running_sum + block * SIDE;
            float* weights = r.weights_of + block * PAIR_TOKENS / 2 * SIDE;
            rescale(valid[0] < tiles * SIDE ? soften_tiles<true>(r.scores, tiles, valid, scale, most, total, weights)
                                            : soften_tiles<false>(r.scores, tiles, valid, scale, most, total, weights),
                    r.columns, r.out_block(block));
        }
        const int pairs = vectors_of_pairs(count);
        for (int d = 0; d < a.rank; d += LATENT_STRIP) {
            pack_values(latents + d, offset, pairs * 2 * SIDE, LATENT_STRIP, r.values);
            for (int block = begun; block < blocks; ++block) {
                const float* weights = r.weights_of + block * PAIR_TOKENS / 2 * SIDE;
                multiply_block<true>(weights, r.values, PAIR_TOKENS / 2 * SIDE, pairs, LATENT_STRIP / SIDE,
                                     r.out_block(block) + d * SIDE);
            }
        }
    }
    for (int m = 0; m < rows; ++m, partial += a.partial_stride()) {
        r.leave(m, 1, partial);
        partial[a.rank] = r.running_maximum[m];
        partial[a.rank + 1] = r.running_sum[m];
    }
}

// Expanded: what a task holds of a head beside its rows.
struct LatentHead : Rows {
    int size_of_row;  // of the projections: a key's own part and a value
    float* up;        // the projections as columns
    float* products;  // 8 tiles
    BFloat16* keys_of;
    BFloat16* values_of;

    LatentHead(const LatentPrefill& a, int count, float* memory)
        : Rows(count, a.nope + a.rope(), a.v_dim, memory), size_of_row(a.nope + a.v_dim) {
        const auto take = [&](int64_t floats) {
            size += floats;
            return memory == nullptr ? nullptr : memory + size - floats;
        };
        up = take(int64_t{size_of_row} * a.rank / 2), products = take(8 * TILE_WORDS);
        keys_of = reinterpret_cast<BFloat16*>(take(int64_t{PAIR_TOKENS} * (a.nope + a.rope()) / 2));
        values_of = reinterpret_cast<BFloat16*>(take(int64_t{PAIR_TOKENS} * a.v_dim / 2));
    }
};

// 0 where a shape is not in whole pairs and tiles of 16 tokens.
inline int64_t latent_head_scratch(const LatentPrefill& a, int rows) {
    const bool fits = a.rank % (2 * SIDE) == 0 && a.nope % (2 * SIDE) == 0 && a.rope() % (2 * SIDE) == 0 &&
                      a.v_dim % (2 * SIDE) == 0 && a.block_size % SIDE == 0;
    return fits ? LatentHead(a, rows, nullptr).size : 0;
}

// Keys and values of a head for the tokens at `offset`, so many times 16, as rows of bfloat16.
inline void expand_head(const LatentPrefill& a, const LatentHead& r, const int64_t* offset, int tiles) {
    const BFloat16* latents = static_cast<const BFloat16*>(a.k);
    const int depth = a.rank / (2 * SIDE), size = a.nope + a.rope();
    for (int t = 0; t < tiles; t += 4) {
        const int count = tiles - t < 4 ? tiles - t : 4;
        for (int d = 0; d < r.size_of_row; d += 2 * SIDE) {
            for (int half = 0; half < 2; ++half) {
                multiply_in_place(latents, offset + t * SIDE, count, a.head_dim,
                                  r.up + (d / SIDE + half) * depth * TILE_WORDS, depth, nullptr,
                                  r.products + half * 4 * TILE_WORDS);
            }
            BFloat16* to = d < a.nope ? r.keys_of + d : r.values_of + d - a.nope;
            const int stride = d < a.nope ? size : a.v_dim;
            for (int n = 0; n < count * SIDE; ++n) {
                const __m512 low = bit_copy<__m512>(load(r.products + n * SIDE));
                const __m512 high = bit_copy<__m512>(load(r.products + 4 * TILE_WORDS + n * SIDE));
                const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
                __builtin_memcpy(to + int64_t{t * SIDE + n} * stride, &rounded, sizeof rounded);
            }
        }
    }
    for (int n = 0; n < tiles * SIDE; ++n) {
        __builtin_memcpy(r.keys_of + int64_t{n} * size + a.nope, latents + offset[n] + a.rank,
                         static_cast<std::size_t>(a.rope()) * sizeof(BFloat16));
    }
}

// One head for its query tokens of `tile`.
inline void latent_head(const LatentPrefill& a, const HeadTile& tile, float* scratch) {
    const int rows = tile.end - tile.begin, size = a.nope + a.rope(), depth = a.rank / (2 * SIDE);
    const LatentHead r(a, rows, scratch);
    const BFloat16* k_up = static_cast<const BFloat16*>(a.k_up) + tile.head * a.k_up_stride;
    const BFloat16* v_up = static_cast<const BFloat16*>(a.v_up) + tile.head * a.v_up_stride;
    for (int d = 0; d < r.size_of_row; d += SIDE) {
        const BFloat16* up = d < a.nope ? k_up + int64_t{d} * a.rank : v_up + int64_t{d - a.nope} * a.rank;
        const auto row_of = [&](int i, int c) { return up + int64_t{i} * a.rank + c; };
        pack_columns(row_of, depth, r.up + int64_t{d} * a.rank / 2);
    }
    const int seen = a.kv_len[0] - a.tokens + tile.begin + 1;  // by the first
    for (int m = 0; m < r.rows; ++m) {
        const int t = m < rows ? m : rows - 1;
        const BFloat16* q = static_cast<const BFloat16*>(a.q) + (tile.begin + t) * a.q_stride;
        r.enter(m, q + int64_t{tile.head} * size, size, a.scale, seen + t);
    }
    r.clear();
    const float scale = (a.scale < 0 ? -a.scale : a.scale) * LOG2_E;
    int64_t key_rows[PAIR_TOKENS], value_rows[PAIR_TOKENS], offset[PAIR_TOKENS] = {};
    for (int n = 0; n < PAIR_TOKENS; ++n) key_rows[n] = int64_t{n} * size, value_rows[n] = int64_t{n} * a.v_dim;
    [[maybe_unused]] const ColumnProducts held;
    const int end = seen + rows - 1;
    for (int first = 0; first < end; first += PAIR_TOKENS) {
        const int left = end - first, padded = vectors_of_pairs(left < PAIR_TOKENS ? left : PAIR_TOKENS) * 2 * SIDE;
        locate_pairs(a, 0, first, left, offset);
        expand_head(a, r, offset, padded / SIDE);
        // Their weights are 0, but they must be numbers.
        for (int64_t i = int64_t{left} * a.v_dim; i < int64_t{padded} * a.v_dim; ++i) r.values_of[i] = BFloat16{0};
        pack_keys(r.keys_of, key_rows, padded, size, r.keys);
        pack_values(r.values_of, value_rows, padded, a.v_dim, r.values);
        for (int block = 0; block < r.rows / SIDE; ++block) attend(r, block, first, padded, scale);
    }
    for (int m = 0; m < rows; ++m) {
        r.leave(m, r.running_sum[m],
                static_cast<BFloat16*>(a.out) + (int64_t{tile.begin + m} * a.num_heads + tile.head) * a.v_dim);
    }
}

constexpr Kernels with_packed_latents(Kernels kernels) {
    kernels.latent_split_scratch = latent_split_packed_scratch;
    kernels.latent_split = latent_split_packed;
    kernels.latent_head_scratch = latent_head_scratch;
    kernels.latent_head = latent_head;
    return kernels;
}

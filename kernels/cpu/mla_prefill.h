// Expanded latent attention of a chunk. Included by each isa_*.cc inside its namespace, after attention_prefill.h.
//
// A head's keys, transposed, are k_up · latentsᵀ and its values latents · v_upᵀ: made once for all queries, tile by
// tile, and held in float32. Attention is then as in attention_prefill.h, the rotated part of the scores added to
// the other. A query's sums run in the order of the KV positions.

template <class T>
inline void widen_row(const T* from, int size, float* to) {
    const int whole = size - size % LANES;
    for (int i = 0; i < whole; i += LANES) store(to + i, load(from + i));
    for (int i = whole; i < size; ++i) to[i] = load_one(from + i);
}

// The projections of one head: keys' as they are, values' transposed and padded with zeros.
template <class T>
void latent_project(const LatentPrefill& a, const ExpandedHeads& heads, int head) {
    const int rank = a.rank, padded = a.v_padded(), at = head - heads.first;
    const T* k_up = static_cast<const T*>(a.k_up) + head * a.k_up_stride;
    widen_row(k_up, a.nope * rank, heads.k_up + int64_t{at} * a.nope * rank);
    const T* v_up = static_cast<const T*>(a.v_up) + head * a.v_up_stride;
    float* transposed = heads.v_up + int64_t{at} * rank * padded;
    for (int v = 0; v < padded; v += LANES) {
        for (int c = 0; c < rank; c += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = v + i < a.v_dim ? load(v_up + (v + i) * rank + c) : Floats{};
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(transposed + (c + i) * padded + v, square[i]);
        }
    }
}

inline int64_t latent_expand_scratch(const LatentPrefill& a) {
    return int64_t{TILE_TOKENS} * (a.head_dim + a.rank);
}

// Keys and values of one tile for the heads [first, last), which lie among `heads`.
template <class T>
void latent_expand(const LatentPrefill& a, const ExpandedHeads& heads, int tile, int first, int last, float* scratch) {
    const int rank = a.rank, padded = a.v_padded(), start = tile * TILE_TOKENS;
    const int count = a.kv_len[0] - start < TILE_TOKENS ? a.kv_len[0] - start : TILE_TOKENS;
    float* transposed = scratch;
    float* latents = transposed + int64_t{TILE_TOKENS} * a.head_dim;
    int64_t offset[TILE_TOKENS] = {};
    locate(a, 0, start, count, offset);
    transpose_keys(static_cast<const T*>(a.k), offset, count, a.head_dim, transposed);
    for (int n = 0; n < count; ++n) widen_row(static_cast<const T*>(a.k) + offset[n], rank, latents + n * rank);
    if (first == heads.first) {
        const float* rotated = transposed + int64_t{rank} * TILE_TOKENS;
        float* rope = heads.rope + int64_t{tile} * a.rope() * TILE_TOKENS;
        for (int i = 0; i < a.rope() * TILE_TOKENS; i += LANES) store(rope + i, load(rotated + i));
    }
    for (int head = first; head < last; ++head) {
        const int at = head - heads.first;
        const int64_t of = int64_t{at} * a.tiles() + tile;
        const float* v_up = heads.v_up + int64_t{at} * rank * padded;
        multiply<false>(heads.k_up + int64_t{at} * a.nope * rank, rank,
                        [&](int c) { return transposed + c * TILE_TOKENS; }, a.nope, TILE_TOKENS, rank, nullptr,
                        heads.keys + of * a.nope * TILE_TOKENS, TILE_TOKENS);
        multiply<false>(latents, rank, [&](int c) { return v_up + c * padded; }, count, padded, rank, nullptr,
                        heads.values + of * TILE_TOKENS * padded, padded);
    }
}

inline int64_t latent_tile_scratch(const LatentPrefill& a) {
    return int64_t{TILE_ROWS} * (a.nope + a.rope() + a.v_padded() + TILE_TOKENS + 3);
}

template <class T>
void latent_tile(const LatentPrefill& a, const ExpandedHeads& heads, const HeadTile& tile, float* scratch) {
    const int rows = tile.end - tile.begin, size = a.nope + a.rope(), padded = a.v_padded();
    float* q = scratch;
    float* out = q + int64_t{rows} * size;
    float* scores = out + int64_t{rows} * padded;
    float* running_maximum = scores + int64_t{rows} * TILE_TOKENS;
    float* running_sum = running_maximum + rows;
    float* factor = running_sum + rows;
    for (int m = 0; m < rows; ++m) {
        widen_row(static_cast<const T*>(a.q) + (tile.begin + m) * a.q_stride + int64_t{tile.head} * size, size,
                  q + int64_t{m} * size);
        running_maximum[m] = -1e38f, running_sum[m] = 0, factor[m] = 0;
    }
    const float scale = a.scale * LOG2_E;
    for (int i = 0; i < rows * size; ++i) q[i] *= scale;
    for (int64_t i = 0; i < int64_t{rows} * padded; ++i) out[i] = 0;

    const int64_t of = int64_t{tile.head - heads.first} * a.tiles();
    const int visible = a.kv_len[0] - a.tokens + tile.begin + 1, last_visible = visible + rows - 1;
    for (int first = 0; first < last_visible; first += TILE_TOKENS) {
        const int count = last_visible - first < TILE_TOKENS ? last_visible - first : TILE_TOKENS;
        const int64_t i = first / TILE_TOKENS;
        const float* keys = heads.keys + (of + i) * a.nope * TILE_TOKENS;
        const float* rope = heads.rope + i * a.rope() * TILE_TOKENS;
        const float* values = heads.values + (of + i) * TILE_TOKENS * padded;
        multiply<false>(q, size, [&](int d) { return keys + d * TILE_TOKENS; }, rows, TILE_TOKENS, a.nope, nullptr,
                        scores, TILE_TOKENS);
        multiply<true>(q + a.nope, size, [&](int d) { return rope + d * TILE_TOKENS; }, rows, TILE_TOKENS, a.rope(),
                       nullptr, scores, TILE_TOKENS);
        for (int m = 0; m < rows; ++m) {
            factor[m] = soften(scores + int64_t{m} * TILE_TOKENS, visible + m - first, running_maximum + m,
                               running_sum + m);
        }
        multiply<true>(scores, TILE_TOKENS, [&](int n) { return values + n * padded; }, rows, padded, count, factor,
                       out, padded);
    }
    for (int m = 0; m < rows; ++m) {
        T* result = static_cast<T*>(a.out) + (int64_t{tile.begin + m} * a.num_heads + tile.head) * a.v_dim;
        const float* sums = out + int64_t{m} * padded;
        const int whole = a.v_dim - a.v_dim % LANES;
        for (int d = 0; d < whole; d += LANES) store(result + d, load(sums + d) / running_sum[m]);
        for (int d = whole; d < a.v_dim; ++d) store_one(result + d, sums[d] / running_sum[m]);
    }
}

// Absorbed latent attention of a few queries a row. Included by each isa_*.cc inside its namespace, after
// attention_prefill.h and mla_soften.h.
//
// A row's queries times its heads are rows of a matrix that share each tile of cached latents: S = Q·Kᵀ with K
// transposed into scratch, the online softmax along each row, O = O·factor + P·K without its rotated part.

inline int64_t latent_split_scratch(const LatentDecode& a, int rows) {
    return int64_t{rows} * (a.head_dim + TILE_TOKENS + 3) + int64_t{TILE_TOKENS} * (a.head_dim + a.rank);
}

// The partial of query rows [split.first, split.last): of each `rank` accumulators, then the maximum and the sum.
template <class T>
void latent_split(const LatentDecode& a, const LatentSplit& split, float* partial, float* scratch) {
    const int rows = split.last - split.first, depth = a.head_dim, rope = depth - a.rank;
    const int64_t stride = a.partial_stride();
    float* q = scratch;
    float* scores = q + int64_t{rows} * depth;
    float* keys = scores + int64_t{rows} * TILE_TOKENS;
    float* values = keys + int64_t{TILE_TOKENS} * depth;
    float* running_maximum = values + int64_t{TILE_TOKENS} * a.rank;
    float* running_sum = running_maximum + rows;
    float* factor = running_sum + rows;
    for (int m = 0; m < rows; ++m) {
        const int query = (split.first + m) / a.num_heads, head = (split.first + m) % a.num_heads;
        const T* latent = static_cast<const T*>(a.q) + split.row * a.q_stride + query * a.q_query_stride +
                          head * a.q_head_stride;
        const T* rotated = static_cast<const T*>(a.q_rope) + split.row * a.rope_row_stride +
                           query * a.rope_query_stride + head * a.rope_head_stride;
        scaled_queries(latent, a.rank, a.scale, q + int64_t{m} * depth);
        scaled_queries(rotated, rope, a.scale, q + int64_t{m} * depth + a.rank);
        for (int d = 0; d < a.rank; d += LANES) store(partial + m * stride + d, Floats{});
        running_maximum[m] = -1e38f, running_sum[m] = 0;
    }
    const int last_visible = a.visible(split.row, split.last - 1);
    const int end = split.end < last_visible ? split.end : last_visible;
    for (int first = split.begin; first < end; first += TILE_TOKENS) {
        const int count = end - first < TILE_TOKENS ? end - first : TILE_TOKENS;
        int64_t offset[TILE_TOKENS];
        const float* value_rows[TILE_TOKENS];
        locate(a, split.row, first, count, offset);
        transpose_keys(static_cast<const T*>(a.k), offset, count, depth, keys);
        multiply<false>(q, depth, [&](int d) { return keys + d * TILE_TOKENS; }, rows, TILE_TOKENS, depth, nullptr,
                        scores, TILE_TOKENS);
        latent_soften(a, split, first, count, rows, scores, running_maximum, running_sum, factor);
        widen(static_cast<const T*>(a.k), offset, count, a.rank, values, value_rows);
        multiply<true>(scores, TILE_TOKENS, [&](int n) { return value_rows[n]; }, rows, a.rank, count, factor, partial,
                       stride);
    }
    for (int m = 0; m < rows; ++m) {
        partial[m * stride + a.rank] = running_maximum[m];
        partial[m * stride + a.rank + 1] = running_sum[m];
    }
}

// The outputs of query rows [first, last) of a row from its splits' partials, in their order. One that sees no token
// gives zeros.
template <class T>
void latent_combine(const LatentDecode& a, int row, int first, int last, const float* partials, int splits) {
    const int64_t stride = a.partial_stride(), size = a.query_rows() * stride;
    T* out = static_cast<T*>(a.out) + (int64_t{row} * a.query_rows() + first) * a.rank;
    for (int m = first; m < last; ++m, out += a.rank) {
        const float* part = partials + m * stride;
        const float* end = part + a.rank;  // maximum and sum
        if (a.visible(row, m) <= 0) {
            for (int d = 0; d < a.rank; d += LANES) store(out + d, Floats{});
            continue;
        }
        float most = end[0], total = 0;
        for (int s = 1; s < splits; ++s) most = end[s * size] > most ? end[s * size] : most;
        for (int s = 0; s < splits; ++s) total += end[s * size + 1] * exp2(splat(end[s * size] - most))[0];
        for (int d = 0; d < a.rank; d += LANES) {
            Floats value = {};
            for (int s = 0; s < splits; ++s) value += load(part + s * size + d) * exp2(splat(end[s * size] - most));
            store(out + d, value / total);
        }
    }
}

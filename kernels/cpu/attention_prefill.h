// Prefill: several query tokens a row, causal. Included by each isa_*.cc inside its namespace, after
// multiply.h and attention_decode.h.
//
// The query tokens of a tile times the heads of the group are rows of a matrix. For each tile of the KV:
// S = Q·Kᵀ with K transposed into scratch, the online softmax along each row, O = O·factor + P·V. No
// score outlives its tile (Dao et al., 2022). A row's sums run in the order of the KV positions whatever
// the tile it lies in, so its result does not depend on how a prompt was cut into chunks.

inline int padded_rows(int rows) { return (rows + STEP_ROWS - 1) / STEP_ROWS * STEP_ROWS; }

// A tile of tokens of the group's heads: at least one token, at most TILE_ROWS rows if the group allows.
inline int tile_rows(const Attention& a) {
    return padded_rows(a.group() > TILE_ROWS ? a.group() : TILE_ROWS);
}

// k[count, head_dim] → transposed [head_dim, TILE_TOKENS], zeros past `count`.
template <class T>
inline void transpose_keys(const T* base, const int64_t* offset, int count, int head_dim, float* transposed) {
    for (int n = 0; n < TILE_TOKENS; n += LANES) {
        for (int d = 0; d < head_dim; d += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = n + i < count ? load(base + offset[n + i] + d) : Floats{};
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(transposed + (d + i) * TILE_TOKENS + n, square[i]);
        }
    }
}

template <class T>
constexpr int prefill_rows() {
    return TILE_ROWS;
}

template <class T>
int64_t prefill_scratch(const Attention& a) {
    const int64_t rows = tile_rows(a);
    return rows * (2 * a.head_dim + TILE_TOKENS + 3) + 2 * int64_t{TILE_TOKENS} * a.head_dim;
}

template <class T>
void prefill_tile(const Attention& a, const QueryTile& tile, float* scratch) {
    const int group = a.group(), head_dim = a.head_dim;
    const int tokens = tile.end - tile.begin, rows = tokens * group, padded = padded_rows(rows);
    float* q = scratch;
    float* out = q + int64_t{padded} * head_dim;
    float* scores = out + int64_t{padded} * head_dim;
    float* keys = scores + int64_t{padded} * TILE_TOKENS;
    float* values = keys + int64_t{TILE_TOKENS} * head_dim;
    float* running_maximum = values + int64_t{TILE_TOKENS} * head_dim;
    float* running_sum = running_maximum + padded;
    float* factor = running_sum + padded;

    const int64_t head = int64_t{tile.kv_head} * group * head_dim;
    for (int t = 0; t < tokens; ++t) {
        const T* query = static_cast<const T*>(a.q) + (tile.begin + t) * a.q_stride + head;
        scaled_queries(query, int64_t{group} * head_dim, a.scale, q + int64_t{t} * group * head_dim);
    }
    for (int64_t i = int64_t{rows} * head_dim; i < int64_t{padded} * head_dim; ++i) q[i] = 0;
    for (int64_t i = 0; i < int64_t{padded} * head_dim; ++i) out[i] = 0;
    for (int m = 0; m < padded; ++m) running_maximum[m] = -1e38f, running_sum[m] = 0, factor[m] = 0;

    const int64_t start = int64_t{tile.kv_head} * head_dim;
    const int last_visible = tile.visible + tokens - 1;
    for (int first = 0; first < last_visible; first += TILE_TOKENS) {
        const int count = last_visible - first < TILE_TOKENS ? last_visible - first : TILE_TOKENS;
        int64_t offset[TILE_TOKENS];
        const float* value_rows[TILE_TOKENS];
        locate(a, tile.row, first, count, offset);
        transpose_keys(static_cast<const T*>(a.k) + start, offset, count, head_dim, keys);
        multiply<false>(q, head_dim, [&](int d) { return keys + d * TILE_TOKENS; }, padded, TILE_TOKENS, head_dim,
                        factor, scores, TILE_TOKENS);
        for (int m = 0; m < rows; ++m) {
            const int valid = tile.visible + m / group - first;
            factor[m] = soften(scores + int64_t{m} * TILE_TOKENS, valid, running_maximum + m, running_sum + m);
        }
        widen(static_cast<const T*>(a.v) + start, offset, count, head_dim, values, value_rows);
        multiply<true>(scores, TILE_TOKENS, [&](int n) { return value_rows[n]; }, padded, head_dim, count, factor, out,
                       head_dim);
    }
    for (int m = 0; m < rows; ++m) {
        T* result = static_cast<T*>(a.out) + (tile.begin + m / group) * (int64_t{a.num_heads} * head_dim) + head +
                    int64_t{m % group} * head_dim;
        const float* sums = out + int64_t{m} * head_dim;
        for (int d = 0; d < head_dim; d += LANES) store(result + d, load(sums + d) / running_sum[m]);
    }
}

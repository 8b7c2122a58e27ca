// linear for many tokens: y = x · weightᵀ + bias. Included by each isa_*.cc inside its namespace, after multiply.h.
//
// A strip of weight rows is transposed and widened into the cache, then multiplies all tokens of a block. The
// sum of an output runs over k in order, so its bits do not depend on the tokens beside it here either.

template <class T>
void linear_many_widen(const Linear& a, int64_t begin, int64_t end, float* widened) {
    const int64_t whole = a.columns - a.columns % LANES;
    for (int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
        float* to = widened + t * a.columns;
        for (int64_t k = 0; k < whole; k += LANES) store(to + k, load(x + k));
        for (int64_t k = whole; k < a.columns; ++k) to[k] = load_one(x + k);
    }
}

// `rows` ≤ STRIP weight rows, `depth` elements of each → strip [depth, STRIP], zeros past `rows`.
template <class T>
inline void transpose_weights(const T* weight, int64_t stride, int rows, int depth, float* strip) {
    const int whole = depth - depth % LANES;
    for (int n = 0; n < STRIP; n += LANES) {
        for (int k = 0; k < whole; k += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = n + i < rows ? load(weight + (n + i) * stride + k) : Floats{};
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(strip + (k + i) * STRIP + n, square[i]);
        }
        for (int k = whole; k < depth; ++k) {
            for (int i = n; i < n + LANES; ++i) strip[k * STRIP + i] = i < rows ? load_one(weight + i * stride + k) : 0;
        }
    }
}

inline int64_t linear_many_scratch(int64_t tokens) { return STRIP * (LINEAR_DEPTH + tokens); }

// Weight rows [first_row, last_row) against the widened tokens [begin, end).
template <class T>
void linear_many_rows(const Linear& a, const float* widened, int64_t begin, int64_t end, int64_t first_row,
                   int64_t last_row, float* scratch) {
    const int tokens = static_cast<int>(end - begin);
    const T* bias = static_cast<const T*>(a.bias);
    float* strip = scratch;
    float* sums = strip + STRIP * LINEAR_DEPTH;
    for (int64_t n = first_row; n < last_row; n += STRIP) {
        const int rows = static_cast<int>(last_row - n < STRIP ? last_row - n : STRIP);
        for (int64_t k = 0; k == 0 || k < a.columns; k += LINEAR_DEPTH) {
            const int depth = static_cast<int>(a.columns - k < LINEAR_DEPTH ? a.columns - k : LINEAR_DEPTH);
            transpose_weights(static_cast<const T*>(a.weight) + n * a.weight_stride + k, a.weight_stride, rows, depth,
                              strip);
            product(widened + begin * a.columns + k, a.columns, strip, tokens, STRIP, depth, k > 0, sums);
        }
        for (int t = 0; t < tokens; ++t) {
            write_sums(a, bias, begin + t, n, rows, sums + t * STRIP);
        }
    }
}

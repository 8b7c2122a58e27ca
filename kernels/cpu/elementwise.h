// rms_norm, rotary and silu_mul on a range of tokens. Included by each isa_*.cc inside its namespace, after simd.h.

template <class T>
void rms_norm(const void* x_, int64_t x_stride, const void* residual_, int64_t residual_stride, const void* weight_,
              void* y_, void* residual_out_, int64_t hidden, float eps, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(weight_);
    const int64_t whole = hidden - hidden % LANES;
    for (int64_t t = begin; t < end; ++t) {
        const T* r = static_cast<const T*>(x_) + t * x_stride;
        if (residual_ != nullptr) {
            const T* x = r;
            const T* residual = static_cast<const T*>(residual_) + t * residual_stride;
            T* sum_out = static_cast<T*>(residual_out_) + t * hidden;
            for (int64_t i = 0; i < whole; i += LANES) store(sum_out + i, load(x + i) + load(residual + i));
            for (int64_t i = whole; i < hidden; ++i) store_one(sum_out + i, load_one(x + i) + load_one(residual + i));
            r = sum_out;  // the norm is of the sum as it was rounded
        }
        Floats squares[2] = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats value = load(r + i);
            squares[(i / LANES) & 1] += value * value;
        }
        float total = sum(squares[0] + squares[1]);
        for (int64_t i = whole; i < hidden; ++i) total += load_one(r + i) * load_one(r + i);
        const float inverse = 1.f / __builtin_sqrtf(total / static_cast<float>(hidden) + eps);
        T* y = static_cast<T*>(y_) + t * hidden;
        for (int64_t i = 0; i < whole; i += LANES) store(y + i, load(r + i) * inverse * load(weight + i));
        for (int64_t i = whole; i < hidden; ++i) store_one(y + i, load_one(r + i) * inverse * load_one(weight + i));
    }
}

template <class T>
void rotate_halves(T* x, int64_t half, const float* cos, const float* sin) {
    const int64_t whole = half - half % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (int64_t i = whole; i < half; ++i) {
        const float a = load_one(x + i), b = load_one(x + half + i);
        store_one(x + i, a * cos[i] - b * sin[i]);
        store_one(x + half + i, b * cos[i] + a * sin[i]);
    }
}

template <class T>
void rotate_neighbours(T* x, int64_t half, const float* cos, const float* sin) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = load_one(x + 2 * i), b = load_one(x + 2 * i + 1);
        store_one(x + 2 * i, a * cos[i] - b * sin[i]);
        store_one(x + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
}

template <class T>
void rotary(void* x_, int64_t token_stride, int64_t head_stride, int64_t heads, int64_t head_dim, bool interleaved,
            const int64_t* positions, const float* cos_sin, int64_t begin, int64_t end) {
    const int64_t half = head_dim / 2;
    for (int64_t t = begin; t < end; ++t) {
        const float* cos = cos_sin + positions[t] * head_dim;
        T* x = static_cast<T*>(x_) + t * token_stride;
        for (int64_t h = 0; h < heads; ++h, x += head_stride) {
            if (interleaved) {
                rotate_neighbours(x, half, cos, cos + half);
            } else {
                rotate_halves(x, half, cos, cos + half);
            }
        }
    }
}

template <class T>
void silu_mul(const void* gate_up, int64_t stride, void* out_, int64_t size, int64_t begin, int64_t end) {
    const int64_t whole = size - size % LANES;
    for (int64_t t = begin; t < end; ++t) {
        const T* gate = static_cast<const T*>(gate_up) + t * stride;
        const T* up = gate + size;
        T* out = static_cast<T*>(out_) + t * size;
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats g = load(gate + i);
            const Floats power = g * -LOG2_E;
            // Past 2^127 the quotient is below the smallest normal number already.
            const Floats e = exp2(power < 127.f ? power : splat(127.f));
            store(out + i, g / (1.f + e) * load(up + i));
        }
        for (int64_t i = whole; i < size; ++i) {
            const float g = load_one(gate + i);
            const float power = g * -LOG2_E;
            const float e = exp2(splat(power < 127.f ? power : 127.f))[0];
            store_one(out + i, g / (1.f + e) * load_one(up + i));
        }
    }
}

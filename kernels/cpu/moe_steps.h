// What a mixture of experts needs beside products. Included by each isa_*.cc inside its namespace, after simd.h.

// Keeps the best of what it is offered, largest first; of equals the one that was offered first.
struct Best {
    int32_t* ids;
    float* values;
    int size;
    int count = 0;

    void offer(int32_t id, float value) {
        if (count == size && !(value > values[size - 1])) return;
        int at = count < size ? count++ : size - 1;
        for (; at > 0 && value > values[at - 1]; --at) {
            ids[at] = ids[at - 1];
            values[at] = values[at - 1];
        }
        ids[at] = id;
        values[at] = value;
    }
};

// scores[0 .. padded) of one token's logits. A score that is not finite stays so: exp2 alone would hide it.
template <class X>
inline void route_scores(const Route& r, const X* logits, float* scores) {
    const int64_t experts = r.experts, whole = experts - experts % LANES, padded = r.padded();
    for (int64_t i = 0; i < whole; i += LANES) store(scores + i, load(logits + i));
    for (int64_t i = whole; i < padded; ++i) scores[i] = i < experts ? load_one(logits + i) : -__builtin_inff();
    if (r.sigmoid) {
        for (int64_t i = 0; i < padded; i += LANES) {
            const Floats x = load(scores + i), power = x * -LOG2_E;
            const Floats y = 1.f / (1.f + exp2(power < 127.f ? power : splat(127.f)));
            store(scores + i, x == x ? y : x);
        }
        return;
    }
    Floats most = load(scores);
    for (int64_t i = LANES; i < padded; i += LANES) most = maximum(most, load(scores + i));
    const float peak = largest(most);
    Floats total = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        const Floats below = load(scores + i) - peak;
        const Floats y = exp2(below * LOG2_E);
        const Floats kept = below == below ? y : below;
        store(scores + i, kept);
        total += kept;
    }
    const float all = sum(total);
    for (int64_t i = 0; i < padded; i += LANES) store(scores + i, load(scores + i) / all);
}

// What a group counts by: its largest score, or the sum of its two largest.
inline float group_rank(const float* scores, int64_t size, bool two) {
    float first = scores[0], second = -1e38f;
    for (int64_t i = 1; i < size; ++i) {
        const float score = scores[i];
        second = score > first ? first : score > second ? score : second;
        first = score > first ? score : first;
    }
    return two ? first + second : first;
}

template <class T>
void moe_route(const Route& r, int64_t begin, int64_t end, float* scratch) {
    const int64_t size = r.experts / r.groups, slots = r.top_k + r.num_shared;
    float* scores = scratch;
    float* biased = scores + r.padded();
    for (int64_t t = begin; t < end; ++t) {
        int32_t* ids = r.ids + t * slots;
        float* weights = r.weights + t * slots;
        if (t >= r.present) {
            for (int64_t i = 0; i < slots; ++i) ids[i] = -1, weights[i] = 0;
            continue;
        }
        if (r.float_logits) {
            route_scores(r, static_cast<const float*>(r.logits) + t * r.logits_stride, scores);
        } else {
            route_scores(r, static_cast<const T*>(r.logits) + t * r.logits_stride, scores);
        }
        const float* choice = scores;
        if (r.bias != nullptr) {
            for (int64_t i = 0; i < r.experts; ++i) biased[i] = scores[i] + r.bias[i];
            choice = biased;
        }
        bool kept[ROUTE_MOST] = {};
        int32_t group_ids[ROUTE_MOST];
        float values[ROUTE_MOST];
        if (r.top_groups < r.groups) {
            Best groups{group_ids, values, r.top_groups};
            for (int32_t g = 0; g < r.groups; ++g) groups.offer(g, group_rank(choice + g * size, size, r.sigmoid));
            for (int32_t i = 0; i < r.top_groups; ++i) kept[group_ids[i]] = true;
        }
        Best best{ids, values, r.top_k};
        for (int64_t g = 0; g < r.groups; ++g) {
            if (r.top_groups < r.groups && !kept[g]) continue;
            for (int64_t i = g * size; i < (g + 1) * size; ++i) best.offer(static_cast<int32_t>(i), choice[i]);
        }
        float total = 1e-20f;
        for (int32_t i = 0; i < r.top_k; ++i) total += scores[ids[i]];
        for (int32_t i = 0; i < r.top_k; ++i) {
            weights[i] = (r.normalise ? scores[ids[i]] / total : scores[ids[i]]) * r.scale;
        }
        for (int32_t i = 0; i < r.num_shared; ++i) ids[r.top_k + i] = r.experts + i, weights[r.top_k + i] = 1;
    }
}

// sums += weight · values. Whoever cuts them does so at multiples of LANES: what is left behind the last vector may
// round otherwise.
inline void add_weighted(float* sums, const float* values, float weight, int64_t size) {
    const int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(sums + i, fused(splat(weight), load(values + i), load(sums + i)));
    for (int64_t i = whole; i < size; ++i) sums[i] += weight * values[i];
}

template <class T>
void round_all(const float* values, void* out_, int64_t size) {
    T* out = static_cast<T*>(out_);
    const int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(values + i));
    for (int64_t i = whole; i < size; ++i) store_one(out + i, values[i]);
}

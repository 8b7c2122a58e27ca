// A token from a row of logits, by the parameters of its slot. Included by each isa_*.cc inside its namespace, after
// simd.h. The reference (reference/sample.py) is its specification.
//
// Nothing is sorted. top_k takes the k-th largest of those that are at least the k-th largest of the chunks' largest;
// top_p adds up masses in buckets of nearly equal probabilities and sorts the one bucket in which it is reached.

constexpr int64_t SAMPLE_CHUNK = 128;
constexpr int BUCKET_SHIFT = 17;  // of a float's bits: the exponent and six bits below it
constexpr int64_t NUM_BUCKETS = (0x3f800000 >> BUCKET_SHIFT) + 1;  // up to 1

inline Floats at_least(Floats x, float least) { return x >= splat(least) ? x : Floats{}; }

// The elements p[i..i+LANES) of `count`, `rest` past its end.
inline Floats load_row(const float* p, int64_t i, int64_t count, float rest) {
    if (i + LANES <= count) return load(p + i);
    float padded[LANES];
    for (int lane = 0; lane < LANES; ++lane) padded[lane] = i + lane < count ? p[i + lane] : rest;
    return load(padded);
}

constexpr int64_t SEARCHED = 1024;  // logits among which the first of the largest is looked for

// The largest of a row and the part that holds its first one. The largest is NaN if the row holds one that is not
// below infinity, or none above minus infinity.
struct Largest {
    float value;
    int64_t begin;
};

inline Largest largest_usable(const float* x, int64_t count) {
    const Floats infinity = splat(__builtin_inff());
    Largest found{-__builtin_inff(), 0};
    Ints wrong = {};
    for (int64_t begin = 0; begin < count; begin += SEARCHED) {
        const int64_t end = begin + SEARCHED < count ? begin + SEARCHED : count;
        Floats one = -infinity, other = -infinity;
        int64_t i = begin;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            const Floats a = load(x + i), b = load(x + i + LANES);
            one = maximum(one, a);
            other = maximum(other, b);
            wrong |= ~((a < infinity) & (b < infinity));
        }
        for (; i < end; i += LANES) {
            const Floats a = load_row(x, i, end, -__builtin_inff());
            one = maximum(one, a);
            wrong |= ~(a < infinity);
        }
        const float most = maximum(maximum(one, other));
        if (most > found.value) found = {most, begin};
    }
    for (int lane = 0; lane < LANES; ++lane) {
        if (wrong[lane] != 0) found.value = __builtin_nanf("");
    }
    if (found.value == -__builtin_inff()) found.value = __builtin_nanf("");
    return found;
}

inline void edit_row(const Sampling& s, int64_t slot, float* x) {
    const float* bias = s.bias + slot * s.vocab;
    const int32_t* seen = s.seen + slot * s.vocab;
    const float repetition = s.repetition[slot], presence = s.presence[slot], frequency = s.frequency[slot];
    const bool waits = s.length[slot] < s.min_length[slot];
    for (int64_t i = 0; i < s.vocab; ++i) {
        float value = x[i] + bias[i];
        if (seen[i] != 0) {
            const int32_t count = seen[i] & SEEN_COUNT;
            if ((seen[i] & (SEEN_COUNT | SEEN_PROMPT)) != 0) value = value > 0 ? value / repetition : value * repetition;
            value = value - frequency * static_cast<float>(count) - (count > 0 ? presence : 0.f);
            if (waits && (seen[i] & SEEN_STOP) != 0) value = -__builtin_inff();
        }
        x[i] = value;
    }
}

inline void mask_row(const Sampling& s, int64_t slot, float* x) {
    const uint32_t* mask = reinterpret_cast<const uint32_t*>(s.mask + slot * s.mask_words);
    for (int64_t word = 0; word * 32 < s.vocab; ++word) {
        for (uint32_t forbidden = ~mask[word]; forbidden != 0; forbidden &= forbidden - 1) {
            const int64_t i = word * 32 + __builtin_ctz(forbidden);
            if (i < s.vocab) x[i] = -__builtin_inff();
        }
    }
}

// Unnormalised probabilities of a row, the largest exactly 1, padded with zeros to whole chunks.
struct Probabilities {
    float* p;
    float* most;   // of each chunk, where something is cut
    double* mass;  // of each chunk; cumulative once it was searched
    int64_t chunks;
};

inline void exponentials(const float* x, int64_t count, float best, float temperature, const Probabilities& to) {
    const Floats most = splat(best), factor = splat(LOG2_E / temperature);
    for (int64_t c = 0; c < to.chunks; ++c) {
        Floats total = {};
        for (int64_t i = c * SAMPLE_CHUNK; i < (c + 1) * SAMPLE_CHUNK; i += LANES) {
            const Floats value = i < count ? load_row(x, i, count, -__builtin_inff()) : splat(-__builtin_inff());
            const Floats p = exp2((value - most) * factor);
            store(to.p + i, p);
            total += p;
        }
        to.mass[c] = sum(total);
    }
}

inline void find_most(const Probabilities& of) {
    for (int64_t c = 0; c < of.chunks; ++c) {
        Floats largest = {};
        for (int64_t i = 0; i < SAMPLE_CHUNK; i += LANES) largest = maximum(largest, load(of.p + c * SAMPLE_CHUNK + i));
        of.most[c] = maximum(largest);
    }
}

// Those that are at least `floor`, into `room`, which has as many floats as p; returns how many.
inline int64_t collect(const Probabilities& of, float floor, float* room) {
    int64_t found = 0;
    for (int64_t c = 0; c < of.chunks; ++c) {
        if (of.most[c] < floor) continue;
        const float* p = of.p + c * SAMPLE_CHUNK;
        for (int64_t i = 0; i < SAMPLE_CHUNK; ++i) {
            room[found] = p[i];
            found += p[i] >= floor;
        }
    }
    return found;
}

// The sum of those that are at least `cut`, of each chunk and in all.
inline double masses(const Probabilities& of, float cut) {
    double total = 0;
    for (int64_t c = 0; c < of.chunks; ++c) {
        Floats mass = {};
        for (int64_t i = 0; i < SAMPLE_CHUNK; i += LANES) mass += at_least(load(of.p + c * SAMPLE_CHUNK + i), cut);
        total += of.mass[c] = sum(mass);
    }
    return total;
}

// The k-th largest of p, k ≥ 1 below the vocabulary.
inline float kth_largest(const Probabilities& of, int64_t k, float* room) {
    float floor = 0;
    if (k <= of.chunks) {
        for (int64_t c = 0; c < of.chunks; ++c) room[c] = of.most[c];
        select_descending(room, of.chunks, k - 1);
        floor = room[k - 1];
    }
    const int64_t found = collect(of, floor, room);
    select_descending(room, found, k - 1);
    return room[k - 1];
}

// The least probability that top_p keeps of those that are at least `cut`. `buckets`: NUM_BUCKETS.
inline float least_of_nucleus(const Probabilities& of, float cut, float top_p, double* buckets, float* room) {
    const double total = masses(of, cut), share = static_cast<double>(top_p);
    // All that are smaller weigh together less than the nucleus leaves out.
    const float bound = static_cast<float>((1 - share) * total / static_cast<double>(of.chunks * SAMPLE_CHUNK));
    const int64_t found = collect(of, bound > cut ? bound : cut, room);
    const auto bucket = [](float p) { return static_cast<int64_t>(bit_copy<uint32_t>(p) >> BUCKET_SHIFT); };
    for (int64_t b = 0; b < NUM_BUCKETS; ++b) buckets[b] = 0;
    for (int64_t i = 0; i < found; ++i) buckets[bucket(room[i])] += room[i];
    const double target = share * total;
    double held = 0;
    int64_t last = NUM_BUCKETS - 1;
    while (last > 0 && held + buckets[last] < target) held += buckets[last--];
    int64_t inside = 0;
    for (int64_t i = 0; i < found; ++i) {
        const float p = room[i];
        room[inside] = p;
        inside += bucket(p) == last;
    }
    sort_descending(room, inside);
    float least = cut;
    for (int64_t i = 0; i < inside; ++i) {
        least = room[i];
        held += least;
        if (held >= target) break;
    }
    return least;
}

// The first token whose cumulative probability, of those that are at least `cut`, exceeds `number` of the whole.
inline int64_t inverse_of_cumulative(const Probabilities& of, float cut, double number) {
    if (cut > 0) masses(of, cut);
    int64_t last = 0;  // chunk that has any
    for (int64_t c = 1; c < of.chunks; ++c) {
        if (of.mass[c] > 0) last = c;
        of.mass[c] += of.mass[c - 1];
    }
    const double target = number * of.mass[of.chunks - 1];
    int64_t c = 0;
    while (c < last && of.mass[c] <= target) ++c;
    double held = c == 0 ? 0 : of.mass[c - 1];
    int64_t token = c * SAMPLE_CHUNK;
    for (int64_t i = token; i < (c + 1) * SAMPLE_CHUNK; ++i) {
        if (of.p[i] == 0 || of.p[i] < cut) continue;
        token = i;  // rounding may bring the target up to the chunk's mass: then it is the last that has any
        held += of.p[i];
        if (held > target) break;
    }
    return token;
}

inline int64_t sample_chunks(int64_t vocab) { return (vocab + SAMPLE_CHUNK - 1) / SAMPLE_CHUNK; }

// Floats of memory that a row takes.
inline int64_t sample_scratch(int64_t vocab) {
    const int64_t chunks = sample_chunks(vocab);
    return 2 * chunks * SAMPLE_CHUNK + 3 * ((chunks + 15) / 16 * 16) + 2 * NUM_BUCKETS;
}

inline int32_t sample_row(const Sampling& s, int64_t row, float* memory) {
    const int64_t slot = s.slots[row], vocab = s.vocab;
    float* x = s.logits + row * vocab;
    Largest best = largest_usable(x, vocab);
    if (best.value != best.value) return NO_TOKEN;
    const int32_t features = s.features[slot];
    if ((features & SAMPLE_EDITS) != 0) edit_row(s, slot, x);
    if ((features & SAMPLE_MASKED) != 0) mask_row(s, slot, x);
    if ((features & (SAMPLE_EDITS | SAMPLE_MASKED)) != 0) best = largest_usable(x, vocab);
    if (best.value != best.value) return NO_TOKEN;
    if ((features & SAMPLE_RANDOM) == 0) {
        int64_t i = best.begin;
        while (x[i] != best.value) ++i;
        return static_cast<int32_t>(i);
    }
    Probabilities of;
    of.chunks = sample_chunks(vocab);
    const int64_t padded = (of.chunks + 15) / 16 * 16;
    of.mass = reinterpret_cast<double*>(memory);
    double* buckets = of.mass + padded;
    of.most = reinterpret_cast<float*>(buckets + NUM_BUCKETS);
    of.p = of.most + padded;
    float* room = of.p + of.chunks * SAMPLE_CHUNK;
    exponentials(x, vocab, best.value, s.temperature[slot], of);
    float cut = s.min_p[slot];
    const int64_t k = s.top_k[slot];
    if (k > 0 || s.top_p[slot] < 1) find_most(of);
    if (k > 0 && k < vocab) {
        const float kth = kth_largest(of, k, room);
        cut = kth > cut ? kth : cut;
    }
    if (s.top_p[slot] < 1) cut = least_of_nucleus(of, cut, s.top_p[slot], buckets, room);
    return static_cast<int32_t>(inverse_of_cumulative(of, cut, uniform(s.seed[slot], s.length[slot])));
}

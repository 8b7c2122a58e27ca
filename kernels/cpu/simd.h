// Vectors of LANES floats in GCC's and Clang's vector extensions: one source for every instruction set.
// Included by each isa_*.cc inside its own namespace, after its target is set; so no include guard, and
// nothing here may be shared between them.

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_copy(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

inline Floats splat(float x) { return x - Floats{}; }  // nothing is left to compute, as −0 + 0 would be

inline Floats load(const float* p) {
    Floats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

inline Floats load(const BFloat16* p) {
    Halves x;
    __builtin_memcpy(&x, p, sizeof x);
    return bit_copy<Floats>(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

// To nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* p, Floats x) {
    const Words bits = bit_copy<Words>(x);
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = x == x ? rounded : Words{} + 0x7fc0;
    const Halves halves = __builtin_convertvector(rounded, Halves);
    __builtin_memcpy(p, &halves, sizeof halves);
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const BFloat16* p) { return bit_copy<float>(uint32_t{p->bits} << 16); }
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(BFloat16* p, float x) {
    const uint32_t bits = bit_copy<uint32_t>(x);
    p->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
}

// a · b + c. Written out where a sum must have the same bits however its loop was compiled: left to itself, GCC 13
// fuses some chains of them and splits others (seen as a float32 product whose bits changed with its batch).
inline Floats fused(Floats a, Floats b, Floats c) {
#if TOKENSPEED_FUSED_BITS == 512
    return bit_copy<Floats>(_mm512_fmadd_ps(bit_copy<__m512>(a), bit_copy<__m512>(b), bit_copy<__m512>(c)));
#elif TOKENSPEED_FUSED_BITS == 256
    return bit_copy<Floats>(_mm256_fmadd_ps(bit_copy<__m256>(a), bit_copy<__m256>(b), bit_copy<__m256>(c)));
#else
    return a * b + c;
#endif
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
    using type = Lanes<I...>;
};
using AllLanes = CountLanes<LANES>::type;

// Lanes against those S apart, S = LANES / 2 … 1: a scalar loop over the lanes would take four cycles for each.
template <int S, int... I>
inline Floats exchanged(Floats x, Lanes<I...>) {
    return __builtin_shufflevector(x, x, (I ^ S)...);
}
template <int S = LANES / 2>
inline float sum(Floats x) {
    x += exchanged<S>(x, AllLanes{});
    if constexpr (S > 1) {
        return sum<S / 2>(x);
    } else {
        return x[0];
    }
}
template <int S = LANES / 2>
inline float largest(Floats x) {
    x = maximum(x, exchanged<S>(x, AllLanes{}));
    if constexpr (S > 1) {
        return largest<S / 2>(x);
    } else {
        return x[0];
    }
}

// a0 b0 a1 b1 …: the first LANES of them into a, the others into b.
template <int... I>
inline void interleave(Floats& a, Floats& b, Lanes<I...>) {
    const Floats first = __builtin_shufflevector(a, b, ((I & 1) * LANES + I / 2)...);
    b = __builtin_shufflevector(a, b, ((I & 1) * LANES + LANES / 2 + I / 2)...);
    a = first;
}

// One exchange of a transpose: lanes whose index has bit S come from b, the others from a; `low` takes the
// element without bit S of each, `high` the one with it.
template <int S, int... I>
inline Floats low(Floats a, Floats b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, ((I & S) == 0 ? I : LANES + I - S)...);
}
template <int S, int... I>
inline Floats high(Floats a, Floats b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, ((I & S) == 0 ? I + S : LANES + I)...);
}

template <int S = 1>
inline void transpose(Floats* x) {
    for (int i = 0; i < LANES; ++i) {
        if (i & S) continue;
        const Floats a = x[i], b = x[i + S];
        x[i] = low<S>(a, b, AllLanes{});
        x[i + S] = high<S>(a, b, AllLanes{});
    }
    if constexpr (S * 2 < LANES) transpose<S * 2>(x);
}

// Lane i of the result is the sum of x[i]: a transpose that adds as it goes.
template <int S = 1>
inline Floats sum_each(Floats* x) {
    for (int i = 0; i < LANES; i += 2 * S) {
        x[i] = low<S>(x[i], x[i + S], AllLanes{}) + high<S>(x[i], x[i + S], AllLanes{});
    }
    if constexpr (S * 2 < LANES) {
        return sum_each<S * 2>(x);
    } else {
        return x[0];
    }
}

template <int... I>
inline Ints lane_indices(Lanes<I...>) {
    return Ints{I...};
}
inline Ints lane_index() { return lane_indices(AllLanes{}); }

// 2^x for x ≤ 127, exactly 0 below -126. x = n + r with |r| ≤ 1/2; Taylor series of e^(r ln 2) to r^7,
// relative error below 1e-8 before rounding.
inline Floats exp2(Floats x) {
    const Floats shift = splat(12582912.f);  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
    const Floats safe = maximum(x, splat(-126.f));
    const Floats shifted = safe + shift;
    const Floats r = safe - (shifted - shift);
    const Ints n = bit_copy<Ints>(shifted) - bit_copy<Ints>(shift);
    Floats p = splat(1.5252733804e-5f);
    p = p * r + 1.5403530394e-4f;
    p = p * r + 1.3333558146e-3f;
    p = p * r + 9.6181291076e-3f;
    p = p * r + 5.5504108665e-2f;
    p = p * r + 2.4022650696e-1f;
    p = p * r + 6.9314718056e-1f;
    p = p * r + 1.f;
    const Floats y = bit_copy<Floats>(bit_copy<Ints>(p) + (n << 23));
    return x < -126.f ? Floats{} : y;
}

constexpr float LOG2_E = 1.4426950408889634f;

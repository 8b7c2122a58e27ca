// The products of pairs of one instruction set, put into a table. Included by each isa_*.cc that has them inside its
// namespace, after pair_vectors.h or pair_tiles.h.

namespace {
template <class Pairs>
constexpr void use_pairs(Kernels& kernels, Form form, Pairs pairs) {
    kernels.forms[static_cast<int>(form)].pairs_pack = pairs_pack<false>;
    kernels.forms[static_cast<int>(form)].pairs = pairs;
}

template <class F>
constexpr void use_scaled(Kernels& kernels, Form form) {
    kernels.forms[static_cast<int>(form)].pairs_pack = scaled_pack<F>;
    kernels.forms[static_cast<int>(form)].pairs = scaled_pairs<F>;
}

// Five and six bits: only where they are rounded, for many tokens.
template <class View>
void only_rounded_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                        float* scratch) {
    rounded_pairs<View>(a, Pairs(packed, end - begin, a.groups()), begin, first, last, scratch);
}
template <class View>
constexpr void use_rounded(Kernels& kernels, Form form) {
    use_pairs(kernels, form, only_rounded_pairs<View>);
    kernels.forms[static_cast<int>(form)].pairs_of_many = true;
}

constexpr Kernels with_pairs(Kernels kernels) {
    use_pairs(kernels, Form::panels, plain_pairs);
    use_scaled<NibblePairs<Half, false>>(kernels, Form::q4_0);
    use_scaled<NibblePairs<Half, true>>(kernels, Form::q4_1);
    use_scaled<NibblePairs<float, true>>(kernels, Form::q4_k);
    use_scaled<BytePairs>(kernels, Form::q8_0);
    use_rounded<WideNibbles<5, Half, false, 1>>(kernels, Form::q5_0);
    use_rounded<WideNibbles<5, Half, true, 1>>(kernels, Form::q5_1);
    use_rounded<WideNibbles<5, float, true, 1>>(kernels, Form::q5_k);
    use_rounded<WideNibbles<6, float, false, 2>>(kernels, Form::q6_k);
    use_rounded<WideNibbles<6, float, true, 2>>(kernels, Form::mixed);
    return kernels;
}
}  // namespace

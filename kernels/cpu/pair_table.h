// The products of pairs of one instruction set, put into a table. Included by each isa_*.cc that has them inside its
// namespace, after pair_vectors.h or pair_tiles.h.

namespace {
template <class F>
constexpr void use_pairs(Kernels& kernels, Form form) {
    kernels.forms[static_cast<int>(form)].pairs_pack = pairs_pack<F::MINIMUMS>;
    kernels.forms[static_cast<int>(form)].pairs = scaled_pairs<F>;
}

constexpr Kernels with_pairs(Kernels kernels) {
    kernels.forms[static_cast<int>(Form::panels)].pairs_pack = pairs_pack<false>;
    kernels.forms[static_cast<int>(Form::panels)].pairs = plain_pairs;
    use_pairs<NibblePairs<Half, false>>(kernels, Form::q4_0);
    use_pairs<NibblePairs<Half, true>>(kernels, Form::q4_1);
    use_pairs<NibblePairs<float, true>>(kernels, Form::q4_k);
    use_pairs<BytePairs>(kernels, Form::q8_0);
    return kernels;
}
}  // namespace

// The table of one instruction set. Included last by each isa_*.cc inside its namespace.

namespace {
template <class T>
constexpr Kernels table_of() {
    return Kernels{
        .item_size = sizeof(T),
        .decode_scratch = decode_scratch<T>,
        .decode_split = decode_split<T>,
        .decode_combine = decode_combine<T>,
        .prefill_rows = prefill_rows<T>(),
        .prefill_scratch = prefill_scratch<T>,
        .prefill_tile = prefill_tile<T>,
        .rms_norm = rms_norm<T>,
        .rotary = rotary<T>,
        .silu_mul = silu_mul<T>,
        .linear_few_pack = linear_few_pack<T>,
        .linear_few_rows = linear_few_rows<T>,
        .linear_many_widen = linear_many_widen<T>,
        .linear_strip = STRIP,
        .linear_many_scratch = linear_many_scratch,
        .linear_many_rows = linear_many_rows<T>,
        .panels_widen = panels_widen<T>,
        .sample_scratch = sample_scratch,
        .sample_row = sample_row,
        .forms = {{}, form_of<typename PlainOf<T>::type, T>(), form_of<Nibbles<Half, false>, T>(),
                  form_of<Nibbles<Half, true>, T>(), form_of<Nibbles<float, true>, T>(), form_of<Bytes, T>(),
                  form_of<WideNibbles<5, Half, false, 1>, T>(), form_of<WideNibbles<5, Half, true, 1>, T>(),
                  form_of<WideNibbles<5, float, true, 1>, T>(), form_of<WideNibbles<6, float, false, 2>, T>(),
                  form_of<WideNibbles<6, float, true, 2>, T>()},
        .moe_route = moe_route<T>,
        .add_weighted = add_weighted,
        .round_all = round_all<T>,
        .latent_split_scratch = latent_split_scratch,
        .latent_split = latent_split<T>,
        .latent_combine = latent_combine<T>,
        .latent_project = latent_project<T>,
        .latent_expand_scratch = latent_expand_scratch,
        .latent_expand = latent_expand<T>,
        .latent_tile_scratch = latent_tile_scratch,
        .latent_tile = latent_tile<T>,
    };
}
}  // namespace

#ifndef TOKENSPEED_BFLOAT16_PRODUCTS
const Kernels* table(Type type) {
    static constexpr Kernels f32 = table_of<float>(), bf16 = table_of<BFloat16>();
    return type == Type::f32 ? &f32 : &bf16;
}
#endif

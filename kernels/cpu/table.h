// The table of one instruction set. Included last by each isa_*.cc inside its namespace.

namespace {
template <class T>
constexpr Kernels table_of() {
    return Kernels{
        .decode_scratch = decode_scratch,
        .decode_split = decode_split<T>,
        .decode_combine = decode_combine<T>,
        .prefill_scratch = prefill_scratch,
        .prefill_tile = prefill_tile<T>,
        .rms_norm = rms_norm<T>,
        .rotary = rotary<T>,
        .silu_mul = silu_mul<T>,
    };
}
}  // namespace

const Kernels* table(Type type) {
    static constexpr Kernels f32 = table_of<float>();
    static constexpr Kernels bf16 = table_of<BFloat16>();
    return type == Type::f32 ? &f32 : &bf16;
}

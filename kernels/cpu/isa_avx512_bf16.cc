// x86-64 with AVX-512 F, BW, DQ and VL, and its bfloat16 products.
// Everything compiled for it is local to this file: the linker must never pick such a function for another.
#include "kernels.h"
#include "mla.h"
#include "sampling_cut.h"

#if defined(__x86_64__)
#include <immintrin.h>

// Told by hand: whether a target pragma defines the compiler's own macros depends on its version (GCC 12: no).
#define TOKENSPEED_FUSED_BITS 512
#define TOKENSPEED_BFLOAT16_PRODUCTS

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a boundary between files
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")

namespace tokenspeed::cpu::avx512 {
const Kernels* table(Type);
}

namespace tokenspeed::cpu::avx512_bf16 {
namespace {
constexpr int LANES = 16;
#include "simd.h"
#include "multiply.h"
#include "elementwise.h"
#include "linear_few.h"
#include "linear_many.h"
#include "linear_pairs.h"
#include "panels.h"
#include "pairs.h"
#include "pair_vectors.h"
#include "attention_decode.h"
#include "attention_prefill.h"
#include "attention_pairs.h"
#include "attention_columns.h"
#include "attention_packed.h"
#include "mla_soften.h"
#include "mla_decode.h"
#include "mla_prefill.h"
#include "mla_packed.h"
#include "moe_steps.h"
#include "sampling.h"
}  // namespace
#include "pair_table.h"
#include "table.h"

const Kernels* table(Type type) {
    if (type == Type::f32) return avx512::table(type);  // the same instructions
    static constexpr Kernels bf16 = with_packed_latents(with_pairs(table_of<BFloat16>()));
    return &bf16;
}
}  // namespace tokenspeed::cpu::avx512_bf16
#endif

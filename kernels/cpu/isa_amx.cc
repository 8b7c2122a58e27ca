// x86-64 with AVX-512, its bfloat16 products and AMX tiles of bfloat16: what tiles do better, the rest is
// isa_avx512_bf16.cc's. Everything compiled for it is local to this file: the linker must never pick such a function
// for another.
#include "kernels.h"
#include "mla.h"

#if defined(__x86_64__)
#include <immintrin.h>

// Told by hand: whether a target pragma defines the compiler's own macros depends on its version (GCC 12: no).
#define TOKENSPEED_FUSED_BITS 512
#define TOKENSPEED_BFLOAT16_PRODUCTS
#define TOKENSPEED_TILES

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a boundary between files
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")

namespace tokenspeed::cpu::avx512_bf16 {
const Kernels* table(Type);
}

namespace tokenspeed::cpu::amx {
namespace {
constexpr int LANES = 16;
#include "simd.h"
#include "multiply.h"
#include "linear_few.h"
#include "linear_many.h"
#include "panels.h"
#include "pairs.h"
#include "pair_order.h"
#include "pair_tiles.h"
#include "attention_decode.h"
#include "attention_prefill.h"
#include "attention_pairs.h"
#include "attention_tiles.h"
#include "attention_packed.h"
#include "mla_soften.h"
#include "mla_decode.h"
#include "mla_packed.h"

inline Kernels with_packed_attention(Kernels kernels) {
    kernels.decode_scratch = decode_scratch<BFloat16>;
    kernels.decode_split = decode_split<BFloat16>;
    kernels.prefill_rows = prefill_rows<BFloat16>();
    kernels.prefill_scratch = prefill_scratch<BFloat16>;
    kernels.prefill_tile = prefill_tile<BFloat16>;
    return kernels;
}
}  // namespace
#include "pair_table.h"

const Kernels* table(Type type) {
    if (type == Type::f32) return avx512_bf16::table(type);
    static const Kernels bf16 = with_packed_latents(with_packed_attention(with_pairs(*avx512_bf16::table(type))));
    return &bf16;
}
}  // namespace tokenspeed::cpu::amx
#endif

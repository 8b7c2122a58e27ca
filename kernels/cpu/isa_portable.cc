// Every processor: vectors of four floats, which any compiler target has or emulates.
#include "kernels.h"
#include "mla.h"
#include "sampling_cut.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a boundary between files

namespace tokenspeed::cpu::portable {
namespace {
constexpr int LANES = 4;
#include "simd.h"
#include "multiply.h"
#include "elementwise.h"
#include "linear_few.h"
#include "linear_many.h"
#include "panels.h"
#include "attention_decode.h"
#include "attention_prefill.h"
#include "mla_soften.h"
#include "mla_decode.h"
#include "mla_prefill.h"
#include "moe_steps.h"
#include "sampling.h"
}  // namespace
#include "table.h"
}  // namespace tokenspeed::cpu::portable

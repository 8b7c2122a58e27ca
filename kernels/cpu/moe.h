// A mixture of experts: routing, and the experts' feed-forward.
#pragma once

#include <cstdint>

namespace tokenspeed::cpu {

struct Kernels;

constexpr int ROUTE_MOST = 64;      // experts a token may name, and groups
constexpr int EXPERT_PAIRS = 1024;  // (token, expert) pairs whose intermediate results are held together

// The choice of each token, as ops.MoeRoute says: the `top_k` best of `experts` within the best groups, then the
// shared ones. ids and weights are [tokens, top_k + num_shared], contiguous.
struct Route {
    const void* logits;
    const float* bias;  // or null
    int32_t* ids;
    float* weights;
    int64_t logits_stride;
    int64_t tokens;
    int64_t present;  // tokens from here on are padding: id -1, weight 0
    int32_t experts;
    int32_t top_k;
    int32_t num_shared;
    int32_t groups;
    int32_t top_groups;
    float scale;
    bool float_logits;  // float32, whatever the type
    bool sigmoid;
    bool normalise;

    int64_t padded() const { return (int64_t{experts} + 15) / 16 * 16; }
    int64_t scratch() const { return 2 * padded(); }
};

// out[t] = Σ over slots of weight · down[e] · (silu(gate[e] · x[t]) · (up[e] · x[t])). gate_up [experts, 2 · inner,
// hidden] and down [experts, hidden, inner] are contiguous, so are ids and weights [tokens, slots] and out.
struct Experts {
    const void* x;
    const void* gate_up;
    const void* down;
    void* out;
    const int32_t* ids;  // -1 is an empty slot
    const float* weights;
    int64_t x_stride;
    int64_t tokens;
    int64_t slots;
    int64_t experts;
    int64_t hidden;
    int64_t inner;
};

void moe_route(const Kernels&, const Route&, int threads);
// Returns OK, or the first token that names an expert which does not exist; nothing is written then.
int64_t moe_experts(const Kernels&, const Experts&, int threads);

}  // namespace tokenspeed::cpu

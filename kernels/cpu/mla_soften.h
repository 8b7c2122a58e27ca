// The online softmax of latent attention. Included by each isa_*.cc inside its namespace, after attention_decode.h.

// Scores [rows, TILE_TOKENS] of a split's query rows, from token `first` of the KV on, become weights, zeros where a
// row sees less than all `count`; rows behind those of the split see nothing. factor[m] is what earlier sums of row m
// are multiplied with.
inline void latent_soften(const LatentDecode& a, const LatentSplit& split, int first, int count, int rows,
                          float* scores, float* running_maximum, float* running_sum, float* factor) {
    for (int m = 0; m < rows; ++m, scores += TILE_TOKENS) {
        const int seen = split.first + m < split.last ? a.visible(split.row, split.first + m) - first : 0;
        if (seen > 0) {
            factor[m] = soften(scores, seen < count ? seen : count, running_maximum + m, running_sum + m);
            continue;
        }
        factor[m] = 1;
        for (int n = 0; n < TILE_TOKENS; n += LANES) store(scores + n, Floats{});
    }
}

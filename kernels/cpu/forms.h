// How a weight matrix [rows, columns] can lie in memory, beside as it is (`rows`). Each packed form is panels of
// PANEL_ROWS rows (the last padded with zeros), a panel is groups of GROUP columns, a group is
//   PANEL_ROWS scales, PANEL_ROWS minimums (where the form has them), then words [GROUP / parts, PANEL_ROWS] of 32 bits.
// Word w of a row holds `parts` elements, i · (GROUP / parts) + w at bits [i · 32 / parts, (i + 1) · 32 / parts).
// Of five and six bits the lower four lie so; behind them come one or two words of the upper u = 1 or 2 bits: those of
// element i · 4 + w at bit 4 · i + u · w % 4 of word u · w / 4. Two scales a row are for 16 columns each.
// kernels/forms.py writes them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {

enum class Form {
    rows,
    panels,  // the type of the activations
    q4_0,    // four bits, 8 is zero, half-precision scales
    q4_1,    // four bits, half-precision scales and minimums
    q4_k,    // four bits, float scales and minimums
    q8_0,    // eight bits, signed, half-precision scales
    q5_0,    // five bits, 16 is zero, half-precision scales
    q5_1,    // five bits, half-precision scales and minimums
    q5_k,    // five bits, float scales and minimums
    q6_k,    // six bits, 32 is zero, two float scales
    mixed,   // six bits, two float scales and minimums
};
constexpr int NUM_FORMS = 11;

constexpr int64_t PANEL_ROWS = 16;
constexpr int64_t GROUP = 32;

constexpr int64_t plain_group_bytes(int64_t item) { return GROUP * PANEL_ROWS * item; }
constexpr int64_t nibble_group_bytes(int64_t scale, bool minimums) {
    return PANEL_ROWS * (scale * (minimums ? 2 : 1) + GROUP / 2);
}
constexpr int64_t split_group_bytes(int bits, int64_t scale, bool minimums, int spans) {
    return PANEL_ROWS * (scale * (minimums ? 2 : 1) * spans + GROUP * bits / 8);
}
constexpr int64_t byte_group_bytes() { return PANEL_ROWS * (2 + GROUP); }

}  // namespace tokenspeed::cpu

// How a weight matrix [rows, columns] can lie in memory, beside as it is (`rows`). Each packed form is panels of
// PANEL_ROWS rows (the last padded with zeros), a panel is groups of GROUP columns, a group is
//   PANEL_ROWS scales, PANEL_ROWS minimums (where the form has them), then words [GROUP / parts, PANEL_ROWS] of 32 bits.
// Word w of a row holds `parts` elements, i · (GROUP / parts) + w at bits [i · 32 / parts, (i + 1) · 32 / parts).
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
};
constexpr int NUM_FORMS = 6;

constexpr int64_t PANEL_ROWS = 16;
constexpr int64_t GROUP = 32;

constexpr int64_t plain_group_bytes(int64_t item) { return GROUP * PANEL_ROWS * item; }
constexpr int64_t nibble_group_bytes(int64_t scale, bool minimums) {
    return PANEL_ROWS * (scale * (minimums ? 2 : 1) + GROUP / 2);
}
constexpr int64_t byte_group_bytes() { return PANEL_ROWS * (2 + GROUP); }

}  // namespace tokenspeed::cpu

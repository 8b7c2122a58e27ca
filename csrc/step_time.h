// How long a step takes: a model learned from the steps that have landed.
#pragma once

#include <array>
#include <cstdint>

namespace tokenspeed {

// What a step has to do.
struct Work {
  std::int32_t rows = 0;     // requests
  std::int64_t tokens = 0;   // computed positions, of decoding rows and of prompts
  std::int64_t prompt = 0;   // of these, those of prompts
  std::int64_t context = 0;  // positions that decoding rows read from the cache
  double pairs = 0;          // (position, position read) of prompts: their attention

  void add_decode(std::int64_t computed) {
    ++rows;
    ++tokens;
    context += computed;
  }
  void add_prompt(std::int32_t computed, std::int32_t count) {
    ++rows;
    tokens += count;
    prompt += count;
    pairs += static_cast<double>(count) * (computed + 0.5 * count);
  }
};

// seconds = a + b (1 − 2^(−tokens / 8)) + c context + d prompt + e pairs, coefficients ≥ 0. The second term is the
// weights that more tokens touch: they saturate in a mixture of experts, and are constant in a dense model.
//
// Least squares of the relative errors with forgetting, solved under the constraint by cyclic coordinate descent
// (Franc, Hlaváč, Navara, "Sequential Coordinate-Wise Algorithm for the Non-negative Least Squares Problem", 2005): it
// starts from the last solution and every move lowers the error. A term that is absent from a step is not forgotten.
// Every operation is the same on every machine: ranks must plan alike.
class StepTimeModel {
 public:
  // A step with this work took so long. Outliers (a pause of the machine) count for little.
  void observe(const Work& work, double seconds);
  double predict(const Work& work) const;
  // False until enough steps were observed to trust a prediction: some of them without a prompt, which alone tell
  // what is constant from what prompts cost, and some with one.
  bool trusted() const { return observed_ >= kTrusted && alone_ >= kOfEachKind && observed_ - alone_ > 0; }
  // Steps are measured, and too few of them were of decoding rows alone.
  bool wants_decodes_alone() const { return observed_ > 0 && alone_ < kOfEachKind; }
  // Of a prompt of which nothing is cached, computed alone; 0 while nothing is known.
  double seconds_of_prompt(std::int32_t tokens) const;
  // Of one of common length.
  double seconds_per_prompt_token() const { return seconds_of_prompt(kCommon) / kCommon; }

 private:
  static constexpr std::size_t kTerms = 5;
  static constexpr int kTrusted = 16;
  static constexpr int kOfEachKind = 4;
  static constexpr std::int32_t kCommon = 2048;
  using Terms = std::array<double, kTerms>;

  static Terms terms(const Work& work);
  double dot(const Terms& x) const;

  Terms coefficients_{};
  std::array<Terms, kTerms> products_{};  // of the terms with each other, summed over the steps
  Terms targets_{};                       // of the terms with the seconds
  int observed_ = 0;
  int alone_ = 0;  // of these, those without a prompt
};

}  // namespace tokenspeed

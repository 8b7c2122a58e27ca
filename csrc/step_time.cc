#include "step_time.h"

#include <algorithm>
#include <cmath>

namespace tokenspeed {

namespace {

constexpr double kForget = 0.998;  // an observation weighs half after 350 steps
constexpr int kSweeps = 6;
// No step is faster; a clock may say so.
constexpr double kFastest = 1e-6;

// 2^(−tokens / 8), to the last bit the same everywhere, which std::exp2 is not.
double halved_each_8(std::int64_t tokens) {
  constexpr std::array<double, 8> eighths{1.0,
                                          0.917004043204671231743541594794,
                                          0.840896415253714543031125476233,
                                          0.771105412703970411806145931051,
                                          0.707106781186547524400844362105,
                                          0.648419777325504832966877060036,
                                          0.594603557501360533358749985280,
                                          0.545253866332628829603501325148};
  const auto whole = static_cast<int>(std::min<std::int64_t>(tokens / 8, 1000));
  return std::ldexp(eighths[static_cast<std::size_t>(tokens % 8)], -whole);
}

}  // namespace

// Scaled so that all are near 1 in a usual step.
StepTimeModel::Terms StepTimeModel::terms(const Work& work) {
  return {1.0, 1.0 - halved_each_8(work.tokens), static_cast<double>(work.context) * 1e-5,
          static_cast<double>(work.prompt) * 1e-3, work.pairs * 1e-7};
}

double StepTimeModel::dot(const Terms& x) const {
  double sum = 0;
  for (std::size_t i = 0; i < kTerms; ++i) sum += coefficients_[i] * x[i];
  return sum;
}

double StepTimeModel::predict(const Work& work) const { return dot(terms(work)); }

double StepTimeModel::seconds_of_prompt(std::int32_t tokens) const {
  if (observed_ < kTrusted) return 0;  // it takes little to know how prompts compare with each other
  Work prompt;
  prompt.add_prompt(0, tokens);
  return predict(prompt);
}

void StepTimeModel::observe(const Work& work, double seconds) {
  Terms x = terms(work);
  seconds = std::max(seconds, kFastest);
  if (trusted()) {
    const double usual = dot(x);
    seconds = std::clamp(seconds, 0.5 * usual, 1.5 * usual + 1e-4);
  }
  // What the solution leaves over now, so that forgetting does not move it.
  Terms rest = targets_;
  Terms keep{};
  for (std::size_t i = 0; i < kTerms; ++i) {
    for (std::size_t j = 0; j < kTerms; ++j) rest[i] -= products_[i][j] * coefficients_[j];
    keep[i] = x[i] > 0 ? kForget : 1.0;
    x[i] /= seconds;
  }
  for (std::size_t i = 0; i < kTerms; ++i) {
    targets_[i] = rest[i] * keep[i] + x[i];
    for (std::size_t j = 0; j < kTerms; ++j) {
      products_[i][j] *= keep[i] * keep[j];
      targets_[i] += products_[i][j] * coefficients_[j];
      products_[i][j] += x[i] * x[j];
    }
  }
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t i = 0; i < kTerms; ++i) {
      if (products_[i][i] <= 0) continue;
      double slope = targets_[i];
      for (std::size_t j = 0; j < kTerms; ++j) slope -= products_[i][j] * coefficients_[j];
      coefficients_[i] = std::max(0.0, coefficients_[i] + slope / products_[i][i]);
    }
  }
  ++observed_;
  alone_ += work.prompt == 0;
}

}  // namespace tokenspeed

// The block functions themselves. Included by one isa_*.cpp per instruction set, after its #pragma GCC target, so no
// header of the standard library may be included from here for the first time.
#pragma once

#include "../core/gaussian.h"
#include "../core/moments.h"
#include "../core/noise_prediction.h"
#include "../core/normal.h"
#include "../core/variational.h"
#include "blocks.h"
#include "philox_vector.h"

namespace vdu::VDU_ISA {
namespace {

// Sums are kept in kLanes running sums, element i in lane i % kLanes, so that every instruction set adds in one order.
constexpr int64_t kLanes = 16;

#define VDU_LOOP _Pragma("omp simd") for (int64_t i = 0; i < kBlock; ++i)

template <typename T>
double fold(const T* lanes) {
  double sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  return sum;
}

// Sum of the first count of kBlock terms.
template <typename T>
double sum_terms(T* terms, int64_t count) {
  for (int64_t i = count; i < kBlock; ++i) terms[i] = T(0);
  T lanes[kLanes] = {};
  for (int64_t row = 0; row < kBlock; row += kLanes) {
    _Pragma("omp simd") for (int64_t l = 0; l < kLanes; ++l) lanes[l] += terms[row + l];
  }
  return fold(lanes);
}

void normals_f32(const Draw& draw, uint64_t first, float* out) {
  const NoiseKey key{draw.seed_low, draw.seed_high, draw.stream, draw.step};
  constexpr int64_t groups = kBlock / 4;
  const uint64_t group = first / 4;
  const int64_t skip = static_cast<int64_t>(first % 4);
  alignas(64) uint32_t words[4][groups];
  alignas(64) float lane0[groups], lane1[groups], lane2[groups], lane3[groups];
  philox_words(key, group, words);
  _Pragma("omp simd") for (int64_t g = 0; g < groups; ++g) box_muller(words[0][g], words[1][g], lane0[g], lane1[g]);
  _Pragma("omp simd") for (int64_t g = 0; g < groups; ++g) box_muller(words[2][g], words[3][g], lane2[g], lane3[g]);
  if (skip == 0) {
    for (int64_t g = 0; g < groups; ++g) {
      out[4 * g] = lane0[g];
      out[4 * g + 1] = lane1[g];
      out[4 * g + 2] = lane2[g];
      out[4 * g + 3] = lane3[g];
    }
    return;
  }
  float all[kBlock + 4];
  for (int64_t g = 0; g < groups; ++g) {
    all[4 * g] = lane0[g];
    all[4 * g + 1] = lane1[g];
    all[4 * g + 2] = lane2[g];
    all[4 * g + 3] = lane3[g];
  }
  four_normals(key, group + groups, all[kBlock], all[kBlock + 1], all[kBlock + 2], all[kBlock + 3]);
  for (int64_t i = 0; i < kBlock; ++i) out[i] = all[i + skip];
}

void normals_f64(const Draw& draw, uint64_t first, double* out) {
  float narrow[kBlock];
  normals_f32(draw, first, narrow);
  VDU_LOOP out[i] = static_cast<double>(narrow[i]);
}

// Whether plain_exponential and log_normal_range do for a block: their special cases cost as much as the rest.
bool plain_exponents(const float* x) {
  uint32_t largest = 0;
  _Pragma("omp simd reduction(max : largest)") for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest <= bits_of(kPlainExponent);  // the bits of positive floats are in their order, NaN's the largest
}

bool plain_logarithms(const float* x) {
  uint32_t largest = 0;
  _Pragma("omp simd reduction(max : largest)") for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t above = bits_of(x[i]) - 0x00800000u;  // of the smallest normal number
    largest = above > largest ? above : largest;
  }
  return largest < 0x7F000000u;
}

template <typename T>
void sample(const T* mean, const T* log_std, const T* n, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    if (plain_exponents(log_std)) {
      VDU_LOOP out[i] = sampled_weight(mean[i], plain_exponential(log_std[i]), n[i]);
      return;
    }
  }
  VDU_LOOP out[i] = sampled_weight(mean[i], exponential(log_std[i]), n[i]);
}

template <typename T>
void sample_backward(const T* grad, const T* log_std, const T* n, T* out) {
  VDU_LOOP out[i] = sampled_log_std_gradient(grad[i], log_std[i], n[i]);
}

template <typename T>
void whitened(const T* center, const T* prior_std, const T* z, const T* log_std, const T* n, T noise_scale, T* out) {
  if (n == nullptr) {
    VDU_LOOP out[i] = whitened_mean(center[i], prior_std[i], z[i]);
  } else if (log_std == nullptr) {
    VDU_LOOP out[i] = whitened_weight(center[i], prior_std[i], z[i], noise_scale, n[i]);
  } else {
    VDU_LOOP out[i] = whitened_weight_of_std(center[i], prior_std[i], z[i], log_std[i], n[i]);
  }
}

template <typename T>
void mix(const T* x0, const T* n, T signal, T noise, T* out) {
  VDU_LOOP out[i] = mixed(x0[i], n[i], signal, noise);
}

template <typename T>
void difference(const T* prediction, const T* x0, const T* n, T signal, T noise, T* out) {
  if (n == nullptr) {
    VDU_LOOP out[i] = prediction_difference<true, false>(prediction[i], x0[i], T(0), signal, noise);
  } else if (x0 == nullptr) {
    VDU_LOOP out[i] = prediction_difference<false, true>(prediction[i], T(0), n[i], signal, noise);
  } else {
    VDU_LOOP out[i] = prediction_difference<true, true>(prediction[i], x0[i], n[i], signal, noise);
  }
}

template <typename T>
double squared_error(const T* prediction, const T* x0, const T* n, T signal, T noise, int64_t count) {
  alignas(64) T terms[kBlock];
  difference(prediction, x0, n, signal, noise, terms);
  VDU_LOOP terms[i] = terms[i] * terms[i];
  return sum_terms(terms, count);
}

template <typename T>
void squared_error_backward(const T* prediction, const T* x0, const T* n, T signal, T noise, T scale, T* out) {
  difference(prediction, x0, n, signal, noise, out);
  VDU_LOOP out[i] = scale * out[i];
}

template <typename T>
double kl(const T* mean, const T* log_std, const T* prior_mean, const T* prior_std, int64_t count) {
  alignas(64) T terms[kBlock];
  VDU_LOOP terms[i] = kl_term(mean[i], log_std[i], prior_mean[i], prior_std[i]);
  return sum_terms(terms, count);
}

template <typename T>
void kl_backward(T scale, const T* mean, const T* log_std, const T* prior_mean, const T* prior_std,
                 const KlGradientBlock<T>& out) {
  alignas(64) T d_mean[kBlock], d_log_std[kBlock], d_prior_std[kBlock];
  VDU_LOOP {
    const KlGradient<T> d = kl_gradient(mean[i], log_std[i], prior_mean[i], prior_std[i]);
    d_mean[i] = scale * d.mean;
    d_log_std[i] = scale * d.log_std;
    d_prior_std[i] = scale * d.prior_std;
  }
  if (out.mean) VDU_LOOP out.mean[i] = d_mean[i];
  if (out.log_std) VDU_LOOP out.log_std[i] = d_log_std[i];
  if (out.prior_mean) VDU_LOOP out.prior_mean[i] = -d_mean[i];
  if (out.prior_std) VDU_LOOP out.prior_std[i] = d_prior_std[i];
}

template <typename T>
double penalty(const T* mean, const T* prior_mean, const T* prior_std, int64_t count) {
  alignas(64) T terms[kBlock];
  VDU_LOOP terms[i] = penalty_term(mean[i], prior_mean[i], prior_std[i]);
  return sum_terms(terms, count);
}

template <typename T>
void penalty_backward(T scale, const T* mean, const T* prior_mean, const T* prior_std, const KlGradientBlock<T>& out) {
  alignas(64) T d_mean[kBlock], d_prior_std[kBlock];
  VDU_LOOP {
    const KlGradient<T> d = penalty_gradient(mean[i], prior_mean[i], prior_std[i]);
    d_mean[i] = scale * d.mean;
    d_prior_std[i] = scale * d.prior_std;
  }
  if (out.mean) VDU_LOOP out.mean[i] = d_mean[i];
  if (out.prior_mean) VDU_LOOP out.prior_mean[i] = -d_mean[i];
  if (out.prior_std) VDU_LOOP out.prior_std[i] = d_prior_std[i];
}

template <Rule rule, bool with_momentum, typename T>
double move_z(const StepConstants<T>& k, const StepBlock<T>& b, int64_t count) {
  alignas(64) T squares[kBlock];
  VDU_LOOP {
    T first = T(0), second = T(0);
    if constexpr (with_momentum) first = b.first[i];
    if constexpr (rule == Rule::natural_adam || rule == Rule::adam) second = b.second[i];
    b.z[i] = next_z<rule, with_momentum>(k, b.grad[i], b.z[i], b.prior_std[i], first, second, squares[i]);
    if constexpr (with_momentum) b.first[i] = first;
    if constexpr (rule == Rule::natural_adam || rule == Rule::adam) b.second[i] = second;
  }
  return sum_terms(squares, count);
}

template <typename T>
StepSums step(int32_t rule, const double* constants, const StepBlock<T>& b, int64_t count) {
  const StepConstants<T> k = step_constants<T>(constants);
  StepSums sums{};
  switch (static_cast<Rule>(rule)) {
    case Rule::natural:
      sums.squared_gradient =
          b.first ? move_z<Rule::natural, true>(k, b, count) : move_z<Rule::natural, false>(k, b, count);
      break;
    case Rule::natural_sign:
      sums.squared_gradient =
          b.first ? move_z<Rule::natural_sign, true>(k, b, count) : move_z<Rule::natural_sign, false>(k, b, count);
      break;
    case Rule::natural_adam:
      sums.squared_gradient = move_z<Rule::natural_adam, true>(k, b, count);
      break;
    case Rule::adam:
      sums.squared_gradient = move_z<Rule::adam, true>(k, b, count);
      break;
  }
  alignas(64) T terms[kBlock];
  if (b.log_std != nullptr) {
    VDU_LOOP {
      b.log_std[i] = next_log_std(k, b.noise_grad[i], b.log_std[i], b.prior_std[i], b.std_first[i], b.std_second[i]);
    }
    VDU_LOOP terms[i] = whitened_kl(b.z[i], b.log_std[i] - natural_log(b.prior_std[i]));
  } else {
    VDU_LOOP terms[i] = T(0.5) * b.z[i] * b.z[i];
  }
  sums.kl = sum_terms(terms, count);
  return sums;
}

template <typename T>
double squared_gradient(int32_t rule, const double* constants, const T* grad, const T* z, const T* prior_std,
                        int64_t count) {
  const StepConstants<T> k = step_constants<T>(constants);
  alignas(64) T squares[kBlock];
  if (static_cast<Rule>(rule) == Rule::adam) {
    VDU_LOOP {
      const T g = mean_gradient(k, grad[i], z[i], prior_std[i]) / prior_std[i];
      squares[i] = g * g;
    }
  } else {
    VDU_LOOP {
      const T g = mean_gradient(k, grad[i], z[i], prior_std[i]);
      squares[i] = g * g;
    }
  }
  return sum_terms(squares, count);
}

template <typename T>
void add_noise_gradient(const T* grad, const T* n, T scale, T* sum) {
  VDU_LOOP sum[i] = sum[i] + scale * (grad[i] * n[i]);
}

template <typename T>
double gradients(const T* grad, const T* mean, const T* log_std, const T* prior_mean, const T* prior_std, const T* n,
                 T kl_weight, T* d_mean, T* d_log_std, int64_t count) {
  alignas(64) T terms[kBlock];
  if constexpr (std::is_same_v<T, float>) {
    if (plain_exponents(log_std) && plain_logarithms(prior_std)) {
      VDU_LOOP {
        objective_gradients(grad[i], mean[i], log_std[i], prior_mean[i], prior_std[i], plain_exponential(log_std[i]),
                            log_normal_range(prior_std[i]), n[i], kl_weight, d_mean[i], d_log_std[i], terms[i]);
      }
      return sum_terms(terms, count);
    }
  }
  VDU_LOOP {
    objective_gradients(grad[i], mean[i], log_std[i], prior_mean[i], prior_std[i], exponential(log_std[i]),
                        natural_log(prior_std[i]), n[i], kl_weight, d_mean[i], d_log_std[i], terms[i]);
  }
  return sum_terms(terms, count);
}

template <typename T>
void welford(T* mean, T* squares, const T* value, T inverse_count, int64_t count, double& distance, double& length) {
  alignas(64) T apart[kBlock], long_[kBlock];
  VDU_LOOP {
    const T delta = welford_step(mean[i], squares[i], value[i], inverse_count);
    apart[i] = delta * delta;
    long_[i] = value[i] * value[i];
  }
  distance = sum_terms(apart, count);
  length = sum_terms(long_, count);
}

void from_bfloat16(const uint16_t* in, float* out, int64_t n) {
  _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) out[i] = float_of(static_cast<uint32_t>(in[i]) << 16);
}

// Round to nearest, ties to even; NaN becomes a quiet NaN.
void to_bfloat16(const float* in, uint16_t* out, int64_t n) {
  _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(in[i]);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}

void from_half(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(__builtin_bit_cast(_Float16, in[i]));
}

void to_half(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __builtin_bit_cast(uint16_t, static_cast<_Float16>(in[i]));
}

void copy_around_caches(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
#if defined(VDU_AVX512)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {  // whole cache lines
    auto* target = static_cast<__m512i*>(to);
    const auto* source = static_cast<const __m512i*>(from);
    for (int64_t i = 0; i < bytes / 64; ++i) _mm512_stream_si512(target + i, _mm512_loadu_si512(source + i));
    return;
  }
#endif
  auto* target = static_cast<__m128i*>(to);
  const auto* source = static_cast<const __m128i*>(from);
  for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(target + i, _mm_load_si128(source + i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

template <typename T>
constexpr Blocks<T> blocks(void (*normals)(const Draw&, uint64_t, T*)) {
  return {normals,
          sample<T>,
          sample_backward<T>,
          whitened<T>,
          mix<T>,
          squared_error<T>,
          squared_error_backward<T>,
          kl<T>,
          kl_backward<T>,
          penalty<T>,
          penalty_backward<T>,
          step<T>,
          squared_gradient<T>,
          add_noise_gradient<T>,
          gradients<T>,
          welford<T>};
}

constexpr Isa make_isa(const char* name) {
  return {name,
          blocks<float>(normals_f32),
          blocks<double>(normals_f64),
          {from_half, to_half, from_bfloat16, to_bfloat16},
          copy_around_caches};
}

}  // namespace
}  // namespace vdu::VDU_ISA

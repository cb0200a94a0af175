// The block functions and the walk over lists, without torch: on every instruction set of this machine against plain
// loops over the formulas of csrc/core, to the last bit. `make sanitize` runs this under the address and undefined
// behaviour sanitizers; every buffer is as long as it has to be, so that one step too far is noticed.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/core/gaussian.h"
#include "../../csrc/core/normal.h"
#include "../../csrc/core/variational.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/stream.h"

namespace {

using namespace vdu;
namespace core = vdu::portable;

int checks = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    ++checks;                                                              \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

// A small generator of its own, so that what is tested does not make its own inputs.
struct Numbers {
  uint64_t state = 88172645463325252ull;
  uint32_t word() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  double between(double low, double high) { return low + (high - low) * (word() / 4294967296.0); }
};

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

// A buffer of n elements that starts `skip` elements into its memory and ends with it.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> memory;
  T* data;
  int64_t size;

  Buffer(int64_t n, int64_t skip = 0)
      : memory(new T[static_cast<size_t>(n + skip)]()), data(memory.get() + skip), size(n) {}
  Buffer(int64_t n, int64_t skip, Numbers& numbers, double low, double high) : Buffer(n, skip) {
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(numbers.between(low, high));
  }
  Buffer copy() const {
    Buffer other(size, data - memory.get());
    std::copy(data, data + size, other.data);
    return other;
  }
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

template <typename T>
T normal_of(const Draw& draw, uint64_t index) {
  float n[4];
  core::four_normals({draw.seed_low, draw.seed_high, draw.stream, draw.step}, index / 4, n[0], n[1], n[2], n[3]);
  return static_cast<T>(n[index % 4]);
}

// Partial sums in the order that the blocks promise: 16 running sums, then in order, in double.
template <typename T>
double sum_in_lanes(const std::vector<T>& terms) {
  T lanes[16] = {};
  for (size_t i = 0; i < 256; ++i) lanes[i % 16] += i < terms.size() ? terms[i] : T(0);
  double sum = 0;
  for (T lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

template <typename T>
void test_normals(const Isa& isa) {
  const Draw draw{0xDEADBEEFu, 0x80000001u, 3, 0xFFFFFFFFu};
  for (int64_t skip : {0, 1, 3}) {
    for (uint64_t first :
         {0ull, 1ull, 2ull, 3ull, 255ull, (1ull << 33) - 2, (1ull << 34) - 5, (1ull << 34) + 1, (1ull << 62) + 3}) {
      Buffer<T> out(kBlock, skip);
      isa.blocks<T>().normals(draw, first, out.data);
      for (int64_t i = 0; i < kBlock; ++i) {
        CHECK(same(out[i], normal_of<T>(draw, first + static_cast<uint64_t>(i))), "%s, element %ld", isa.name, long(i));
      }
    }
  }
}

template <typename T>
void test_blocks(const Isa& isa, int64_t skip, int64_t count) {
  const auto& blocks = isa.blocks<T>();
  Numbers numbers;
  const auto values = [&](double low, double high) { return Buffer<T>(kBlock, skip, numbers, low, high); };
  const Buffer<T> mean = values(-3, 3), log_std = values(-90, 4), prior_mean = values(-3, 3),
                  prior_std = values(0.01, 2), n = values(-4, 4), grad = values(-1, 1), z = values(-2, 2);
  Buffer<T> out(kBlock, skip), out2(kBlock, skip), out3(kBlock, skip), out4(kBlock, skip);
  const auto name = isa.name;
  const auto each = [&](auto formula, const Buffer<T>& got, const char* what) {
    for (int64_t i = 0; i < kBlock; ++i)
      CHECK(same(got[i], static_cast<T>(formula(i))), "%s %s at %ld", name, what, long(i));
  };
  const auto sums = [&](auto formula, double got, const char* what) {
    std::vector<T> terms;
    for (int64_t i = 0; i < count; ++i) terms.push_back(formula(i));
    CHECK(same(got, sum_in_lanes(terms)), "%s %s of %ld: %.17g", name, what, long(count), got);
  };

  blocks.sample_backward(grad.data, log_std.data, n.data, out.data);
  each([&](int64_t i) { return grad[i] * core::exponential(log_std[i]) * n[i]; }, out, "sample_backward");

  // Without and with exponents that need the special cases of exp.
  const Buffer<T> plain = values(-70, 4);
  for (const Buffer<T>* rho : {&plain, &log_std}) {
    blocks.sample(mean.data, rho->data, n.data, out.data);
    each([&](int64_t i) { return mean[i] + core::exponential((*rho)[i]) * n[i]; }, out, "sample");
    const double got = blocks.gradients(grad.data, mean.data, rho->data, prior_mean.data, prior_std.data, n.data,
                                        T(0.5), out.data, out2.data, count);
    T d_mean, d_log_std, kl;
    const auto gradients = [&](int64_t i) {
      core::objective_gradients(grad[i], mean[i], (*rho)[i], prior_mean[i], prior_std[i], core::exponential((*rho)[i]),
                                core::natural_log(prior_std[i]), n[i], T(0.5), d_mean, d_log_std, kl);
    };
    each([&](int64_t i) { return gradients(i), d_mean; }, out, "d_mean");
    each([&](int64_t i) { return gradients(i), d_log_std; }, out2, "d_log_std");
    sums([&](int64_t i) { return gradients(i), kl; }, got, "gradients");
  }

  const T half = T(0.5);
  blocks.whitened(mean.data, prior_std.data, z.data, nullptr, nullptr, half, out.data);
  each([&](int64_t i) { return mean[i] + prior_std[i] * z[i]; }, out, "whitened at the mean");
  blocks.whitened(mean.data, prior_std.data, z.data, nullptr, n.data, half, out.data);
  each([&](int64_t i) { return mean[i] + prior_std[i] * (z[i] + half * n[i]); }, out, "whitened");
  blocks.whitened(mean.data, prior_std.data, z.data, log_std.data, n.data, half, out.data);
  each([&](int64_t i) { return mean[i] + prior_std[i] * z[i] + core::exponential(log_std[i]) * n[i]; }, out,
       "whitened, log_std");

  const T a = T(0.3), b = T(-0.7);
  blocks.mix(mean.data, n.data, a, b, out.data);
  each([&](int64_t i) { return a * mean[i] + b * n[i]; }, out, "mix");
  const auto all = [&](int64_t i) { return grad[i] - (a * mean[i] + b * n[i]); };
  const auto only_noise = [&](int64_t i) { return grad[i] - b * n[i]; };
  const auto only_x0 = [&](int64_t i) { return grad[i] - a * mean[i]; };
  const auto squared = [](auto f) { return [f](int64_t i) { return f(i) * f(i); }; };
  sums(squared(all), blocks.squared_error(grad.data, mean.data, n.data, a, b, count), "squared_error");
  sums(squared(only_noise), blocks.squared_error(grad.data, nullptr, n.data, a, b, count), "squared_error of noise");
  sums(squared(only_x0), blocks.squared_error(grad.data, mean.data, nullptr, a, b, count), "squared_error of x0");
  blocks.squared_error_backward(grad.data, mean.data, n.data, a, b, half, out.data);
  each([&](int64_t i) { return half * all(i); }, out, "squared_error_backward");

  sums([&](int64_t i) { return core::kl_term(mean[i], log_std[i], prior_mean[i], prior_std[i]); },
       blocks.kl(mean.data, log_std.data, prior_mean.data, prior_std.data, count), "kl");
  const auto d = [&](int64_t i) { return core::kl_gradient(mean[i], log_std[i], prior_mean[i], prior_std[i]); };
  blocks.kl_backward(half, mean.data, log_std.data, prior_mean.data, prior_std.data,
                     {out.data, out2.data, out3.data, out4.data});
  each([&](int64_t i) { return half * d(i).mean; }, out, "kl_backward, mean");
  each([&](int64_t i) { return half * d(i).log_std; }, out2, "kl_backward, log_std");
  each([&](int64_t i) { return -(half * d(i).mean); }, out3, "kl_backward, prior_mean");
  each([&](int64_t i) { return half * d(i).prior_std; }, out4, "kl_backward, prior_std");
  blocks.kl_backward(half, mean.data, log_std.data, prior_mean.data, prior_std.data,
                     {nullptr, nullptr, nullptr, nullptr});
  sums([&](int64_t i) { return core::penalty_term(mean[i], prior_mean[i], prior_std[i]); },
       blocks.penalty(mean.data, prior_mean.data, prior_std.data, count), "penalty");
  blocks.penalty_backward(half, mean.data, prior_mean.data, prior_std.data, {out.data, nullptr, out3.data, out4.data});
  const auto root = [&](int64_t i) { return T(1) / prior_std[i]; };
  const auto scaled = [&](int64_t i) { return (mean[i] - prior_mean[i]) * root(i); };
  each([&](int64_t i) { return half * (scaled(i) * root(i)); }, out, "penalty_backward, mean");
  each([&](int64_t i) { return half * (-(scaled(i) * scaled(i)) * root(i)); }, out4, "penalty_backward, prior_std");

  Buffer<T> total = z.copy();
  blocks.add_noise_gradient(grad.data, n.data, half, total.data);
  each([&](int64_t i) { return z[i] + half * (grad[i] * n[i]); }, total, "add_noise_gradient");

  Buffer<T> average = mean.copy(), squares = prior_std.copy();
  double distance, length;
  blocks.welford(average.data, squares.data, grad.data, T(0.2), count, distance, length);
  each([&](int64_t i) { return mean[i] + T(0.2) * (grad[i] - mean[i]); }, average, "welford, mean");
  each([&](int64_t i) { return prior_std[i] + (grad[i] - mean[i]) * (grad[i] - average[i]); }, squares,
       "welford, squares");
  sums([&](int64_t i) { return (grad[i] - mean[i]) * (grad[i] - mean[i]); }, distance, "welford, distance");
  sums([&](int64_t i) { return grad[i] * grad[i]; }, length, "welford, length");
}

constexpr std::array<double, core::kStepConstants> kConstants{0.03, 0.01, 0.9, 0.9, 0.1, 0.99, 0.01,
                                                              1e-8, 0.7,  0.4, 1.3, 0.8, 0.5};

template <typename T, core::Rule rule, bool with_momentum>
void test_step(const Isa& isa, int64_t skip, int64_t count, bool learned) {
  Numbers numbers;
  const auto values = [&](double low, double high) { return Buffer<T>(kBlock, skip, numbers, low, high); };
  const Buffer<T> grad = values(-1, 1), prior_std = values(0.01, 2), noise_grad = values(-1, 1);
  const Buffer<T> z = values(-2, 2), first = values(-1, 1), second = values(0, 1), log_std = values(-4, 1),
                  std_first = values(-1, 1), std_second = values(0, 1);
  core::StepConstants<T> k;
  static_assert(sizeof k == core::kStepConstants * sizeof(T));
  std::array<T, core::kStepConstants> narrow;
  for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<T>(kConstants[i]);
  std::memcpy(&k, narrow.data(), sizeof k);

  Buffer<T> z_got = z.copy(), first_got = first.copy(), second_got = second.copy(), log_std_got = log_std.copy(),
            std_first_got = std_first.copy(), std_second_got = std_second.copy();
  StepBlock<T> block{grad.data,
                     prior_std.data,
                     z_got.data,
                     with_momentum ? first_got.data : nullptr,
                     rule >= core::Rule::natural_adam ? second_got.data : nullptr,
                     nullptr,
                     nullptr,
                     nullptr,
                     nullptr};
  if (learned) {
    block.log_std = log_std_got.data, block.std_first = std_first_got.data, block.std_second = std_second_got.data;
    block.noise_grad = noise_grad.data;
  }
  const double norm = isa.blocks<T>().squared_gradient(static_cast<int32_t>(rule), kConstants.data(), grad.data, z.data,
                                                       prior_std.data, count);
  const StepSums sums = isa.blocks<T>().step(static_cast<int32_t>(rule), kConstants.data(), block, count);
  std::vector<T> squares, divergence;
  for (int64_t i = 0; i < kBlock; ++i) {
    T f = first[i], s = second[i], squared;
    const T moved = core::next_z<rule, with_momentum>(k, grad[i], z[i], prior_std[i], f, s, squared);
    CHECK(same(z_got[i], moved), "%s rule %d z at %ld", isa.name, int(rule), long(i));
    CHECK(same(first_got[i], with_momentum ? f : first[i]), "%s rule %d first at %ld", isa.name, int(rule), long(i));
    CHECK(same(second_got[i], rule >= core::Rule::natural_adam ? s : second[i]), "%s second at %ld", isa.name, long(i));
    T kl = T(0.5) * moved * moved;
    if (learned) {
      T sf = std_first[i], ss = std_second[i];
      const T g = core::std_gradient(k, noise_grad[i], core::exponential(log_std[i]), prior_std[i]);
      const T next = log_std[i] - k.std_learning_rate * core::adam_direction(k, g, sf, ss);
      CHECK(same(log_std_got[i], next) && same(std_first_got[i], sf) && same(std_second_got[i], ss),
            "%s log_std at %ld", isa.name, long(i));
      kl = core::whitened_kl(moved, next - core::natural_log(prior_std[i]));
    }
    if (i < count) squares.push_back(squared), divergence.push_back(kl);
  }
  CHECK(same(sums.squared_gradient, sum_in_lanes(squares)) && same(norm, sums.squared_gradient), "%s", isa.name);
  CHECK(same(sums.kl, sum_in_lanes(divergence)), "%s kl", isa.name);
}

template <typename T>
void test_steps(const Isa& isa) {
  for (int64_t skip : {0, 1}) {
    for (int64_t count : {1, 15, 255, 256}) {
      for (bool learned : {false, true}) {
        test_step<T, core::Rule::natural, false>(isa, skip, count, learned);
        test_step<T, core::Rule::natural, true>(isa, skip, count, learned);
        test_step<T, core::Rule::natural_sign, false>(isa, skip, count, learned);
        test_step<T, core::Rule::natural_sign, true>(isa, skip, count, learned);
        test_step<T, core::Rule::natural_adam, true>(isa, skip, count, learned);
        test_step<T, core::Rule::adam, true>(isa, skip, count, learned);
      }
    }
  }
}

// What a value becomes when it is stored, by scalar code that the streams do not use.
float bfloat16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

double stored(Storage storage, double x) {
  switch (storage) {
    case Storage::float64:
      return x;
    case Storage::float32:
      return static_cast<float>(x);
    case Storage::bfloat16:
      return bfloat16_of(static_cast<float>(x));
    case Storage::float16:
      break;
  }
  const float narrow = static_cast<float>(x);
  if (x == 0) return x;
  const int exponent = std::max(std::ilogb(narrow), -14) - 10;
  return std::ldexp(std::nearbyint(std::ldexp(narrow, -exponent)), exponent);
}

// Lists whose tensors are allocations of their own, to the byte.
struct List {
  Storage storage;
  std::vector<std::unique_ptr<char[]>> memory;
  Operand operand;

  List(Storage kind, const std::vector<int64_t>& numels, int64_t skip, bool read, bool write) : storage(kind) {
    operand.storage = kind, operand.read = read, operand.write = write;
    for (int64_t n : numels) {
      memory.emplace_back(new char[static_cast<size_t>((n + skip) * bytes_of(kind))]());
      operand.data.push_back(memory.back().get() + skip * bytes_of(kind));
    }
  }
  double get(const Isa& isa, size_t tensor, int64_t i) const {
    const char* at = operand.data[tensor] + i * bytes_of(storage);
    if (storage == Storage::float64) return *reinterpret_cast<const double*>(at);
    if (storage == Storage::float32) return *reinterpret_cast<const float*>(at);
    float value;
    const auto* word = reinterpret_cast<const uint16_t*>(at);
    storage == Storage::float16 ? isa.convert.from_half(word, &value, 1) : isa.convert.from_bfloat16(word, &value, 1);
    return value;
  }
  void set(const Isa& isa, size_t tensor, int64_t i, double value) {
    char* at = operand.data[tensor] + i * bytes_of(storage);
    const auto narrow = static_cast<float>(value);
    auto* word = reinterpret_cast<uint16_t*>(at);
    if (storage == Storage::float64)
      *reinterpret_cast<double*>(at) = value;
    else if (storage == Storage::float32)
      *reinterpret_cast<float*>(at) = narrow;
    else
      storage == Storage::float16 ? isa.convert.to_half(&narrow, word, 1) : isa.convert.to_bfloat16(&narrow, word, 1);
  }
};

template <typename T>
void test_stream(const Isa& isa, Storage storage, const std::vector<int64_t>& numels, int64_t skip) {
  const auto starts = starts_of(numels);
  const int64_t numel = starts.back();
  const Storage own = std::is_same_v<T, double> ? Storage::float64 : Storage::float32;
  List in(storage, numels, skip, true, false), out(storage, numels, skip, false, true),
      sum(own, numels, skip, true, true);
  for (size_t t = 0; t < numels.size(); ++t) {
    for (int64_t i = 0; i < numels[t]; ++i) {
      in.set(isa, t, i, std::sin(double(starts[t] + i)));
      sum.set(isa, t, i, double(starts[t] + i));
    }
  }
  const Stream<T, 4> stream(isa, starts, {in.operand, out.operand, sum.operand, Operand{}});
  CHECK(stream.numel() == numel, "%s", isa.name);
  int64_t seen = 0;
  for (int64_t chunk = 0; chunk < chunks_of(numel); ++chunk) {
    stream.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t count) {
      CHECK(first == seen && 0 < count && count <= kBlock && p[3] == nullptr, "%s block at %ld", isa.name, long(first));
      seen += count;
      // As the block functions do, all kBlock elements are read and written; what is beyond count is ones.
      for (int64_t i = 0; i < kBlock; ++i) {
        if (i >= count) CHECK(p[0][i] == T(1) && p[2][i] == T(1), "%s padding at %ld", isa.name, long(i));
        p[1][i] = p[0][i] * T(0.5) + T(1e-3);
        p[2][i] = p[2][i] + p[0][i];
      }
    });
  }
  CHECK(seen == numel, "%s: %ld of %ld", isa.name, long(seen), long(numel));
  for (size_t t = 0; t < numels.size(); ++t) {
    for (int64_t i = 0; i < numels[t]; ++i) {
      const T x = static_cast<T>(stored(storage, std::sin(double(starts[t] + i))));
      CHECK(in.get(isa, t, i) == stored(storage, std::sin(double(starts[t] + i))), "%s in, tensor %zu", isa.name, t);
      CHECK(out.get(isa, t, i) == stored(storage, x * T(0.5) + T(1e-3)), "%s out, tensor %zu at %ld", isa.name, t,
            long(i));
      CHECK(static_cast<T>(sum.get(isa, t, i)) == static_cast<T>(starts[t] + i) + x, "%s sum, tensor %zu", isa.name, t);
    }
  }
}

void test_conversions(const Isa& isa) {
  const Isa* reference = nullptr;
  for (const auto& name : available_isas()) {
    choose_isa(name);
    reference = &vdu::isa();  // the last, "baseline"
  }
  std::vector<uint16_t> words(65536), back(65536), expected_back(65536);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(65536), expected(65536);
  for (const auto from : {&Conversions::from_half, &Conversions::from_bfloat16}) {
    (isa.convert.*from)(words.data(), wide.data(), 65536);
    (reference->convert.*from)(words.data(), expected.data(), 65536);
    for (size_t i = 0; i < words.size(); ++i) CHECK(same(wide[i], expected[i]), "%s from word %zu", isa.name, i);
  }
  // Every 65,537th float: all exponents, both signs, infinities and NaN.
  for (uint32_t offset : {0u, 0x1000u, 0x8000u}) {
    for (size_t i = 0; i < wide.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(i) * 65536u + offset;
      std::memcpy(&wide[i], &bits, 4);
    }
    for (const auto to : {&Conversions::to_half, &Conversions::to_bfloat16}) {
      (isa.convert.*to)(wide.data(), back.data(), 65536);
      (reference->convert.*to)(wide.data(), expected_back.data(), 65536);
      for (size_t i = 0; i < wide.size(); ++i) {
        CHECK(back[i] == expected_back[i] || std::isnan(wide[i]), "%s to word of %g", isa.name, double(wide[i]));
      }
    }
  }
}

void test_places() {
  // Lists of more than 2^33 elements, without the memory.
  const std::vector<int64_t> numels{3, 0, int64_t{1} << 33, 0, 0, 5, int64_t{1} << 40, 1};
  const auto starts = starts_of(numels);
  CHECK(starts.back() == 9 + (int64_t{1} << 33) + (int64_t{1} << 40), "%ld", long(starts.back()));
  for (size_t t = 0; t < numels.size(); ++t) {
    if (numels[t] == 0) continue;
    for (int64_t element : {starts[t], starts[t] + numels[t] / 2, starts[t + 1] - 1}) {
      CHECK(tensor_of(starts, element) == t, "element %ld", long(element));
    }
  }
  CHECK(chunks_of(0) == 0 && chunks_of(1) == 1 && chunks_of(kChunk) == 1 && chunks_of(kChunk + 1) == 2, "chunks");
  CHECK(chunks_of(int64_t{1} << 40) == (int64_t{1} << 40) / kChunk, "chunks");
}

void test_known_answers() {
  uint32_t c[4] = {0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u};
  core::philox4x32_10(c[0], c[1], c[2], c[3], 0xA4093822u, 0x299F31D0u);
  CHECK(c[0] == 0xD16CFE09u && c[1] == 0x94FDCCEBu && c[2] == 0x5001E420u && c[3] == 0x24126EA1u, "%x", c[0]);
  for (float x : {-200.0f, -105.0f, -87.5f, -1.0f, 0.0f, 1.0f, 88.5f, 89.0f, 1e30f}) {
    const double exact = std::exp(double(x));
    const float got = core::exponential(x);
    CHECK(exact > 3.5e38 ? std::isinf(got) : std::fabs(got - exact) <= 1.3 * (exact * 1.2e-7 + 1.5e-45), "exp %g",
          double(x));
  }
  for (uint32_t bits = 0; bits <= core::bits_of(core::kPlainExponent); bits += 977) {
    for (uint32_t sign : {0u, 0x80000000u}) {
      const float x = core::float_of(bits | sign);
      CHECK(same(core::plain_exponential(x), core::exponential(x)), "exp %a", double(x));
    }
  }
  for (float x : {-core::kPlainExponent, core::kPlainExponent}) {
    CHECK(same(core::plain_exponential(x), core::exponential(x)), "exp %g", double(x));
  }
  CHECK(std::isnan(core::exponential(NAN)) && std::isinf(core::exponential(INFINITY)), "exp");
  CHECK(core::exponential(-INFINITY) == 0.0f && std::isnan(core::natural_log(-1.0f)), "exp, log");
  CHECK(core::natural_log(0.0f) == -INFINITY && core::natural_log(INFINITY) == INFINITY, "log");
  CHECK(std::isnan(core::natural_log(NAN)) && std::fabs(core::natural_log(1e-40f) + 92.1034) < 1e-5, "log");
}

template <typename T>
void test_streams(const Isa& isa) {
  const std::vector<std::vector<int64_t>> lists{{},
                                                {0},
                                                {1},
                                                {0, 1, 0},
                                                {255},
                                                {256},
                                                {257},
                                                {3, 0, 63, 1000, 0, 1},
                                                {256, 256, 1},
                                                {kChunk - 1, 2, 0, kChunk + 5}};
  for (Storage storage : {Storage::float32, Storage::float64, Storage::float16, Storage::bfloat16}) {
    for (const auto& numels : lists) {
      for (int64_t skip : {0, 1, 3}) test_stream<T>(isa, storage, numels, skip);
    }
  }
}

// Results that go around the caches, with an end inside a block; aligned for that, and not.
void test_large_streams(const Isa& isa) {
  const int64_t large = kStreamedBytes / static_cast<int64_t>(sizeof(double));
  for (int64_t skip : {0, 1}) test_stream<double>(isa, Storage::float64, {5, large, 0, 300}, skip);
}

template <typename T>
void test_type(const Isa& isa) {
  test_normals<T>(isa);
  for (int64_t skip : {0, 1, 7}) {
    for (int64_t count : {1, 3, 16, 17, 63, 255, 256}) test_blocks<T>(isa, skip, count);
  }
  test_steps<T>(isa);
  test_streams<T>(isa);
}

}  // namespace

int main() {
  test_known_answers();
  test_places();
  const auto names = available_isas();
  for (const auto& name : names) {
    CHECK(choose_isa(name) && isa().name == name, "%s", name.c_str());
    const Isa& one = isa();
    test_type<float>(one);
    test_type<double>(one);
    test_conversions(one);
    test_large_streams(one);
  }
  CHECK(!choose_isa("sse9"), "an unknown instruction set was accepted");
  std::printf("%d checks on", checks);
  for (const auto& name : names) std::printf(" %s", name.c_str());
  std::printf(": passed\n");
}

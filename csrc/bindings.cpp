// The Python module of the CPU extension: what was built, and the core functions, for bit-for-bit tests and diagnosis.
// Importing it loads the ops of csrc/cpu into torch.

// Nothing of torch is used in this file, and the pybind11 that torch 2.11 brings along refuses to be included where its
// stable ABI is asked for.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/normal.h"
#include "cpu/isa.h"
#include "cpu/stream.h"

namespace py = pybind11;

namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  auto [c0, c1, c2, c3] = counter;
  vdu::portable::philox4x32_10(c0, c1, c2, c3, key[0], key[1]);
  return {c0, c1, c2, c3};
}

std::array<float, 4> normals(uint64_t group, int64_t seed, int64_t step, int64_t stream) {
  std::array<float, 4> n;
  vdu::portable::four_normals(vdu::portable::noise_key(seed, step, stream), group, n[0], n[1], n[2], n[3]);
  return n;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
          {"target_torch", VDU_TARGET_TORCH},
          {"flags", VDU_BUILD_FLAGS},
          {"isa", vdu::isa().name}};
}

void choose(const std::string& name) {
  if (vdu::choose_isa(name)) return;
  std::string known;
  for (const auto& one : vdu::available_isas()) known += (known.empty() ? "" : ", ") + one;
  throw py::value_error("isa must be one of " + known + " on this machine, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() = "CPU implementation of the vdu_fast ops.";
  m.def("build_info", &build_info, "Compiler, flags, the oldest torch it runs on, and the instruction set in use.");
  m.def("available_isas", &vdu::available_isas,
        "Instruction sets of this machine that code was built for, best first.");
  m.def("choose_isa", &choose, py::arg("name"), "Use another instruction set; results have the same bits on all.");
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"), "Ten Philox rounds on four 32-bit words.");
  m.def("four_normals", &normals, py::arg("group"), py::arg("seed"), py::arg("step") = 0, py::arg("stream") = 0,
        "Normals of the elements 4 * group .. 4 * group + 3, without vectorisation.");
  m.def("exponential", [](float x) { return vdu::portable::exponential(x); }, "exp as the kernels compute it.");
  m.def("natural_log", [](float x) { return vdu::portable::natural_log(x); }, "log as the kernels compute it.");
  m.def("tensor_of", &vdu::tensor_of, py::arg("starts"), py::arg("element"),
        "Which tensor of a list holds a global element.");
}

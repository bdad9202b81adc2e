// Importing dither._C runs the operator registrations; the module itself only reports on the build and the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu.h"
#include "optim/rules.h"

PYBIND11_MODULE(_C, m) {
  using namespace dither;
  m.def("build_info", [] {
    std::vector<std::string> isas, usable;
    for (int i = 0; i < kIsaCount; ++i) {
      isas.emplace_back(kIsaNames[i]);
      if (i <= int(best_capability())) usable.emplace_back(kIsaNames[i]);
    }
    pybind11::dict d;
#if defined(__clang__)
    d["compiler"] = "clang " __VERSION__;
#else
    d["compiler"] = "gcc " __VERSION__;
#endif
    d["cpu_instruction_sets"] = isas;
    d["cpu_usable"] = usable;
    d["cpu_capability"] = kIsaNames[int(capability())];
    d["cuda_architectures"] = DITHER_CUDA_ARCHS;
    return d;
  });
#define X(name) #name,
  m.attr("hyperparameters") = std::vector<std::string>{DITHER_HYPER(X)};
#undef X
#define X(name, type) {#name, type<float>::states},
  m.attr("rules") = std::map<std::string, int>{DITHER_RULES(X)};
#undef X
  m.def("set_cpu_capability", [](const std::string& name) {
    if (const char* error = set_capability(name.c_str()))
      throw pybind11::value_error("DITHER_CPU_CAPABILITY=" + name + ": " + error);
  });
}

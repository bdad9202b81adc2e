// Importing dither._C runs the operator registrations; the module itself reports on the build and the machine, and has what
// would take longer by torch's dispatcher than its work does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "common/cpu.h"
#include "optim/rules.h"
#include "sampling/rows.h"

namespace {
namespace py = pybind11;

// A row of numbers (`rows_`, by = 0) on contiguous tensors of the CPU, which were checked where they came from.
struct Row {
  dither::Rows rows;  // but for the tensors
  bool drawn, limited;
  double limit;
  py::object dtypes[4];  // torch's, in the order of DType

  template <class Use>
  static auto asked(PyObject* answer, const Use& use) {
    if (!answer) throw py::error_already_set();
    const auto found = use(answer);
    Py_DECREF(answer);
    return found;
  }
  static void* address(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    return asked(PyObject_VectorcallMethod(name, &tensor, 1, nullptr), PyLong_AsVoidPtr);
  }
  // Whether a tensor's elements still are these bytes: who was given it may have set its data.
  static bool holds(PyObject* tensor, int64_t bytes) {
    static PyObject* const size = PyUnicode_InternFromString("nbytes");
    static PyObject* const host = PyUnicode_InternFromString("is_cpu");
    static PyObject* const contiguous = PyUnicode_InternFromString("is_contiguous");
    const auto is_true = [](PyObject* answer) { return answer == Py_True; };
    return asked(PyObject_GetAttr(tensor, size), PyLong_AsLongLong) == bytes &&
           asked(PyObject_GetAttr(tensor, host), is_true) &&
           asked(PyObject_VectorcallMethod(contiguous, &tensor, 1, nullptr), is_true);
  }
  // -1: none of these
  int type(PyObject* tensor) const {
    static PyObject* const name = PyUnicode_InternFromString("dtype");
    return asked(PyObject_GetAttr(tensor, name), [&](PyObject* dtype) {
      for (int i = 0; i < 4; ++i)
        if (dtypes[i].ptr() == dtype) return i;
      return -1;
    });
  }
  // out, inputs: lists or tuples of tensors [samples, ...]; seeds: int64 [samples], where noise is drawn. False, with nothing
  // done, where an input is no longer what it was when it was checked.
  bool operator()(PyObject* out, PyObject* inputs, PyObject* seeds, int64_t numel, int64_t samples) const {
    const auto has = [](PyObject* list, int size) {
      return (PyList_Check(list) || PyTuple_Check(list)) && PySequence_Fast_GET_SIZE(list) == size;
    };
    dither::Rows p = rows;
    if (!has(inputs, p.inputs) || !has(out, p.outputs)) throw py::type_error("row: expected as many tensors as the table has");
    bool wide = false;
    const auto see = [&](PyObject* tensor, auto& at, dither::DType& type_of) {
      const int found = type(tensor);
      if (found < 0) return false;
      at = address(tensor);
      type_of = dither::DType(found);
      wide = wide || type_of == dither::DType::f64;
      return at || numel == 0;
    };
    for (int r = 0; r < p.inputs; ++r) {
      PyObject* const tensor = PySequence_Fast_GET_ITEM(inputs, r);
      if (!see(tensor, p.in[r], p.in_type[r]) || !holds(tensor, numel * dither::size_of(p.in_type[r]))) return false;
    }
    for (int j = 0; j < p.outputs; ++j)
      if (!see(PySequence_Fast_GET_ITEM(out, j), p.out[j], p.out_type[j])) return false;
    p.numel = numel;
    p.sample = samples > 0 ? numel / samples : 0;
    p.samples = drawn;
    if (drawn) p.seeds = static_cast<const int64_t*>(address(seeds));
    if (limited) p.limit = &limit;
    PyThreadState* const thread = PyEval_SaveThread();
    dither::rows_cpu(p, wide);
    PyEval_RestoreThread(thread);
    return true;
  }
  // As a function of Python, without pybind11's way to it, which is longer than its own.
  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    bool done;
    try {
      if (count != 5) throw py::type_error("row: expected out, inputs, seeds, numel, samples");
      const Row& row = *static_cast<const Row*>(PyCapsule_GetPointer(self, nullptr));
      done = row(args[0], args[1], args[2], PyLong_AsLongLong(args[3]), PyLong_AsLongLong(args[4]));
    } catch (py::error_already_set& error) {
      error.restore();
      return nullptr;
    } catch (const py::type_error& error) {
      error.set_error();
      return nullptr;
    }
    return PyBool_FromLong(done);
  }
};

// table: rows P and W[0], ...; columns inputs, d, z.
py::object row(const std::vector<std::vector<double>>& table, uint32_t draw, std::optional<double> limit) {
  const size_t columns = table.at(0).size();
  if (table.size() < 2 || table.size() > dither::kMaxOutputs + 1 || columns < 3 || columns > dither::kMaxColumns)
    throw py::value_error("row: table is of another shape, expected [rows, columns] of rows_");
  auto r = std::make_unique<Row>();
  r->rows.inputs = int(columns) - 2;
  r->rows.outputs = int(table.size()) - 1;
  r->rows.draw = draw;
  r->limited = limit.has_value();
  r->limit = limit.value_or(0);
  r->rows.wide_limit = true;
  double* to = r->rows.table;
  for (const auto& weights : table) {
    if (weights.size() != columns) throw py::value_error("row: table is of another shape, expected [rows, columns] of rows_");
    to = std::copy(weights.begin(), weights.end(), to);
    r->drawn = r->drawn || (&weights != &table[0] && weights.back() != 0);
  }
  const py::module_ torch = py::module_::import("torch");
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  for (int i = 0; i < 4; ++i) r->dtypes[i] = torch.attr(names[i]);
  static PyMethodDef method = {"row", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Row::call)), METH_FASTCALL,
                               "row(out, inputs, seeds, numel, samples)"};
  const py::capsule self(r.release(), [](void* row) { delete static_cast<Row*>(row); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}
}  // namespace

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
  m.def("row", row);
  m.def("set_cpu_capability", [](const std::string& name) {
    if (const char* error = set_capability(name.c_str()))
      throw pybind11::value_error("DITHER_CPU_CAPABILITY=" + name + ": " + error);
  });
}

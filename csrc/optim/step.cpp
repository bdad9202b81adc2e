#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../common/torch.h"
#include "norm.h"

namespace dither {
static const char* const kRuleNames[] = {
#define X(name, type) #name,
    DITHER_RULES(X)
#undef X
};
static constexpr int kRuleStates[] = {
#define X(name, type) type<float>::states,
    DITHER_RULES(X)
#undef X
};
static const char* const kHyperNames[] = {
#define X(name) #name,
    DITHER_HYPER(X)
#undef X
};

constexpr int64_t kWorthThreads = 1 << 17;  // elements below which a second thread costs more than it brings

// What the checks and the kernels ask of a tensor, each asked once: a thousand small tensors are mostly questions.
struct Seen {
  const Listed& tensor;
  std::span<const int64_t> sizes;
  int64_t numel;
  ScalarType scalar_type;
  std::optional<DType> type;
  bool cuda, contiguous;

  explicit Seen(const Listed& t)
      : tensor(t),
        sizes(t.sizes()),
        numel(1),
        scalar_type(t.scalar_type()),
        type(float_type(scalar_type)),
        cuda(t.is_cuda()),
        contiguous(t.is_contiguous()) {
    for (const int64_t size : sizes) numel *= size;
  }
};
static bool same_shape(const Seen& a, const Seen& b) { return std::ranges::equal(a.sizes, b.sizes); }
// Strides of dimensions with one element mean nothing.
static bool same_layout(const Seen& a, const Seen& b) {
  if ((a.contiguous && b.contiguous) || a.numel <= 1) return true;
  const auto x = a.tensor.strides(), y = b.tensor.strides();
  for (size_t d = 0; d < a.sizes.size(); ++d)
    if (a.sizes[d] != 1 && x[d] != y[d]) return false;
  return true;
}

// Two parameters that share memory would be stepped in an undefined order. The last list seen is remembered.
struct Range {
  uintptr_t begin, end;
  size_t index;
  bool operator==(const Range&) const = default;
};
static void check_disjoint(const char* op, std::vector<Range>&& ranges) {
  static thread_local std::vector<Range> known;
  if (ranges == known) return;
  auto sorted = ranges;
  std::sort(sorted.begin(), sorted.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t k = 1; k < sorted.size(); ++k)
    DITHER_CHECK(sorted[k].begin >= sorted[k - 1].end, op, ": params[", std::max(sorted[k].index, sorted[k - 1].index),
                 "] shares memory with params[", std::min(sorted[k].index, sorted[k - 1].index),
                 "], expected disjoint tensors");
  known = std::move(ranges);
}

// A tensor as the kernels see it: itself, or a copy in another layout that is copied back after the step.
struct Views {
  std::vector<std::pair<Tensor, Tensor>> copied_back;  // original, copy
  std::vector<Tensor> kept;                            // read-only copies
};

template <class T>
static const T* scalar_on(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& p) {
  constexpr ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  if (!t) return nullptr;
  DITHER_CHECK(t->scalar_type() == type && t->numel() == 1, op, ": ", name, " is ", name_of(t->scalar_type()), " with ",
               t->numel(), " elements, expected one ", name_of(type));
  DITHER_CHECK(device_of(*t) == device_of(p), op, ": ", name, " is on ", device_of(*t), ", expected ", device_of(p),
               " like params[0]");
  return static_cast<const T*>(t->const_data_ptr());
}

template <Device device>
static void fused_step_(const std::string& rule_name, const Tensors& params, const Tensors& grads, const Tensors& states,
                        const Tensors& steps, const Tensors& products, const Ints& groups, const Floats& hyper,
                        const Ints& seeds, const Ints& places, const Tensors& emas, const Tensors& masks, const Tensors& lrs,
                        const std::optional<Tensor>& sum_of_squares, const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf, const Ints& private_key,
                        const std::optional<Tensor>& releases) {
  const auto found = std::find_if(std::begin(kRuleNames), std::end(kRuleNames), [&](const char* n) { return rule_name == n; });
  DITHER_CHECK(found != std::end(kRuleNames), "fused_step_: rule is '", rule_name, "', which is not known");
  const Rule rule = Rule(found - std::begin(kRuleNames));
  const int slots = kRuleStates[int(rule)];
  const std::string op_name = rule_name + "_";
  const char* op = op_name.c_str();
  const size_t n = params.size(), n_groups = hyper.size() / kHyper;

  const auto expect_size = [&](const char* name, size_t given, size_t expected) {
    DITHER_CHECK(given == expected, op, ": ", name, " has ", given, " entries, expected ", expected);
  };
  const auto expect_size_or_none = [&](const char* name, size_t given, size_t expected) {
    if (given) expect_size(name, given, expected);
  };
  expect_size("grads", grads.size(), n);
  expect_size("states", states.size(), n * slots);
  expect_size("steps", steps.size(), n);
  expect_size("products", products.size(), rule == Rule::nadam ? n : 0);
  expect_size("groups", groups.size(), n);
  expect_size("hyper", hyper.size(), n_groups * kHyper);
  expect_size("seeds", seeds.size(), n_groups);
  expect_size_or_none("places", places.size(), 4 * n);
  expect_size_or_none("emas", emas.size(), n);
  expect_size_or_none("masks", masks.size(), n);
  if (n == 0) return;

  // Group rows. A NaN lr is read from the next tensor of lrs.
  std::vector<Hyper> rows(n_groups);
  std::vector<const float*> group_lr(n_groups, nullptr);
  size_t used = 0;
  bool random = false;
  for (size_t r = 0; r < n_groups; ++r) {
    std::memcpy(&rows[r], &hyper[r * kHyper], sizeof(Hyper));
    if (std::isnan(rows[r].lr)) {
      DITHER_CHECK(used < lrs.size(), op, ": lr of group ", r, " is nan");
      group_lr[r] = scalar_on<float>(op, "lr", lrs[used++], params[0]);
    }
    for (int k = 0; k < kHyper; ++k)
      DITHER_CHECK(std::isfinite(hyper[r * kHyper + k]) || (k == 0 && group_lr[r]), op, ": ", kHyperNames[k], " of group ", r,
                   " is ", hyper[r * kHyper + k], ", expected a finite number");
    DITHER_CHECK(rows[r].private_std >= 0 && (rows[r].private_std == 0 || !private_key.empty()), op, ": private_std of group ",
                 r, " is ", rows[r].private_std, ", expected ", private_key.empty() ? "0 without a private_key" : "at least 0");
    random = random || rows[r].noise_eta > 0 || rows[r].temperature > 0 || rows[r].stochastic_rounding != 0;
  }
  const bool drawn = random || !private_key.empty();
  DITHER_CHECK(!drawn || places.size() == 4 * n, op, ": places is empty, expected 4 entries a tensor: noise needs an address");

  Shared shared{};
  shared.sum_of_squares = scalar_on<double>(op, "sum_of_squares", sum_of_squares, params[0]);
  shared.grad_scale = scalar_on<float>(op, "grad_scale", grad_scale, params[0]);
  shared.found_inf = scalar_on<float>(op, "found_inf", found_inf, params[0]);
  if (!private_key.empty()) {
    DITHER_CHECK(releases, op, ": releases is None, expected one float64, the time of the private noise");
    shared.releases = scalar_on<double>(op, "releases", releases, params[0]);
    const Address checked = address(op_name + ": private_key", private_key, 0, 0, 0, 0, Kind::normal32);
    std::copy(std::begin(checked.key), std::end(checked.key), shared.key.words);
    shared.key.chacha = private_key.size() == 4;
    if constexpr (device == Device::cpu)
      DITHER_CHECK(*shared.releases >= 0 && *shared.releases < 0x1p32, op, ": releases is ", *shared.releases,
                   ", expected 0 <= releases < 2^32: the private noise would repeat");
  }

  // Check everything before anything is written.
  const std::string home = device_of(params[0]);
  const bool on_gpu = params[0].is_cuda();
  const int32_t home_index = on_gpu ? params[0].get_device_index() : 0;
  const auto at_home = [&](const Listed& t, bool cuda, const char* name, size_t i) {
    DITHER_CHECK(cuda == on_gpu && (!cuda || t.get_device_index() == home_index), op, ": ", list(name, i), " is on ",
                 device_of(t), ", expected ", home, " like params[0]");
  };
  const auto see = [&](const Listed& t, const char* name, size_t i) {
    const Seen seen(t);
    at_home(t, seen.cuda, name, i);
    DITHER_CHECK(seen.type, op, ": ", list(name, i), " is ", name_of(seen.scalar_type),
                 ", expected float32, float64, bfloat16 or float16");
    return seen;
  };
  const auto see_like_param = [&](const Listed& t, const char* name, size_t i, const Seen& p, size_t param) {
    const Seen seen = see(t, name, i);
    DITHER_CHECK(same_shape(seen, p), op, ": ", list(name, i), " has shape ", shape_of(seen.sizes), ", expected ",
                 shape_of(p.sizes), " like params[", param, "]");
    DITHER_CHECK(seen.type != DType::f64 || p.type == DType::f64, op, ": ", list(name, i), " is float64, expected ",
                 name_of(p.scalar_type), " or float32 like params[", param, "]");
    return seen;
  };

  std::vector<Slot> slot(n);
  std::vector<Clock> clock(n);
  std::vector<char> relayout(n, 0);
  std::vector<Range> ranges;
  ranges.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    Slot& s = slot[i];
    const Seen p = see(params[i], "params", i);
    s.p_type = *p.type;
    s.numel = p.numel;
    const Memory memory = p.contiguous ? Memory::dense : memory_of(p.sizes, p.tensor.strides());
    DITHER_CHECK(memory != Memory::overlap, op, ": params[", i,
                 "] overlaps itself (an expanded tensor?), expected one place per element");
    const Seen g = see_like_param(grads[i], "grads", i, p, i);
    s.g_type = *g.type;
    // Draws and masks follow fixed orders; everything else may walk the memory of p, whatever its strides.
    bool own_layout = memory == Memory::dense && (!drawn || p.contiguous);
    for (int k = 0; k < slots; ++k) {
      const Seen state = see_like_param(states[k * n + i], "states", k * n + i, p, i);
      s.state_type[k] = *state.type;
      own_layout = own_layout && same_layout(state, p);
    }
    if (!emas.empty()) {
      const Seen ema = see_like_param(emas[i], "emas", i, p, i);
      s.ema_type = *ema.type;
      own_layout = own_layout && same_layout(ema, p);
    }
    const bool g_fits = same_layout(g, p);
    own_layout = own_layout && (g_fits || g.scalar_type == p.scalar_type);
    relayout[i] = !own_layout ? 2 : !g_fits ? 1 : 0;
    if (p.contiguous && s.numel > 0) {
      const auto begin = reinterpret_cast<uintptr_t>(params[i].const_data_ptr());
      ranges.push_back({begin, begin + s.numel * size_of(s.p_type), i});
    }
    if (!masks.empty()) {
      const Listed& m = masks[i];
      if (m.numel() > 0 || p.numel == 0) {
        at_home(m, m.is_cuda(), "masks", i);
        DITHER_CHECK(m.scalar_type() == ScalarType::Byte && m.is_contiguous() && m.numel() == (s.numel + 7) / 8, op, ": masks[",
                     i, "] is ", name_of(m.scalar_type()), " with ", m.numel(), " elements, expected ", (s.numel + 7) / 8,
                     " contiguous uint8, one bit per element of params[", i, "]");
        DITHER_CHECK(relayout[i] != 2 || p.contiguous, op, ": params[", i,
                     "] has a mask and strides of its own, which allows neither noise nor "
                     "states of other strides; make it contiguous");
        s.mask = p.numel ? static_cast<const uint8_t*>(m.const_data_ptr()) : nullptr;
      }
    }
    const int64_t group = groups[i];
    DITHER_CHECK(group >= 0 && size_t(group) < n_groups, op, ": groups[", i, "] is ", group, ", expected 0 <= group < ",
                 n_groups);
    const auto clock_of = [&](const Listed& t, const char* name, bool& wide) {
      at_home(t, t.is_cuda(), name, i);
      const ScalarType type = t.scalar_type();
      wide = type == ScalarType::Double;
      DITHER_CHECK((wide || type == ScalarType::Float) && t.numel() == 1, op, ": ", list(name, i), " is ", name_of(type),
                   " with ", t.numel(), " elements, expected one float32 or float64");
      return t.mutable_data_ptr();
    };
    Clock& c = clock[i];
    c.hyper = rows[group];
    c.lr = group_lr[group];
    c.step = clock_of(steps[i], "steps", c.wide);
    if (!products.empty()) {
      bool wide = false;
      c.product = clock_of(products[i], "products", wide);
      DITHER_CHECK(wide == c.wide, op, ": products[", i, "] is ", wide ? "float64" : "float32", ", expected ",
                   c.wide ? "float64" : "float32", " like steps[", i, "]");
    }
    if constexpr (device == Device::cpu)
      DITHER_CHECK(!random || c.done() < (c.wide ? 0x1p32 : 0x1p24), op, ": ", list("steps", i), " is ", c.done(),
                   ", expected below 2^32 (2^24 in float32): the noise would repeat");
    c.seed[0] = uint32_t(seeds[group]);
    c.seed[1] = uint32_t(uint64_t(seeds[group]) >> 32);
    s.run = s.numel;
    if (!places.empty()) {
      const int64_t stream = places[4 * i];
      s.start = places[4 * i + 1];
      s.run = places[4 * i + 2];
      s.pitch = places[4 * i + 3];
      DITHER_CHECK(stream >= 0 && stream < int64_t(kGradientNoise), op, ": stream of params[", i, "] is ", stream,
                   ", expected 0 <= stream < 2^31");
      DITHER_CHECK(
          s.numel == 0 || (s.start >= 0 && s.run > 0 && s.pitch >= 0 && s.element(s.numel - 1) < uint64_t(kMaxElement)), op,
          ": place of params[", i, "] is start ", s.start, ", run ", s.run, ", pitch ", s.pitch,
          ", expected elements below 2^60");
      c.stream = uint32_t(stream);
    }
  }
  check_disjoint(op, std::move(ranges));

  Views views;
  const auto view = [&](const Listed& t, bool copy, bool written) -> void* {
    if (!copy || t.is_contiguous()) return written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    Tensor flat = torch::stable::contiguous(t);
    if (written) views.copied_back.emplace_back(t, flat);
    else views.kept.push_back(flat);
    return flat.mutable_data_ptr();
  };
  for (size_t i = 0; i < n; ++i) {
    Slot& s = slot[i];
    const bool copy = relayout[i] == 2;
    s.p = view(params[i], copy, true);
    if (relayout[i] == 1) {
      Tensor like_p = torch::stable::empty_like(params[i]);
      torch::stable::copy_(like_p, grads[i]);
      views.kept.push_back(like_p);
      s.g = like_p.const_data_ptr();
    } else {
      s.g = view(grads[i], copy, false);
    }
    for (int k = 0; k < slots; ++k) s.state[k] = view(states[k * n + i], copy, true);
    if (!emas.empty() && clock[i].hyper.grokfast_lamb != 0) s.ema = view(emas[i], copy, true);
  }

  if constexpr (device == Device::cpu) {
    const auto constants = std::make_unique_for_overwrite<char[]>(n * kConstantsBytes + 64);
    char* table = constants.get() + (-reinterpret_cast<uintptr_t>(constants.get()) & 63);
    double done = 0;
    std::vector<int64_t> first_unit(n + 1, 0);
    int64_t total = 0;
    for (size_t i = 0; i < n; ++i) {
      bool skip = false;
      // Tensors of one group and step share their constants, but for the stream of their noise.
      const bool again = i > 0 && groups[i] == groups[i - 1] && products.empty() && slot[i].p_type == slot[i - 1].p_type &&
                         clock[i].done() == done;
      done = clock[i].done();
      const auto run = [&]<template <class> class R, class T>() {
        using C = Constants<R<T>, T>;
        static_assert(sizeof(C) <= kConstantsBytes);
        C& c = *reinterpret_cast<C*>(table + i * kConstantsBytes);
        if (again) std::memcpy(&c, table + (i - 1) * kConstantsBytes, sizeof c);
        else c = derive<R, T>(clock[i], shared);
        c.around.stream = clock[i].stream;
        skip = c.around.skip;
        if (again && !skip) clock[i].advance();
      };
      if (slot[i].p_type == DType::f64) with_rule<true>(rule, run);
      else with_rule<false>(rule, run);
      total += slot[i].numel;
      first_unit[i + 1] = first_unit[i] + (skip ? 0 : (slot[i].numel + kUnit - 1) / kUnit);
    }
    const auto step = DITHER_PICK_ISA(step_range);
    const int64_t grain = total < kWorthThreads ? first_unit[n] + 1 : 4;
    parallel(first_unit[n], grain, [&](int64_t lo, int64_t hi) {
      size_t i = std::upper_bound(first_unit.begin(), first_unit.end(), lo) - first_unit.begin() - 1;
      for (; i < n && first_unit[i] < hi; ++i) {
        const int64_t from = (std::max(lo, first_unit[i]) - first_unit[i]) * kUnit;
        const int64_t to = std::min(slot[i].numel, (std::min(hi, first_unit[i + 1]) - first_unit[i]) * kUnit);
        if (from < to) step(rule, slot[i].p_type == DType::f64, slot[i], shared, table + i * kConstantsBytes, from, to);
      }
    });
  } else {
    const auto guard = device_guard(params[0]);
    const Stream stream = current_stream(params[0]);
    const Tensor table = torch::stable::new_empty(params[0], {int64_t(n) * kConstantsBytes}, ScalarType::Byte);
    const int multiprocessors = on_gpu ? multiprocessor_count(params[0]) : 1;
    size_t done = 0;
    for (const bool wide : {false, true}) {  // compute types apart
      std::vector<Slot> some_slots;
      std::vector<Clock> some_clocks;
      for (size_t i = 0; i < n; ++i)
        if ((slot[i].p_type == DType::f64) == wide) {
          some_slots.push_back(slot[i]);
          some_clocks.push_back(clock[i]);
        }
      if (some_slots.empty()) continue;
      char* constants = static_cast<char*>(table.mutable_data_ptr()) + done * kConstantsBytes;
      DITHER_CUDA_OK(op, step_cuda(rule, wide, some_slots.data(), some_clocks.data(), int64_t(some_slots.size()), shared,
                                   constants, multiprocessors, stream));
      done += some_slots.size();
    }
  }
  for (auto& [original, copy] : views.copied_back) torch::stable::copy_(original, copy);
}

template <Device device>
static Tensor sum_of_squares(const Tensors& tensors) {
  const char* op = "sum_of_squares";
  DITHER_CHECK(!tensors.empty(), op, ": tensors is empty, expected at least one tensor");
  std::vector<SumPart> parts;
  std::vector<Tensor> kept;
  int64_t chunks = 0, total_numel = 0;
  const Tensor head = tensors[0];
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Listed& t = tensors[i];
    const Seen seen(t);
    DITHER_CHECK(seen.type, op, ": tensors[", i, "] is ", name_of(seen.scalar_type),
                 ", expected float32, float64, bfloat16 or float16");
    DITHER_CHECK(seen.cuda == head.is_cuda() && (!seen.cuda || t.get_device_index() == head.get_device_index()), op,
                 ": tensors[", i, "] is on ", device_of(t), ", expected ", device_of(head), " like tensors[0]");
    const void* x = t.const_data_ptr();
    if (!seen.contiguous && memory_of(seen.sizes, seen.tensor.strides()) != Memory::dense) {
      kept.push_back(torch::stable::contiguous(t));
      x = kept.back().const_data_ptr();
    }
    parts.push_back({x, seen.numel, *seen.type, true});
    chunks += sum_chunks(seen.numel);
    total_numel += seen.numel;
  }
  Tensor out = torch::stable::new_zeros(head, {}, ScalarType::Double);
  double* total = static_cast<double*>(out.mutable_data_ptr());
  if constexpr (device == Device::cpu) {
    const auto sum = DITHER_PICK_ISA(sum_chunk);
    std::vector<int64_t> first(parts.size() + 1, 0);
    for (size_t i = 0; i < parts.size(); ++i) first[i + 1] = first[i] + sum_chunks(parts[i].numel);
    std::vector<double> partial(chunks);
    parallel(chunks, total_numel < kWorthThreads ? chunks : 2, [&](int64_t lo, int64_t hi) {
      size_t i = std::upper_bound(first.begin(), first.end(), lo) - first.begin() - 1;
      for (int64_t c = lo; c < hi; ++c) {
        while (c >= first[i + 1]) ++i;
        partial[c] = sum(parts[i], c - first[i]);
      }
    });
    while (partial.size() > 1) {
      std::vector<double> next(sum_chunks(int64_t(partial.size())));
      const SumPart level{partial.data(), int64_t(partial.size()), DType::f64, false};
      for (size_t c = 0; c < next.size(); ++c) next[c] = sum(level, int64_t(c));
      partial = std::move(next);
    }
    if (!partial.empty()) *total = partial[0];
  } else {
    const auto guard = device_guard(head);
    const Tensor partial = torch::stable::new_empty(head, {2 * chunks + 2}, ScalarType::Double);
    DITHER_CUDA_OK(op, sum_cuda(parts.data(), int64_t(parts.size()), static_cast<double*>(partial.mutable_data_ptr()), total,
                                current_stream(head)));
  }
  return out;
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  // One row of `hyper` per group in the order of hyper.h; a NaN lr takes the next tensor of lrs. `states` is slot-major.
  // `places`: stream, start, run, pitch of each tensor, or empty where nothing is drawn. `private_key`: one integer for Philox,
  // four for ChaCha20, or none: no private noise; its time is the number in `releases`, the same for all that one step draws.
  m.def(
      "fused_step_(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, Tensor(d!)[] "
      "products, "
      "int[] groups, float[] hyper, int[] seeds, int[] places, Tensor(e!)[] emas, Tensor[] masks, Tensor[] lrs, "
      "Tensor? sum_of_squares, Tensor? grad_scale, Tensor? found_inf, int[] private_key, Tensor? releases) -> ()");
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("fused_step_", TORCH_BOX(&dither::fused_step_<dither::Device::cpu>));
  m.impl("sum_of_squares", TORCH_BOX(&dither::sum_of_squares<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("fused_step_", TORCH_BOX(&dither::fused_step_<dither::Device::cuda>));
  m.impl("sum_of_squares", TORCH_BOX(&dither::sum_of_squares<dither::Device::cuda>));
}
#endif

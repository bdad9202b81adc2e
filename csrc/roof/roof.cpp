#include "roof.h"

#include <atomic>

#include "../common/torch.h"

namespace dither {
static std::atomic<uint32_t> sink;

template <Device device>
static void triad_(const Tensors& written, const Tensors& read, int64_t lists_written, int64_t lists_read) {
  const char* op = "triad_";
  const int64_t lists = lists_written + lists_read;
  DITHER_CHECK(lists_written >= 0 && lists_read >= 0 && lists >= 1 && lists <= kMaxLists, op, ": got ", lists,
               " lists, expected 1 to ", kMaxLists);
  const size_t n = lists_written ? written.size() / lists_written : read.size() / lists_read;
  DITHER_CHECK(written.size() == n * lists_written && read.size() == n * lists_read, op, ": got ", written.size(), " and ",
               read.size(), " tensors, expected ", n * lists_written, " and ", n * lists_read);
  if (n == 0) return;
  std::vector<Roof> roofs(n);
  std::vector<int64_t> numel(n), first(n + 1, 0);
  constexpr int64_t unit = 4096;
  for (size_t i = 0; i < n; ++i) {
    Roof& r = roofs[i];
    r.written = int(lists_written);
    r.count = int(lists);
    const auto add = [&](const Listed& t, int k) {
      if (k == 0) numel[i] = t.numel();
      DITHER_CHECK(t.is_contiguous() && t.numel() == numel[i], op, ": tensor ", i, " of list ", k, " must be contiguous with ",
                   numel[i], " elements");
      r.x[k] = t.mutable_data_ptr();
      r.item[k] = int64_t(t.element_size());
    };
    for (int k = 0; k < lists_written; ++k) add(written[k * n + i], k);
    for (int k = 0; k < lists_read; ++k) add(read[k * n + i], int(lists_written) + k);
    first[i + 1] = first[i] + (numel[i] + unit - 1) / unit;
  }
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(roof_range);
    parallel(first[n], 4, [&](int64_t lo, int64_t hi) {
      uint32_t total = 0;
      for (size_t i = 0; i < n; ++i) {
        const int64_t from = std::max(lo, first[i]) - first[i], to = std::min(hi, first[i + 1]) - first[i];
        if (from < to) total += run(roofs[i], from * unit, std::min(numel[i], to * unit));
      }
      sink += total;
    });
  } else {
    const Tensor head = written.empty() ? read[0] : written[0];
    const auto guard = device_guard(head);
    for (size_t i = 0; i < n; ++i) DITHER_CUDA_OK(op, roof_cuda(roofs[i], numel[i], current_stream(head)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  // Lists are slot-major: `written` holds lists_written lists, `read` lists_read lists, of as many tensors each.
  m.def("triad_(Tensor(a!)[] written, Tensor[] read, int lists_written, int lists_read) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) { m.impl("triad_", TORCH_BOX(&dither::triad_<dither::Device::cpu>)); }
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) { m.impl("triad_", TORCH_BOX(&dither::triad_<dither::Device::cuda>)); }
#endif

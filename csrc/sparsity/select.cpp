#include "../common/torch.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "nm_select_(Tensor w, Tensor? factor, int n, int m, int dim, float beta, Tensor? beta_tensor, Tensor(a!)? out, "
      "Tensor(b!)? bits, Tensor(c!)? keep) -> ()");
  m.def(
      "masked_blend_(Tensor(a!) out, Tensor? a, Tensor? b, Tensor bits, float scale, Tensor? scale_tensor, float lamb) -> ()");
}

#include "launch.cuh"

namespace dither {
int multiprocessor_count(int device) {
#if defined(__CUDACC__)
  static int cached[64] = {};
  int fresh = 0;
  int& count = device < 64 ? cached[device] : fresh;
  if (count == 0) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
#else
  return device >= 0 ? 1 : 0;
#endif
}
}  // namespace dither

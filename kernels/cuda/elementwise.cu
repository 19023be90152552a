/*
 * elementwise.cu -- the family elementwise: which part of the op table's formulas an op is in.
 *
 * build/gen/tiles.cuh has a functor for each row, in parts; elementwise_N.cu compiles part N by elementwise_part.h.
 */
#include "kernels_cuda.h"

#define HM_TILES_PART 0
#include "tiles.cuh"

#define X(part) extern "C" int hm_cuda_elementwise_##part(const hm_kernel_call *call);
HM_TILES_PARTS(X)
#undef X

extern "C" int hm_cuda_elementwise(const hm_kernel_call *call) {
#define IN_PART(name, id) case id:
#define X(part)                                                                                                        \
  HM_TILES_##part(IN_PART) return hm_cuda_elementwise_##part(call);
  switch (call->op) {
    HM_TILES_PARTS(X)
  default: return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no elementwise op with id %d", call->op);
  }
#undef X
#undef IN_PART
}

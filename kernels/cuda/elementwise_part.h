/*
 * elementwise_part.h -- one part of the op table's formulas on the device.  Included by elementwise_N.cu, which say which: HM_TILES_PART.
 *
 * build/gen/tiles.cuh has a functor for each row; elementwise.h runs it.  Built without contraction, so that the
 * results are those of the CPU to the bit; on the host with -fwrapv, since integers wrap.
 */
#include "elementwise.h"

#ifndef __CUDACC__
#pragma GCC diagnostic ignored "-Wtautological-compare" /* x != x is how a formula asks for NaN, of integers too */
#endif
#include "tiles.cuh"

template <class Op> static int run(const hm_kernel_call *call, const char *name) {
  const hm_view *out = &call->out[0], *in = call->in;
  if (call->compute == HM_F32)
    return hm_elements_run<Op, float>(name, out, in, call->attr, nullptr, call->op, call->stream);
  if (call->compute == HM_F64)
    return hm_elements_run<Op, double>(name, out, in, call->attr, nullptr, call->op, call->stream);
  if constexpr (Op::ints) {
    if (call->compute == HM_I64) {
      const bool divides = call->op == HM_OP_FLOOR_DIVIDE || call->op == HM_OP_REMAINDER;
      hm_cuda_fault *const fault = divides ? hm_cuda_fault_word(call->stream) : nullptr;
      return hm_elements_run<Op, int64_t>(name, out, in, call->attr, fault, call->op, call->stream);
    }
  }
  return hm_cuda_fail(HM_ERR_DTYPE, "%s: cannot be computed in %s", name, hm_dtype_name(call->compute));
}

#define HM_JOIN_(a, b) a##b
#define HM_JOIN(a, b) HM_JOIN_(a, b)

extern "C" int HM_JOIN(hm_cuda_elementwise_, HM_TILES_PART)(const hm_kernel_call *call) {
  switch (call->op) {
#define X(name, id)                                                                                                    \
  case id: return run<hm_tile_##name>(call, #name);
    HM_JOIN(HM_TILES_, HM_TILES_PART)
    (X)
#undef X
        default
        : return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no elementwise op with id %d", call->op);
  }
}

/*
 * fault.cu -- what kernels found wrong with values, as messages.
 *
 * Runs on the host; called by the backend when it has waited for a stream.  Owns nothing: the record belongs to the
 * backend.
 */
#include "backend.h"

static int describe(const hm_cuda_fault *f) {
  const long long value = f->value, limit = f->limit;
  switch (f->op) {
  case HM_OP_CROSS_ENTROPY:
  case HM_OP_CROSS_ENTROPY_BACKWARD:
    return hm_cuda_fail(f->code,
                        "cross_entropy: target %lld is not a class: there are C = %lld classes, 0 to %lld\n"
                        "  hint: class labels count from 0; ignored positions must hold ignore_index",
                        value, limit, limit - 1);
  case HM_OP_NLL_LOSS:
  case HM_OP_NLL_LOSS_BACKWARD:
  case HM_OP_NLL_LOSS_BACKWARD_BY_G:
    return hm_cuda_fail(f->code,
                        "%s: target %lld is not a class: there are C = %lld classes, 0 to %lld\n"
                        "  hint: class labels count from 0; ignored positions must hold ignore_index",
                        hm_cuda_op_name(f->op), value, limit, limit - 1);
  case HM_OP_SELECT_BACKWARD:
  case HM_OP_GATHER:
  case HM_OP_GATHER_BACKWARD:
  case HM_OP_INDEX_SELECT:
  case HM_OP_INDEX_SELECT_BACKWARD:
  case HM_OP_INDEX_ADD:
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD:
  case HM_OP_EMBEDDING:
  case HM_OP_EMBEDDING_BACKWARD:
  case HM_OP_ONE_HOT:
    return hm_cuda_fail(f->code, "%s: index %lld is outside of [0, %lld)\n  hint: ids count from 0",
                        hm_cuda_op_name(f->op), value, limit);
  default:
    return hm_cuda_fail(f->code, "%s: integer division by zero",
                        f->op == HM_OP_REMAINDER ? "remainder" : "floor_divide");
  }
}

extern "C" int hm_cuda_fault_take(hm_cuda_fault *fault) {
  if (!fault) return HM_OK;
  if (*(const volatile int32_t *)&fault->code == HM_OK) return HM_OK;
  const hm_cuda_fault seen = *fault;
  memset(fault, 0, sizeof *fault);
  return describe(&seen);
}

/*
 * nll.cu -- nll_loss and its gradients.
 *
 * A thread takes a position.  The loss picks one log probability there, times its class's weight, and adds in float64: by its threads, by its block,
 * and over the blocks in order by a second kernel (none is needed where one block does it all).  The gradient writes one number at each position into
 * zeros; the gradient of that picks again.
 *
 * A target that is no class makes a fault (kernels_cuda.h) and NaN.  Called by loss.cu.  Owns nothing.
 */
#include "group.h"

enum { MEAN, SUM, NONE };
enum { TARGET, PICKED, OTHER, VIEWS }; /* OTHER: the loss or g, by position */
enum { SMALL = 8192 };

/* What blocks know of their positions. */
struct part {
  double loss, weight;
};

struct nll {
  hm_walk<VIEWS> walk;
  void *data[VIEWS];
  int8_t dtype[VIEWS];
  int64_t step, classes, ignore; /* step: from class to class */
  int32_t op, reduction, weight_dtype, total_dtype, loss_dtype;
  const void *weight;  /* NULL: ones */
  const void *divisor; /* total of the weights where it is known: gradients of a mean */
  void *total, *loss;  /* where results go */
  part *parts;         /* of the blocks */
  hm_cuda_fault *fault;
};

/* The class at offset `at`; -1: ignored; -2: none, which is reported. */
HM_DEV int64_t target_at(const nll &e, int64_t at) {
  const int64_t t = hm_load<int64_t>(e.data[TARGET], e.dtype[TARGET], at);
  if (t == e.ignore) return -1;
  if (t >= 0 && t < e.classes) return t;
  hm_fault(e.fault, HM_ERR_ARG, e.op, t, e.classes);
  return -2;
}

HM_DEV double weight_of(const nll &e, int64_t target) {
  return e.weight ? hm_load<double>(e.weight, e.weight_dtype, target) : 1.0;
}

HM_DEV double divisor_of(const nll &e) { return e.divisor ? hm_load<double>(e.divisor, e.total_dtype, 0) : 1.0; }

HM_DEV void keep_total(const nll &e, part all) {
  if (e.total) hm_store<double>(e.total, e.total_dtype, 0, all.weight);
  if (e.reduction == NONE) return;
  if (e.reduction == MEAN) all.loss = all.loss / (e.divisor ? divisor_of(e) : all.weight);
  hm_store<double>(e.loss, e.loss_dtype, 0, all.loss);
}

HM_DEV part block_sums(part mine) {
  part all;
  all.loss = hm_group_join<hm_sum, HM_BLOCK>(mine.loss);
  all.weight = hm_group_join<hm_sum, HM_BLOCK>(mine.weight);
  return all;
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) nll_pick(nll e) {
  part mine = {0.0, 0.0};
  for (uint32_t i = hm_global_thread(); i < e.walk.count; i += hm_global_threads()) {
    int64_t at[VIEWS];
    hm_offsets(e.walk, i, at);
    const int64_t t = target_at(e, at[TARGET]);
    double loss = t == -2 ? (double)NAN : 0.0;
    if (t >= 0) {
      const double weight = weight_of(e, t);
      loss = -hm_load<double>(e.data[PICKED], e.dtype[PICKED], at[PICKED] + t * e.step) * weight;
      mine.weight += weight;
    }
    if (e.reduction == NONE) hm_store<double>(e.data[OTHER], e.dtype[OTHER], at[OTHER], loss);
    mine.loss += loss;
  }
  const part all = block_sums(mine);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) keep_total(e, all);
  else e.parts[blockIdx.x] = all;
}

/* The sums over all blocks, by one block. */
static __global__ void __launch_bounds__(HM_BLOCK, 2) nll_total(nll e, int n_parts) {
  part mine = {0.0, 0.0};
  for (int i = (int)threadIdx.x; i < n_parts; i += HM_BLOCK) {
    mine.loss += e.parts[i].loss;
    mine.weight += e.parts[i].weight;
  }
  const part all = block_sums(mine);
  if (threadIdx.x == 0) keep_total(e, all);
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) nll_write(nll e) {
  const double divisor = divisor_of(e);
  for (uint32_t i = hm_global_thread(); i < e.walk.count; i += hm_global_threads()) {
    int64_t at[VIEWS];
    hm_offsets(e.walk, i, at);
    const int64_t t = target_at(e, at[TARGET]);
    if (t < 0) continue;
    const double g = hm_load<double>(e.data[OTHER], e.dtype[OTHER], at[OTHER]);
    hm_store<double>(e.data[PICKED], e.dtype[PICKED], at[PICKED] + t * e.step, -g * weight_of(e, t) / divisor);
  }
}

/* ====== Setting up ====== */

static const char *name_of(int op) {
  switch (op) {
  case HM_OP_NLL_LOSS: return "nll_loss";
  case HM_OP_NLL_LOSS_BACKWARD: return "nll_loss_backward";
  case HM_OP_NLL_LOSS_BACKWARD_BY_G: return "nll_loss_backward_by_g";
  default: return NULL;
  }
}

/* Fills e; returns the number of positions. */
static int64_t set_nll(nll *e, const hm_kernel_call *call) {
  const bool backward = call->op == HM_OP_NLL_LOSS_BACKWARD;
  const hm_attr *attr = &call->attr[backward ? 1 : 0];
  const hm_view *target = &call->in[1], *weight = &call->in[2];
  const hm_view *picked = backward ? &call->out[0] : &call->in[0], *other = backward ? &call->in[0] : &call->out[0];
  hm_view row[VIEWS] = {*target, hm_without_dim(picked, 1), *other};
  memset(e, 0, sizeof *e);
  e->op = call->op;
  e->reduction = (int32_t)attr[0].i;
  e->ignore = attr[1].i;
  e->step = picked->stride[1];
  e->classes = picked->shape[1];
  if (e->reduction != NONE) { /* one number for all positions */
    row[OTHER] = *target;
    for (int d = 0; d < target->ndim; d++) row[OTHER].stride[d] = 0;
  }
  const hm_view *view[VIEWS] = {target, picked, other};
  for (int k = 0; k < VIEWS; k++) e->data[k] = view[k]->data, e->dtype[k] = (int8_t)view[k]->dtype;
  if (!(weight->flags & HM_VIEW_ABSENT)) e->weight = weight->data, e->weight_dtype = weight->dtype;
  const hm_view *total = call->op == HM_OP_NLL_LOSS ? &call->out[1] : &call->in[3];
  e->total_dtype = total->dtype;
  if (call->op == HM_OP_NLL_LOSS) e->total = total->data;
  else if (e->reduction == MEAN) e->divisor = total->data;
  e->loss = call->out[0].data;
  e->loss_dtype = call->out[0].dtype;
  e->fault = hm_cuda_fault_word(call->stream);
  hm_loop loop;
  const int64_t count = hm__loop_make(&loop, &row[0], VIEWS - 1, &row[1]);
  if (count > 0 && count < HM_CUDA_PIECE) e->walk = hm_make_walk<VIEWS>(&loop);
  return count;
}

static int run_pick(nll e, const hm_kernel_call *call, const char *name) {
  const unsigned blocks = e.walk.count <= SMALL ? 1 : hm_blocks(e.walk.count, SMALL / 8);
  if (blocks > 1 && call->workspace_bytes < blocks * sizeof(part))
    return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
  e.parts = static_cast<part *>(call->workspace);
  const int status = HM_RUN(name, nll_pick, blocks, HM_BLOCK, 0, call->stream, e);
  if (status != HM_OK || blocks == 1) return status;
  return HM_RUN(name, nll_total, 1, HM_BLOCK, 0, call->stream, e, (int)blocks);
}

static int no_positions(const hm_kernel_call *call, int reduction) {
  int status = HM_OK;
  if (call->op == HM_OP_NLL_LOSS) status = hm_cuda_fill_number(&call->out[1], 0.0, 0, call->stream);
  if (status != HM_OK || reduction == NONE) return status;
  return hm_cuda_fill_number(&call->out[0], reduction == MEAN ? (double)NAN : 0.0, 0, call->stream);
}

extern "C" int hm_cuda_nll(const hm_kernel_call *call) {
  const char *name = name_of(call->op);
  if (!name) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no loss with op id %d", call->op);
  nll e;
  const int64_t count = set_nll(&e, call);
  if (count >= HM_CUDA_PIECE) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: 2^31 positions or more", name);
  if (call->op != HM_OP_NLL_LOSS_BACKWARD)
    return count == 0 ? no_positions(call, e.reduction) : run_pick(e, call, name);
  const int status = hm_cuda_fill_number(&call->out[0], 0.0, 0, call->stream);
  if (status != HM_OK || count == 0) return status;
  return HM_RUN(name, nll_write, hm_blocks(count), HM_BLOCK, 0, call->stream, e);
}

/*
 * attention.c -- attention by blocks, and its gradients: memory grows with T and S, never with T x S.
 *
 * Forward (online softmax): a block of 64 queries meets the keys 64 at a time; the largest score m and the sum l of
 * exp(score - m) of each query are carried along, and what has been summed is rescaled where m grows.  out = sum / l,
 * lse = m + log l.  A query that sees no key gets 0 and an lse of -infinity.
 *
 * Backward: weights w are made again as exp(score - lse); dq by blocks of queries, dk and dv by blocks of keys over all
 * queries of all heads that share them.  With u = g v^T (times what dropout gave), the product q k^T has the gradient
 * w * (u - delta), where delta = sum of w * u over a query's keys = sum of g * out.  A half type has rounded out, and a
 * small gradient would drown in that: so delta begins as the sum of g * out, what it lacks is summed as w * (u - delta)
 * while dq is, and taken out of dq by a sum of w * key.  No two threads add to the same place: same bits for any number
 * of threads.
 *
 * Numbers: float32 inside for float32 and half types, float64 for float64; results are rounded once.  NaN and infinity
 * propagate; those of a value that a query does not see reach it where both lie in one pair of blocks (0 * NaN is NaN),
 * as they do where softmax is a matrix.
 *
 * Dropout: weight (b, h, t, s) takes the word of its place in [B, H, T, S], row-major (fill.c has the rules).
 *
 * Compiled once per instruction set; called through hm_isa.attention; works in the call's workspace.
 */
#include <omp.h>

#include "attention.h"
#include "vec.h"

enum { BLOCK = 64 }; /* queries, keys */
enum { FORWARD, DELTAS, QUERIES, KEYS };

/* Widths are padded with zeros to whole vectors of any instruction set. */
static int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

/* Keys that queries before `end` may see: [0, result). */
static int64_t keys_before(const hm_att_plan *p, int64_t end) { return p->causal && end < p->s ? end : p->s; }

static int64_t blocks_of(const hm_att_plan *p, int pass) {
  if (pass == DELTAS) return 1;
  return ((pass == KEYS ? p->s : p->t) + BLOCK - 1) / BLOCK;
}

static int64_t units_of(const hm_att_plan *p, int pass) {
  return p->b * (pass == KEYS ? p->g : p->h) * blocks_of(p, pass);
}

/* ====== Workspace: delta of all queries, then each thread's own memory ====== */

static size_t delta_bytes(const hm_att_plan *p, bool back, size_t size) {
  return back ? ((size_t)(p->b * p->h * p->t) * size + 63) & ~(size_t)63 : 0;
}

static size_t thread_bytes(const hm_att_plan *p, size_t size) {
  const int64_t d = padded(p->d), e = padded(p->e);
  return (size_t)(BLOCK * (3 * d + 2 * e + (d > e ? d : e) + 3 * BLOCK + 3)) * size;
}

/* Threads worth having for a pass; as many as there are units at most. */
static int threads_for(const hm_att_plan *p, int pass) {
  const int64_t units = units_of(p, pass), side = pass == KEYS ? p->t * hm__att_group(p) : p->s;
  const int64_t cost = pass == DELTAS ? p->t * p->e * 8 : (side + 1) * (p->d + p->e + 8) * BLOCK;
  const int threads = hm_cpu_threads(units, cost);
  return units < threads ? (int)(units > 0 ? units : 1) : threads;
}

/* ====== Dropout ====== */

/* The words of pairs first ... first + n - 1, n <= BLOCK: a place in buffer, which has room for BLOCK + 8. */
static __attribute__((noinline)) const uint32_t *draw_words(const hm_att_plan *p, int64_t first, int64_t n,
                                                            uint32_t *buffer) {
  const int64_t lead = first % 4, groups = (lead + n + 3) / 4;
  const uint64_t counter = p->offset + (uint64_t)(first / 4);
  for (int64_t c = 0; c < groups; c++) hm_philox_words(buffer + 4 * c, p->seed, counter + (uint64_t)c, 0);
  return buffer + lead;
}

#define HM_ATT_OWN __attribute__((noinline)) /* kept out of line: the code is smaller, and no slower */

#define HM_T float
#define HM_S f32
#define HM_DT HM_F32
#include "attention_tiles.h"
#undef HM_T
#undef HM_S
#undef HM_DT

int HM_ISA_FN(hm_cpu_attention)(const hm_kernel_call *call) {
  if (call->op != HM_OP_ATTENTION && call->op != HM_OP_ATTENTION_BACKWARD)
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "attention: op %d is unknown to the cpu", call->op);
  return call->compute == HM_F64 ? hm_cpu_attention_f64(call) : run_f32(call);
}

/* ====== Once for all instruction sets ====== */

#define HM_FIRST_baseline 1
#if HM_ISA_JOIN(HM_FIRST, HM_ISA)

#define HM_T double
#define HM_S f64
#define HM_DT HM_F64
#include "attention_tiles.h"
#undef HM_T
#undef HM_S
#undef HM_DT

int hm_cpu_attention_f64(const hm_kernel_call *call) { return run_f64(call); }

int hm_cpu_attention_workspace(const hm_kernel_call *call, size_t *bytes) {
  const hm_att_plan p = hm__att_plan(call);
  const bool back = call->op == HM_OP_ATTENTION_BACKWARD;
  const size_t size = call->compute == HM_F64 ? 8 : 4;
  int threads = 1;
  for (int pass = back ? DELTAS : FORWARD; pass <= (back ? KEYS : FORWARD); pass++) {
    const int more = threads_for(&p, pass);
    if (more > threads) threads = more;
  }
  *bytes = delta_bytes(&p, back, size) + (size_t)threads * thread_bytes(&p, size);
  return HM_OK;
}

#endif

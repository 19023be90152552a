/*
 * expression.c -- runs a program of kernels/expression.h on one tile: what stands behind hm.elementwise on the CPU.
 *
 * elementwise.c's engine gathers operands of any dtype and layout into dense tiles of the type computed in and calls hm_cpu_expression_tile for
 * each.  The tile is cut into chunks so short that all registers of the program lie in L1; each step is one loop over a chunk.  So a formula
 * makes one pass over memory, however long it is.  Compiled once per instruction set; owns no memory.
 */
#include "../half.h"
#include "isa.h"

enum { SLOT_BYTES = 24 << 10, CHUNK_MOST = 512, CHUNK_UNIT = 16 };

/* ====== The steps as loops ====== */

#define STEP_LOOP(suffix, type, id, value)                                                                             \
  static void step_##id##_##suffix(int64_t n, type *o, const type *pa, const type *pb, const type *pc) {               \
    _Pragma("GCC ivdep") for (int64_t k = 0; k < n; k++) {                                                             \
      const type a = pa[k], b = pb[k], c = pc[k];                                                                      \
      (void)b, (void)c;                                                                                                \
      o[k] = (type)(value);                                                                                            \
    }                                                                                                                  \
  }

#define F(name) hm_##name##_f32
#define X(id, name, operands, value) STEP_LOOP(f32, float, id, value)
HM_STEP_ANY_MAP(X)
HM_STEP_FLOAT_MAP(X)
#undef X
#undef F

#define F(name) hm_##name##_f64
#define X(id, name, operands, value) STEP_LOOP(f64, double, id, value)
HM_STEP_ANY_MAP(X)
HM_STEP_FLOAT_MAP(X)
#undef X
#undef F

#define F(name) hm_##name##_i64
#define X(id, name, operands, value) STEP_LOOP(i64, int64_t, id, value)
HM_STEP_ANY_MAP(X)
#undef X
#undef F

/* ====== Programs ====== */

/* Defines run_SUFFIX: the whole program over n elements. */
#define RUNNER(suffix, type)                                                                                           \
  typedef void (*loop_##suffix)(int64_t, type *, const type *, const type *, const type *);                            \
  static void run_##suffix(const hm_program *p, int64_t n, type *o, const type *const *in) {                           \
    static const loop_##suffix loops[HM_STEP_COUNT] = {TABLE_##suffix};                                                \
    _Alignas(64) type slots[SLOT_BYTES / sizeof(type)];                                                                \
    const int64_t chunk = chunk_of(p, sizeof(type));                                                                   \
    for (int i = 0; i < p->n_constants; i++)                                                                           \
      for (int64_t k = 0; k < chunk && k < n; k++) slots[i * chunk + k] = (type)p->constant[i];                        \
    for (int64_t at = 0; at < n; at += chunk) {                                                                        \
      const int64_t m = n - at < chunk ? n - at : chunk;                                                               \
      for (int s = 0; s < p->n_steps; s++) {                                                                           \
        const hm_step *step = &p->step[s];                                                                             \
        const type *from[3];                                                                                           \
        for (int i = 0; i < 3; i++)                                                                                    \
          from[i] = step->from[i] < p->n_in ? in[step->from[i]] + at : slots + (step->from[i] - p->n_in) * chunk;      \
        type *const to = step->to == HM_STEP_RESULT ? o + at : slots + (step->to - p->n_in) * chunk;                   \
        loops[step->kind](m, to, from[0], from[1], from[2]);                                                           \
      }                                                                                                                \
    }                                                                                                                  \
  }

/* Elements of a chunk. */
static int64_t chunk_of(const hm_program *p, size_t size) {
  const int slots = p->n_constants + p->n_registers;
  const int64_t most = slots ? SLOT_BYTES / ((int64_t)size * slots) / CHUNK_UNIT * CHUNK_UNIT : CHUNK_MOST;
  return most < CHUNK_MOST ? most : CHUNK_MOST;
}

#define X(id, name, operands, value) [HM_STEP_##id] = step_##id##_f32,
#define TABLE_f32 HM_STEP_ANY_MAP(X) HM_STEP_FLOAT_MAP(X)
RUNNER(f32, float)
#undef X
#define X(id, name, operands, value) [HM_STEP_##id] = step_##id##_f64,
#define TABLE_f64 HM_STEP_ANY_MAP(X) HM_STEP_FLOAT_MAP(X)
RUNNER(f64, double)
#undef X
#define X(id, name, operands, value) [HM_STEP_##id] = step_##id##_i64,
#define TABLE_i64 HM_STEP_ANY_MAP(X)
RUNNER(i64, int64_t)
#undef X

void HM_ISA_FN(hm_cpu_expression_tile)(const hm_program *program, int dtype, int64_t n, void *o,
                                       const void *const *in) {
  if (dtype == HM_F32) run_f32(program, n, o, (const float *const *)in);
  else if (dtype == HM_F64) run_f64(program, n, o, (const double *const *)in);
  else run_i64(program, n, o, (const int64_t *const *)in);
}

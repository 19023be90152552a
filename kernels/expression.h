/*
 * expression.h -- a formula as a list of steps: what hm.elementwise makes of a user's text.
 *
 * A program is straight-line code over numbers of one type (float, double or int64_t).  Each step has up to three operands and one result, which is
 * rounded to that type.  The two lists below are all the steps there are.  A step is a C expression of a, b and c, where F(name) is math.h's
 * function of that name for the type.  kernels/cpu/expression.c expands the lists to loops, core/expression_source.c prints them as CUDA C: what
 * a step computes is written once, and the CPU and the GPU agree to the bit.
 *
 * Header-only; owns nothing; may be included by kernels/ and core/.
 */
#ifndef HM_EXPRESSION_H
#define HM_EXPRESSION_H

#include "layout.h"
#include "kernels.h"

/* X(id, name, operands, value): for every type. */
#define HM_STEP_ANY_MAP(X)                                                                                             \
  X(COPY, "copy", 1, a)                                                                                                \
  X(NEG, "neg", 1, -a)                                                                                                 \
  X(ADD, "+", 2, a + b)                                                                                                \
  X(SUB, "-", 2, a - b)                                                                                                \
  X(MUL, "*", 2, (a * b))                                                                                              \
  X(ABS, "abs", 1, F(abs)(a))                                                                                          \
  X(EQ, "==", 2, a == b)                                                                                               \
  X(NE, "!=", 2, a != b)                                                                                               \
  X(LT, "<", 2, a < b)                                                                                                 \
  X(LE, "<=", 2, a <= b)                                                                                               \
  X(GT, ">", 2, a > b)                                                                                                 \
  X(GE, ">=", 2, a >= b)                                                                                               \
  X(AND, "&&", 2, (a != 0) & (b != 0))                                                                                 \
  X(OR, "||", 2, (a != 0) | (b != 0))                                                                                  \
  X(NOT, "!", 1, a == 0)                                                                                               \
  X(SELECT, "?:", 3, a != 0 ? b : c)

/* For floating types: integers become float32 where a formula has one of these. */
#define HM_STEP_FLOAT_MAP(X)                                                                                           \
  X(DIV, "/", 2, a / b)                                                                                                \
  X(SQRT, "sqrt", 1, F(sqrt)(a))                                                                                       \
  X(FLOOR, "floor", 1, F(floor)(a))                                                                                    \
  X(EXP, "exp", 1, F(exp)(a))                                                                                          \
  X(LOG, "log", 1, F(log)(a))                                                                                          \
  X(LOG1P, "log1p", 1, F(log1p)(a))                                                                                    \
  X(TANH, "tanh", 1, F(tanh)(a))                                                                                       \
  X(ERF, "erf", 1, F(erf)(a))                                                                                          \
  X(ERFC, "erfc", 1, F(erfc)(a))                                                                                       \
  X(SIN, "sin", 1, F(sin)(a))                                                                                          \
  X(COS, "cos", 1, F(cos)(a))                                                                                          \
  X(POW, "pow", 2, F(pow)(a, b))                                                                                       \
  X(LOG2, "log2", 1, F(log2)(a))                                                                                       \
  X(LOG10, "log10", 1, F(log10)(a))                                                                                    \
  X(EXPM1, "expm1", 1, F(expm1)(a))                                                                                    \
  X(SINH, "sinh", 1, F(sinh)(a))                                                                                       \
  X(COSH, "cosh", 1, F(cosh)(a))                                                                                       \
  X(TAN, "tan", 1, F(tan)(a))                                                                                          \
  X(ASIN, "asin", 1, F(asin)(a))                                                                                       \
  X(ACOS, "acos", 1, F(acos)(a))                                                                                       \
  X(ATAN, "atan", 1, F(atan)(a))                                                                                       \
  X(CEIL, "ceil", 1, F(ceil)(a))                                                                                       \
  X(ROUND, "round", 1, F(round)(a))                                                                                    \
  X(TRUNC, "trunc", 1, F(trunc)(a))                                                                                    \
  X(ATAN2, "atan2", 2, F(atan2)(a, b))                                                                                 \
  X(HYPOT, "hypot", 2, F(hypot)(a, b))                                                                                 \
  X(REMAINDER, "remainder", 2, F(remainder)(a, b))

typedef enum hm_step_kind {
#define X(id, name, operands, value) HM_STEP_##id,
  HM_STEP_ANY_MAP(X) HM_STEP_FLOAT_MAP(X)
#undef X
      HM_STEP_COUNT
} hm_step_kind;

/* Most constants and registers together: a thread keeps a tile of each in L1. */
enum { HM_MAX_SLOTS = 128, HM_MAX_STEPS = 2048 };

/* Slots count from 0: the inputs, then the constants, then registers.  `to` of the last step is HM_STEP_RESULT. */
enum { HM_STEP_RESULT = 0xffff };
typedef struct hm_step {
  uint16_t kind;
  uint16_t to;
  uint16_t from[3]; /* unused ones repeat the first */
} hm_step;

typedef struct hm_program {
  int n_in, n_constants, n_registers, n_steps;
  const double *constant;
  const hm_step *step;
} hm_program;

#endif

/*
 * expression_source.c -- a program of kernels/expression.h as CUDA C, for the compiler at run time.
 *
 * The text of kernels/math.h and half.h comes first, then one function for each kind of step that occurs, then one kernel: it walks the elements,
 * loads each operand as the type computed in, runs the steps in registers and stores once.  A kernel is made for the dtypes, for what is a
 * number, and for the number of dims; sizes and strides are arguments, but for operands that lie in one dim whose stride is 0 or 1.
 * Called by expression.c alone.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "formula.h"
#include "math_text.h"

/* ====== A text that grows ====== */

typedef struct text {
  char *data; /* NULL once memory was out */
  size_t n, max;
} text;

static void add(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add(text *t, const char *format, ...) {
  va_list args;
  if (!t->data) return;
  va_start(args, format);
  const int more = vsnprintf(t->data + t->n, t->max - t->n, format, args);
  va_end(args);
  if (t->n + (size_t)more < t->max) {
    t->n += (size_t)more;
    return;
  }
  t->max = 2 * t->max + (size_t)more;
  char *larger = hm_realloc(t->data, t->max);
  if (!larger) hm_free(t->data);
  t->data = larger;
  if (!larger) return;
  va_start(args, format);
  t->n += (size_t)vsnprintf(t->data + t->n, t->max - t->n, format, args);
  va_end(args);
}

/* ====== Layout ====== */

static bool is_number(const hm_kernel_call *k, int i) { return k->in[i].flags & HM_VIEW_SCALAR; }

void hm__expression_layout(const hm_kernel_call *k, hm_expression_layout *l) {
  hm_loop loop = {.ndim = 1};
  l->count = hm__loop_make(&loop, &k->out[0], k->n_in, k->in);
  l->ndim = loop.ndim;
  memcpy(l->shape, loop.shape, sizeof l->shape);
  memcpy(l->stride, loop.stride, sizeof l->stride);
}

/* Is the stride of operand o an argument, or written into the source? */
static bool takes_stride(const hm_expression_layout *l, int o) {
  return l->ndim > 1 || (l->stride[o][0] != 0 && l->stride[o][0] != 1);
}

int hm__expression_args(const hm_kernel_call *k, const hm_expression_layout *l) {
  int n = 2 + k->n_in + l->ndim - 1;
  for (int o = 0; o <= k->n_in; o++)
    if (o == 0 || !is_number(k, o - 1)) n += takes_stride(l, o) ? l->ndim : 0;
  return n;
}

/* 32-bit arithmetic on element numbers? */
static bool is_narrow(const hm_expression_layout *l) { return l->count < (int64_t)1 << 31; }

void hm__expression_key(const hm_kernel_call *k, const hm_expression_layout *l, char key[HM_EXPRESSION_KEY]) {
  int n = snprintf(key, HM_EXPRESSION_KEY, "%d%c%d", k->compute, is_narrow(l) ? 'n' : 'w', l->ndim);
  for (int o = 0; o <= k->n_in; o++) {
    const bool number = o > 0 && is_number(k, o - 1);
    const char stride = takes_stride(l, o) ? 's' : (l->stride[o][0] ? '1' : '0');
    const int dtype = o ? k->in[o - 1].dtype : k->out[0].dtype;
    n += number ? snprintf(key + n, (size_t)(HM_EXPRESSION_KEY - n), "#")
                : snprintf(key + n, (size_t)(HM_EXPRESSION_KEY - n), "%c%c", 'a' + dtype, stride);
  }
}

/* ====== What is written once ====== */

static const char prelude[] = "#define HM_FN static __device__ __forceinline__\n"
                              "#ifdef HM_EMU_MODULE\n"
                              "#include <float.h>\n"
                              "#include <math.h>\n"
                              "#include <stdint.h>\n"
                              "#include <string.h>\n"
                              "#else\n"
                              "#pragma nv_diag_suppress 177\n" /* functions that the formula does not use */
                              "typedef unsigned char uint8_t;\n"
                              "typedef unsigned short uint16_t;\n"
                              "typedef int int32_t;\n"
                              "typedef unsigned int uint32_t;\n"
                              "typedef long long int64_t;\n"
                              "typedef unsigned long long uint64_t;\n"
                              "#define INT32_MIN (-2147483647 - 1)\n"
                              "#define INT64_MAX 9223372036854775807ll\n"
                              "#define INT64_MIN (-INT64_MAX - 1)\n"
                              "#define FLT_MIN 1.17549435e-38f\n"
                              "#undef INFINITY\n"
                              "#undef NAN\n"
                              "#define INFINITY __int_as_float(0x7f800000)\n"
                              "#define NAN __int_as_float(0x7fc00000)\n"
                              "#endif\n";

static const char halves[] =
    "#ifdef HM_EMU_MODULE\n"
    "HM_FN float hm_wide_f16(uint16_t h) { return hm_f16_to_f32(h); }\n"
    "HM_FN uint16_t hm_narrow_f16(float x) { return hm_f32_to_f16(x); }\n"
    "#else\n"
    "HM_FN float hm_wide_f16(uint16_t h) { float x; asm(\"cvt.f32.f16 %0, %1;\" : \"=f\"(x) : \"h\"(h)); return x; }\n"
    "HM_FN uint16_t hm_narrow_f16(float x) { uint16_t h; asm(\"cvt.rn.f16.f32 %0, %1;\" : \"=h\"(h) : \"f\"(x)); return h; }\n"
    "#endif\n";

/* A dtype in memory: its C type, and how an element `p` becomes a T and a T `v` an element. */
static const struct storage {
  const char *type, *load, *store;
} storages[HM_DTYPE_COUNT] = {
    [HM_BOOL] = {"unsigned char", "(T)(%s != 0)", "(%s) != 0"},
    [HM_U8] = {"unsigned char", "(T)%s", "(unsigned char)(int)(%s)"},
    [HM_I32] = {"int", "(T)%s", "(int)(%s)"},
    [HM_I64] = {"long long", "(T)%s", "(long long)(%s)"},
    [HM_F16] = {"unsigned short", "(T)hm_wide_f16(%s)", "hm_narrow_f16((float)(%s))"},
    [HM_BF16] = {"unsigned short", "(T)hm_bf16_to_f32(%s)", "hm_f32_to_bf16((float)(%s))"},
    [HM_F32] = {"float", "(T)%s", "(float)(%s)"},
    [HM_F64] = {"double", "(T)%s", "(double)(%s)"},
};

static const char *const step_value[HM_STEP_COUNT] = {
#define X(id, name, operands, value) [HM_STEP_##id] = #value,
    HM_STEP_ANY_MAP(X) HM_STEP_FLOAT_MAP(X)
#undef X
};

static const char *type_of(int compute) {
  return compute == HM_F32 ? "float" : (compute == HM_F64 ? "double" : "long long");
}

static const char *suffix_of(int compute) { return compute == HM_F32 ? "f32" : (compute == HM_F64 ? "f64" : "i64"); }

/* ====== The kernel ====== */

static void add_steps(text *t, const hm_program *p) {
  bool done[HM_STEP_COUNT] = {false};
  for (int s = 0; s < p->n_steps; s++) {
    const int kind = p->step[s].kind;
    if (!done[kind]) add(t, "HM_FN T hm_step_%d(T a, T b, T c) { return (T)(%s); }\n", kind, step_value[kind]);
    done[kind] = true;
  }
}

static void add_parameters(text *t, const hm_kernel_call *k, const hm_expression_layout *l) {
  add(t, "long long count, %s *p0", storages[k->out[0].dtype].type);
  for (int i = 0; i < k->n_in; i++) {
    if (is_number(k, i)) add(t, ", %s p%d", type_of(k->compute), i + 1);
    else add(t, ", const %s *p%d", storages[k->in[i].dtype].type, i + 1);
  }
  for (int d = 1; d < l->ndim; d++) add(t, ", long long n%d", d);
  for (int o = 0; o <= k->n_in; o++) {
    if ((o && is_number(k, o - 1)) || !takes_stride(l, o)) continue;
    for (int d = 0; d < l->ndim; d++) add(t, ", long long t%d_%d", o, d);
  }
}

/* Element of operand o at the loop's place. */
static void element(const hm_expression_layout *l, int o, char *out, size_t size) {
  if (l->ndim == 1 && !takes_stride(l, o)) {
    snprintf(out, size, l->stride[o][0] ? "p%d[i]" : "p%d[0]", o);
    return;
  }
  int n = snprintf(out, size, "p%d[", o);
  for (int d = 0; d < l->ndim; d++)
    n += snprintf(out + n, size - (size_t)n, "%s(long long)i%d * t%d_%d", d ? " + " : "", d, o, d);
  snprintf(out + n, size - (size_t)n, "]");
}

/* i0, i1, ...: the place in each dim of element i. */
static void add_place(text *t, const hm_expression_layout *l) {
  if (l->ndim == 1) {
    add(t, "    const hm_index i0 = i;\n    (void)i0;\n");
    return;
  }
  add(t, "    hm_index r = i;\n");
  for (int d = l->ndim - 1; d > 0; d--)
    add(t, "    const hm_index i%d = r %% (hm_index)n%d;\n    r /= (hm_index)n%d;\n", d, d, d);
  add(t, "    const hm_index i0 = r;\n");
}

static void add_constant(text *t, int slot, double value) {
  if (value != value) add(t, "    const T s%d = (T)NAN;\n", slot);
  else if (value - value != 0) add(t, "    const T s%d = (T)%sINFINITY;\n", slot, value < 0 ? "-" : "");
  else add(t, "    const T s%d = (T)(%.17g);\n", slot, value);
}

static void add_body(text *t, const hm_program *p, const hm_kernel_call *k, const hm_expression_layout *l) {
  char place[512], value[640];
  for (int i = 0; i < k->n_in; i++) {
    if (is_number(k, i)) {
      add(t, "    const T s%d = p%d;\n", i, i + 1);
      continue;
    }
    element(l, i + 1, place, sizeof place);
    snprintf(value, sizeof value, storages[k->in[i].dtype].load, place);
    add(t, "    const T s%d = %s;\n", i, value);
  }
  for (int i = 0; i < p->n_constants; i++) add_constant(t, p->n_in + i, p->constant[i]);
  for (int i = 0; i < p->n_registers; i++) add(t, "    T s%d;\n", p->n_in + p->n_constants + i);
  for (int s = 0; s < p->n_steps; s++) {
    const hm_step *step = &p->step[s];
    char call[96];
    snprintf(call, sizeof call, "hm_step_%d(s%d, s%d, s%d)", step->kind, step->from[0], step->from[1], step->from[2]);
    if (step->to != HM_STEP_RESULT) {
      add(t, "    s%d = %s;\n", step->to, call);
      continue;
    }
    element(l, 0, place, sizeof place);
    snprintf(value, sizeof value, storages[k->out[0].dtype].store, call);
    add(t, "    %s = %s;\n", place, value);
  }
}

char *hm__expression_source(const hm_program *p, const hm_kernel_call *k, const hm_expression_layout *l) {
  text t = {hm_alloc(1 << 16), 0, 1 << 16};
  add(&t, "%s%s%s", prelude, hm_math_text, halves);
  add(&t, "typedef %s T;\n#define F(name) hm_##name##_%s\n", type_of(k->compute), suffix_of(k->compute));
  add(&t, "typedef %s hm_index;\n", is_narrow(l) ? "unsigned int" : "long long");
  add_steps(&t, p);
  add(&t, "extern \"C\" __global__ void __launch_bounds__(256) " HM_EXPRESSION_KERNEL "(");
  add_parameters(&t, k, l);
  add(&t, ") {\n  const hm_index step = (hm_index)gridDim.x * blockDim.x;\n"
          "  for (hm_index i = (hm_index)blockIdx.x * blockDim.x + threadIdx.x; i < (hm_index)count; i += step) {\n");
  add_place(&t, l);
  add_body(&t, p, k, l);
  add(&t, "  }\n}\n");
  return t.data;
}

static hm_user_arg integer(int64_t i) { return (hm_user_arg){.kind = HM_USER_INT, .dtype = HM_NONE, .i = i}; }

static hm_user_arg operand(const hm_view *v) {
  if (!(v->flags & HM_VIEW_SCALAR)) return (hm_user_arg){.kind = HM_USER_POINTER, .dtype = v->dtype, .data = v->data};
  if (v->dtype == HM_I64) return integer(v->scalar.i);
  return (hm_user_arg){.kind = HM_USER_FLOAT, .dtype = HM_NONE, .f = v->scalar.f};
}

int hm__expression_fill(const hm_kernel_call *k, const hm_expression_layout *l, hm_user_arg *arg) {
  int n = 0;
  arg[n++] = integer(l->count);
  arg[n++] = operand(&k->out[0]);
  for (int i = 0; i < k->n_in; i++) arg[n++] = operand(&k->in[i]);
  for (int d = 1; d < l->ndim; d++) arg[n++] = integer(l->shape[d]);
  for (int o = 0; o <= k->n_in; o++) {
    if ((o && is_number(k, o - 1)) || !takes_stride(l, o)) continue;
    for (int d = 0; d < l->ndim; d++) arg[n++] = integer(l->stride[o][d]);
  }
  return n;
}

/*
 * expression.c -- elementwise functions made at run time from a formula: made, called, freed.
 *
 * The caller (lua/bind, for hm.elementwise) brings the formula as a program of kernels/expression.h.  A call goes through dispatch.c like that of
 * a row, by an hm_op_info of the expression's own: promotion, autocast, broadcasting and errors are the same.  A backend that runs programs itself (the
 * CPU) is handed it; for one that compiles (CUDA) expression_source.c prints a kernel, which is kept here, one for each device, combination of
 * dtypes and kind of layout.  Outside autograd: lua/halfmoon/elementwise.lua records.  Mutator thread only.
 */
#include <string.h>

#include "formula.h"

typedef struct compiled {
  struct compiled *next;
  const hm_backend *backend; /* borrowed */
  int device;
  char key[HM_EXPRESSION_KEY];
  hm_user_kernel *kernel; /* owned */
} compiled;

struct hm_expression {
  hm_op_info info; /* its names lie in text */
  hm_program program;
  double *constant;
  hm_step *step;
  char *text;
  compiled *kernels;
};

/* ====== Making ====== */

static int operands_of(int kind) {
  static const uint8_t counts[HM_STEP_COUNT] = {
#define X(id, name, operands, value) operands,
      HM_STEP_ANY_MAP(X) HM_STEP_FLOAT_MAP(X)
#undef X
  };
  return counts[kind];
}

static int check_program(const hm_expression_spec *spec) {
  const hm_program *p = spec->program;
  const char *name = spec->name;
  if (p->n_in < 1 || p->n_in > HM_MAX_IN)
    return hm_fail(HM_ERR_ARG, "%s: 1 to %d inputs and parameters together, got %d", name, (int)HM_MAX_IN, p->n_in);
  if (p->n_steps < 1 || p->n_steps > HM_MAX_STEPS || p->n_constants < 0 || p->n_registers < 0 ||
      p->n_constants + p->n_registers > HM_MAX_SLOTS)
    return hm_fail(HM_ERR_ARG,
                   "%s: the formula is too long: at most %d steps, and %d constants and intermediate values", name,
                   (int)HM_MAX_STEPS, (int)HM_MAX_SLOTS);
  const int slots = p->n_in + p->n_constants + p->n_registers;
  for (int s = 0; s < p->n_steps; s++) {
    const hm_step *step = &p->step[s];
    bool good = step->kind < HM_STEP_COUNT;
    for (int i = 0; i < 3; i++) good = good && step->from[i] < slots;
    if (s == p->n_steps - 1) good = good && step->to == HM_STEP_RESULT;
    else good = good && step->to >= p->n_in + p->n_constants && step->to < slots;
    if (!good) return hm_fail(HM_ERR_INTERNAL, "%s: step %d of the program is broken", name, s + 1);
  }
  return HM_OK;
}

/* Can it be computed in int64: steps that integers have, and whole constants? */
static bool is_whole(const hm_program *p) {
  for (int s = 0; s < p->n_steps; s++)
    if (p->step[s].kind >= HM_STEP_DIV) return false;
  for (int i = 0; i < p->n_constants; i++)
    if (!(p->constant[i] >= -9007199254740992.0 && p->constant[i] <= 9007199254740992.0 &&
          p->constant[i] == (double)(int64_t)p->constant[i]))
      return false;
  return true;
}

/* Copies the names into one block and lets info point there. */
static int set_info(hm_expression *e, const hm_expression_spec *spec) {
  const int n = spec->program->n_in;
  size_t bytes = strlen(spec->name) + 1;
  for (int i = 0; i < n; i++) bytes += strlen(spec->in_name[i]) + 1;
  char *p = e->text = hm_alloc(bytes);
  if (!p) return HM_ERR_MEMORY;
  hm_op_info *info = &e->info;
  *info = (hm_op_info){.family = HM_FAMILY_ELEMENTWISE,
                       .n_in = (uint8_t)n,
                       .n_out = 1,
                       .ints = is_whole(spec->program) ? HM_INTS_KEEP : HM_INTS_FLOAT,
                       .lua = HM_LUA_NO,
                       .domain = "real",
                       .doc = "",
                       .infer = hm__infer_elementwise};
  info->name = info->signature = strcpy(p, spec->name);
  p += strlen(p) + 1;
  for (int i = 0; i < n; i++) {
    info->in[i] = (hm_in_info){.name = strcpy(p, spec->in_name[i]), .cls = spec->cls};
    p += strlen(p) + 1;
  }
  info->out[0] = (hm_out_info){.name = "out", .cls = spec->gives_bool ? 'b' : spec->cls};
  return HM_OK;
}

static int copy_program(hm_expression *e, const hm_program *p) {
  e->program = *p;
  e->step = hm_alloc(sizeof(hm_step) * (size_t)p->n_steps);
  e->constant = hm_alloc(sizeof(double) * (size_t)p->n_constants + 1);
  if (!e->step || !e->constant) return HM_ERR_MEMORY;
  memcpy(e->step, p->step, sizeof(hm_step) * (size_t)p->n_steps);
  for (int s = 0; s < p->n_steps; s++)
    for (int i = operands_of(e->step[s].kind); i < 3; i++) e->step[s].from[i] = e->step[s].from[0];
  if (p->n_constants) memcpy(e->constant, p->constant, sizeof(double) * (size_t)p->n_constants);
  e->program.step = e->step;
  e->program.constant = e->constant;
  return HM_OK;
}

int hm_expression_new(const hm_expression_spec *spec, hm_expression **out) {
  *out = NULL;
  int status = check_program(spec);
  if (status) return status;
  hm_expression *e = hm_calloc(sizeof *e);
  if (!e) return HM_ERR_MEMORY;
  status = set_info(e, spec);
  if (!status) status = copy_program(e, spec->program);
  if (status) hm_expression_free(e);
  else *out = e;
  return status;
}

void hm_expression_free(hm_expression *e) {
  if (!e) return;
  while (e->kernels) {
    compiled *k = e->kernels;
    e->kernels = k->next;
    k->backend->user_free(k->kernel);
    hm_free(k);
  }
  hm_free(e->step);
  hm_free(e->constant);
  hm_free(e->text);
  hm_free(e);
}

int hm_expression_count(const hm_expression *e) { return e->info.n_in; }
const char *hm_expression_name(const hm_expression *e) { return e->info.name; }
const char *hm_expression_input(const hm_expression *e, int index) { return e->info.in[index].name; }

/* ====== Kernels compiled at run time ====== */

static int find_kernel(hm_expression *e, const hm_backend *b, int device, const hm_kernel_call *k,
                       const hm_expression_layout *l, hm_user_kernel **out) {
  char key[HM_EXPRESSION_KEY];
  hm__expression_key(k, l, key);
  for (compiled *c = e->kernels; c; c = c->next)
    if (c->device == device && !strcmp(c->key, key)) {
      *out = c->kernel;
      return HM_OK;
    }
  compiled *c = hm_calloc(sizeof *c);
  char *source = c ? hm__expression_source(&e->program, k, l) : NULL;
  int status = source ? b->user_compile(device - 1, source, HM_EXPRESSION_KERNEL, true, &c->kernel) : HM_ERR_MEMORY;
  hm_free(source);
  if (status) {
    hm_free(c);
    return status == HM_ERR_MEMORY ? status : hm_fail(status, "%s: %s", e->info.name, hm_error_message());
  }
  c->backend = b;
  c->device = device;
  strcpy(c->key, key);
  c->next = e->kernels;
  e->kernels = c;
  *out = c->kernel;
  return HM_OK;
}

static int launch(hm_expression *e, const hm_backend *b, int device, const hm_kernel_call *k,
                  const hm_expression_layout *l) {
  enum { BLOCK = 256, MOST_BLOCKS = 4096 };
  hm_user_arg arg[HM_MAX_USER_ARGS];
  hm_user_kernel *kernel = NULL;
  const int status = find_kernel(e, b, device, k, l, &kernel);
  if (status) return status;
  const int64_t blocks = (l->count + BLOCK - 1) / BLOCK, block[3] = {BLOCK, 1, 1};
  const int64_t grid[3] = {blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, 1, 1};
  const int n = hm__expression_fill(k, l, arg);
  return b->user_launch(kernel, grid, block, 0, arg, n);
}

/* Replaces the view of a tensor operand by one of a row-major copy in the output's shape, which *copy owns. */
static int make_dense(int device, hm_view *v, const hm_view *out, hm_tensor **copy) {
  const int status = hm_empty(out->ndim, out->shape, v->dtype, device, copy);
  if (status) return status;
  hm_view dense;
  hm__view_of(*copy, &dense);
  hm__count_layout_copy(device);
  const int copied = hm__copy_view(device, v, &dense);
  if (!copied) *v = dense;
  return copied;
}

/* More dims than a kernel takes arguments for: operands and result are brought in one order first. */
static int launch_dense(hm_expression *e, const hm_backend *b, int device, const hm_kernel_call *call) {
  hm_kernel_call k = *call;
  hm_expression_layout l;
  hm_tensor *copy[HM_MAX_IN + 1] = {NULL};
  int status = hm_empty(k.out[0].ndim, k.out[0].shape, k.out[0].dtype, device, &copy[0]);
  if (!status) hm__view_of(copy[0], &k.out[0]);
  for (int i = 0; i < k.n_in && !status; i++)
    if (!(k.in[i].flags & HM_VIEW_SCALAR)) status = make_dense(device, &k.in[i], &k.out[0], &copy[1 + i]);
  if (!status) {
    hm__expression_layout(&k, &l);
    status = launch(e, b, device, &k, &l);
  }
  if (!status) status = hm__copy_view(device, &k.out[0], &call->out[0]);
  for (int i = 0; i <= HM_MAX_IN; i++) hm_tensor_release(copy[i]);
  return status;
}

/* ====== Calling ====== */

static int run(void *ud, hm_opcall *c, hm_kernel_call *k) {
  hm_expression *e = ud;
  const hm_backend *b = hm_device_backend(c->device);
  if (!b) return HM_ERR_DEVICE;
  if (b->expression) return b->expression(k, &e->program);
  if (!b->user_compile)
    return hm_fail(HM_ERR_UNSUPPORTED, "%s: %s runs no formulas", e->info.name, hm_device_name(c->device));
  hm_expression_layout l;
  hm__expression_layout(k, &l);
  if (hm__expression_args(k, &l) > HM_MAX_USER_ARGS) return launch_dense(e, b, c->device, k);
  return launch(e, b, c->device, k, &l);
}

int hm_expression_call(hm_expression *e, const hm_arg *in, hm_tensor **out) {
  return hm__call_with(&e->info, in, run, e, out);
}

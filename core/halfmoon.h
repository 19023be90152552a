/*
 * halfmoon.h -- the engine, for C: tensors, ops, autograd, autocast, the gradient scaler, optimizers, files.
 *
 * The one public header of core/.  lua/bind is its first user; a C program may use it alone.  Knows no Lua.
 *
 * Conventions
 *   - A function that can fail returns a status (0 is HM_OK) and leaves a message for this thread in hm_error_message().
 *     On failure every out-parameter is left NULL (or untouched for numbers), and no argument has changed.
 *   - "returns a new reference": the caller owns one reference and gives it back with hm_tensor_release.
 *     "borrows": the callee keeps nothing.  "retains": the callee takes a reference of its own.
 *   - dims and indices count from 0 here, negative dims from the end.  Shapes are in elements, sizes in bytes.
 *   - One thread at a time changes tensors (the mutator).  Reference counts are atomic; error messages are per thread.
 */
#ifndef HALFMOON_H
#define HALFMOON_H

#include <stdarg.h>
#include <stdatomic.h>

#include "kernels.h"

#define HM_VERSION "0.1.0"

/* ====== Errors (status.c) ====== */

/* Keeps a printf-style message for this thread; returns code, so that `return hm_fail(HM_ERR_SHAPE, ...)` reads well.
 * A message is "what: expected, came" and may go on with lines that begin with two spaces, the last a "hint: ". */
int hm_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The message of the last failure on this thread; "" if none.  Valid until the next failure. */
const char *hm_error_message(void);
/* Text of a status code. */
const char *hm_status_text(int code);

/* ====== Memory (alloc.c) ====== */

/* Host memory for the engine's own structures; all of core allocates through these, so that a test can make the n-th call
 * fail.  hm_alloc returns NULL when memory is out and keeps a message; hm_calloc zeroes; hm_free leaves errno as it is. */
void *hm_alloc(size_t bytes);
void *hm_calloc(size_t bytes);
void *hm_realloc(void *p, size_t bytes);
void hm_free(void *p);
/* Test hook: fail the n-th allocation from now (1 is the next), tensor memory included; 0 switches off.  Returns what was left to the
 * failure asked for before: 0 if it came, or there was none. */
int64_t hm_alloc_fail_at(int64_t n);
/* Test hook: blocks of host memory in use (not those kept for reuse), as a difference to the first call, which begins the count. */
int64_t hm_host_blocks(void);

typedef struct hm_memory_stats {
  int64_t live;          /* bytes of tensor data in use */
  int64_t peak;          /* largest `live` since the last reset */
  int64_t cached;        /* bytes kept for reuse */
  int64_t reserved;      /* live (rounded to block sizes) + cached: what was asked from the system */
  int64_t allocs;        /* tensor allocations served */
  int64_t system_allocs; /* of those, how many went to the system */
  int64_t layout_copies; /* copies made only to change layout */
  int64_t shadow_bytes;  /* part of live: derived low-precision and packed copies */
  int64_t pinned;        /* bytes of pinned host memory that loaders hold for this device; beside all of the above */
} hm_memory_stats;

/* Fills in what a device's memory stands at. */
int hm_memory_get_stats(int device, hm_memory_stats *out);
/* peak and the mark of the pressure hook start again from what is live. */
void hm_memory_reset_peak(int device);
/* Gives cached blocks back to the system. */
void hm_memory_trim(int device);

/* Called on the mutator thread, outside all locks, when an allocation misses the cache, or would take live bytes past their highest mark
 * so far.  bytes: what is wanted.  desperate: the system is out of memory; whatever can be freed should be.  Returns true if it looked for
 * garbage: the mark then rises if need be; else it stays, and the hook is asked again. */
typedef bool (*hm_pressure_fn)(void *ud, size_t bytes, bool desperate);
void hm_set_pressure_hook(hm_pressure_fn fn, void *ud);

/* ====== Devices (device.c) ====== */

/* Device ids: 0 is the CPU, 1 + i is cuda:i. */
enum { HM_CPU = 0, HM_MAX_DEVICES = 17 };

/* Opens the backends.  Idempotent. */
int hm_init(void);
/* The backend of a device; NULL with a message when there is none. */
const hm_backend *hm_device_backend(int device);
/* "cpu", "cuda", "cuda:1" -> id.  */
int hm_device_parse(const char *name, int *device);
/* "cpu" or "cuda:0".  Static. */
const char *hm_device_name(int device);
/* How many devices of CUDA there are; 0 without a driver or plug-in: hm_error_message() then says why. */
int hm_cuda_device_count(void);
/* Has the plug-in been opened, and has it devices?  Opens nothing. */
bool hm_cuda_opened(void);
/* What a device is; kept from the first call on.  NULL with a message when there is none. */
const hm_device_info *hm_device_get_info(int device);
/* HM_ERR_UNSUPPORTED, with the reason, if a device has no products of that half dtype. */
int hm_device_check_low(int device, int dtype);
/* Waits until a device has done all that was queued, and tells what went wrong in it. */
int hm_synchronize(int device);

/* ---- kernels that a user wrote (userkernel.c) ---- */

typedef struct hm_kernel hm_kernel;

/* Compiles the kernel `name` of a CUDA C++ source for a device.  The compiler's messages come as the error. */
int hm_kernel_compile(int device, const char *source, const char *name, hm_kernel **out);
void hm_kernel_free(hm_kernel *k); /* waits until it has run; NULL is ignored */
int hm_kernel_device(const hm_kernel *k);
const char *hm_kernel_name(const hm_kernel *k); /* borrowed */

/* ====== Tensors (tensor.c, view.c) ====== */

typedef struct hm_storage hm_storage;
typedef struct hm_node hm_node;
typedef struct hm_hook hm_hook;

/* A view (shape, strides, offset) on a reference-counted storage.  Outside core the fields are for reading only. */
typedef struct hm_tensor {
  _Atomic int32_t refs;
  int8_t dtype;
  int8_t ndim;
  bool requires_grad; /* leaf that wants a gradient, or output of a recorded op */
  bool is_view;       /* made by a view op of another tensor */
  bool retains_grad;  /* non-leaf that keeps its gradient */
  bool in_lua;        /* the binding's mark: an entry stands in its identity map */
  hm_storage *storage;
  int64_t offset; /* in elements */
  int64_t numel;
  int64_t shape[HM_MAX_NDIM];
  int64_t stride[HM_MAX_NDIM]; /* in elements */
  hm_node *node;               /* what made it (owned); NULL for leaves */
  int32_t out_nr;              /* which output of node */
  uint32_t rewrites;           /* of the storage when the tensor was made, or last changed in place itself */
  hm_node *accumulator;        /* leaves: the node that adds into grad; borrowed, NULL while no graph needs it */
  struct hm_tensor *grad;      /* owned */
  hm_hook *hooks;              /* owned list */
  uint64_t grad_order;         /* leaves: when a gradient last arrived; larger is later, 0 never */
} hm_tensor;

/* ---- life ---- */

/* A new row-major tensor with undefined contents.  Returns a new reference in *out.  shape: ndim sizes >= 0. */
int hm_empty(int ndim, const int64_t *shape, int dtype, int device, hm_tensor **out);
/* As hm_empty, filled from host memory: dense row-major data of dtype data_dtype, converted once. */
int hm_from_host(const void *data, int data_dtype, int ndim, const int64_t *shape, int dtype, int device,
                 hm_tensor **out);
/* Another tensor struct on t's storage: same shape and strides, no graph, requires_grad false.  New reference. */
int hm_alias(hm_tensor *t, hm_tensor **out);
/* A view on t's storage with given geometry (unchecked against aliasing, checked against bounds); no graph. New reference. */
int hm_as_strided(hm_tensor *t, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset, hm_tensor **out);
hm_tensor *hm_tensor_retain(hm_tensor *t); /* returns t; NULL passes through */
void hm_tensor_release(hm_tensor *t);      /* drops one reference; NULL is ignored; errno stays */

/* ---- reading ---- */

int hm_tensor_device(const hm_tensor *t);               /* where its memory lies: a device id */
void *hm_tensor_data(const hm_tensor *t);               /* first element; device memory on a GPU */
uint32_t hm_tensor_version(const hm_tensor *t);         /* how often its memory was written to by in-place ops */
bool hm_tensor_is_leaf(const hm_tensor *t);             /* not made by a recorded op */
bool hm_is_contiguous(const hm_tensor *t);              /* row-major, no gaps */
bool hm_is_channels_last(const hm_tensor *t);           /* 4-d, memory order N H W C, no gaps */
int hm_item(const hm_tensor *t, double *f, int64_t *i); /* one element: floats set *f, others *i (either may be NULL) */
int hm_to_host(const hm_tensor *t, void *data,
               int data_dtype); /* all elements, row-major, converted; data holds numel */
/* Storage bytes and identity, for reports ("do these two share memory?"). */
const void *hm_tensor_storage_id(const hm_tensor *t);
/* "f16[32,784] on cpu", for messages.  buffer holds size bytes; returns buffer. */
const char *hm_describe(const hm_tensor *t, char *buffer, size_t size);

/* ---- gradient fields ---- */

/* Leaves of floating dtype only. */
int hm_set_requires_grad(hm_tensor *t, bool on);
/* Replaces t->grad; checks shape, dtype and device; retains grad; NULL clears. */
int hm_set_grad(hm_tensor *t, hm_tensor *grad);
int hm_retain_grad(hm_tensor *t);
/* fn gets the gradient that reached t (borrowed) and may set *replacement to a new reference.  A status other than HM_OK ends
 * backward.  `drop` frees ud.  Returns an id for hm_remove_hook in *id. */
typedef int (*hm_hook_fn)(void *ud, hm_tensor *grad, hm_tensor **replacement);
int hm_add_hook(hm_tensor *t, hm_hook_fn fn, void *ud, void (*drop)(void *ud), int64_t *id);
void hm_remove_hook(hm_tensor *t, int64_t id);

/* ====== Ops (dispatch.c; the table and one typed function per op are generated from kernels/ops.def) ====== */

/* An operand: a tensor, a number ("weak": it never changes a floating dtype), or nothing. */
typedef enum hm_arg_kind { HM_ARG_NONE, HM_ARG_TENSOR, HM_ARG_INT, HM_ARG_FLOAT } hm_arg_kind;
typedef struct hm_arg {
  hm_arg_kind kind;
  union {
    hm_tensor *t;
    int64_t i;
    double f;
  };
} hm_arg;

/* A tensor (NULL: nothing), an integer, a float as an operand. */
static inline hm_arg hm_t(hm_tensor *t) {
  return t ? (hm_arg){HM_ARG_TENSOR, {.t = t}} : (hm_arg){HM_ARG_NONE, {.t = NULL}};
}
static inline hm_arg hm_i(int64_t i) { return (hm_arg){HM_ARG_INT, {.i = i}}; }
static inline hm_arg hm_f(double f) { return (hm_arg){HM_ARG_FLOAT, {.f = f}}; }

typedef enum hm_attr_type {
  HM_ATTR_INT,
  HM_ATTR_INTS,
  HM_ATTR_FLOAT,
  HM_ATTR_BOOL,
  HM_ATTR_DTYPE,
  HM_ATTR_SHAPE,
  HM_ATTR_ENUM,
  HM_ATTR_DIM,
  HM_ATTR_DIMS,
  HM_ATTR_RNG
} hm_attr_type;

typedef struct hm_in_info {
  const char *name;
  char cls; /* L F P T t i b: see kernels/ops.def */
  bool optional, mutated;
} hm_in_info;

typedef struct hm_attr_info {
  const char *name;
  uint8_t type; /* hm_attr_type */
  bool optional;
  hm_attr dflt;               /* value when absent (i = HM_NONE or n = 0 for optional ones) */
  const char *const *choices; /* HM_ATTR_ENUM: NULL-terminated */
} hm_attr_info;

typedef struct hm_out_info {
  const char *name;
  char cls; /* L F P T f i u b *, or '=' for "the input number `same`" */
  int8_t same;
} hm_out_info;

enum { HM_INTS_FLOAT, HM_INTS_KEEP, HM_INTS_NO };
enum { HM_LUA_BOTH, HM_LUA_FUNCTION, HM_LUA_METHOD, HM_LUA_NO };

struct hm_opcall; /* core/op.h */

/* One row of the op table. */
typedef struct hm_op_info {
  const char *name, *signature, *doc, *meta; /* meta: "__add" or NULL */
  uint8_t family;                            /* hm_family */
  uint8_t n_in, n_out, n_attr;
  uint8_t ints, lua;
  bool differentiable; /* some input has a derivative */
  bool partial;
  bool generated; /* made by the generator from another row */
  bool dim_first; /* callers give the first attribute, a dim, right behind the first input: gather(x, dim, index) */
  float ulp;
  const char *domain;
  hm_in_info in[HM_MAX_IN];
  hm_out_info out[HM_MAX_OUT];
  const hm_attr_info *attr;
  uint8_t diff_in; /* bit mask: inputs with a derivative */
  uint8_t need_in[HM_MAX_IN],
      need_out[HM_MAX_IN]; /* bit masks: inputs and outputs that the derivative by input i reads */
  int (*infer)(struct hm_opcall *call);
  int (*backward)(hm_node *node, hm_tensor *const *grad, hm_tensor **grad_in);
} hm_op_info;

const hm_op_info *hm_op_get(int op); /* op in [0, HM_OP_COUNT) */
int hm_op_find(const char *name);    /* op id, or -1 */

/* Runs op: autocast, promotion, shapes, memory, kernel, one node if a gradient is wanted.
 *   in    info->n_in operands (borrowed); absent optional ones have kind HM_ARG_NONE
 *   attr  info->n_attr attributes (borrowed)
 *   out   info->n_out new references.  An output that is a mutated input is a new reference to that input. */
int hm_call(int op, const hm_arg *in, const hm_attr *attr, hm_tensor **out);
/* As hm_call; the first output is written in out_dtype (HM_NONE: the op's rule), rounded once. */
int hm_call_as(int op, const hm_arg *in, const hm_attr *attr, int out_dtype, hm_tensor **out);
/* The in-place form of an elementwise op: the result goes into in[0].t.  Returns nothing new. */
int hm_call_inplace(int op, const hm_arg *in, const hm_attr *attr);

/* Launches a user's kernel on tensors (contiguous, on its device) and numbers, behind all work queued before.  Outside autograd. */
int hm_kernel_launch(hm_kernel *k, const int64_t grid[3], const int64_t block[3], int64_t shared_bytes,
                     const hm_arg *in, int n);

/* ---- formulas (expression.c): elementwise functions made at run time, outside autograd ---- */

typedef struct hm_expression hm_expression;
struct hm_program; /* kernels/expression.h */

typedef struct hm_expression_spec {
  const char *name;           /* for messages */
  const char *const *in_name; /* program->n_in of them, at most HM_MAX_IN */
  char cls;                   /* autocast class of all inputs: L F P T */
  bool gives_bool;            /* the result is true or false, not of the inputs' dtype */
  const struct hm_program *program;
} hm_expression_spec;

/* Copies the program, after checking it.  Integer inputs are computed in int64 where all steps can be, else become float32. */
int hm_expression_new(const hm_expression_spec *spec, hm_expression **out);
void hm_expression_free(hm_expression *e);                          /* NULL is ignored */
int hm_expression_count(const hm_expression *e);                    /* inputs */
const char *hm_expression_name(const hm_expression *e);             /* borrowed */
const char *hm_expression_input(const hm_expression *e, int index); /* borrowed */
/* Runs it on tensors and numbers, by the same rules as an elementwise row: promotion, autocast, broadcasting.  One pass; on a GPU one kernel,
 * compiled at the first call for each combination of dtypes.  A new reference in *out; nothing is recorded. */
int hm_expression_call(hm_expression *e, const hm_arg *in, hm_tensor **out);

/* Composites that are not rows (composite.c).  New references. */
int hm_to(hm_tensor *t, int dtype, int device, bool copy,
          hm_tensor **out);                       /* dtype HM_NONE, device -1: as t.  Nothing to do: t */
int hm_contiguous(hm_tensor *t, hm_tensor **out); /* row-major; t itself if it is so */
int hm_channels_last(hm_tensor *t, hm_tensor **out);
int hm_clone(hm_tensor *t, hm_tensor **out);
int hm_cat(hm_tensor *const *list, int n, int dim, hm_tensor **out);
int hm_stack(hm_tensor *const *list, int n, int dim, hm_tensor **out);
/* Sums t over the dims that broadcasting from `shape` added; HM_ERR_SHAPE if shape does not broadcast to t's. */
int hm_sum_to(hm_tensor *t, int ndim, const int64_t *shape, hm_tensor **out);
/* The shape that a and b broadcast to. */
int hm_broadcast(int na, const int64_t *a, int nb, const int64_t *b, int *n, int64_t *out);
/* dtype of arithmetic between two dimensioned tensors. */
int hm_promote(int a, int b);

/* A record of every op that ran, for specs and debugging.  Pointers are valid during the call only. */
typedef struct hm_op_event {
  const hm_op_info *info;
  bool backward; /* run by the engine's backward walk */
  int n_in, n_out, n_saved;
  const hm_view *in, *out; /* as the kernel got them */
  hm_tensor *const *saved; /* tensors kept for backward */
} hm_op_event;
typedef void (*hm_op_log_fn)(void *ud, const hm_op_event *event);
void hm_set_op_log(hm_op_log_fn fn, void *ud); /* NULL switches off */

/* ====== Looking at values (telemetry.c) ====== */

/* What a tensor of a floating dtype holds. */
typedef struct hm_census {
  int64_t n, zeros;
  int64_t inf, minus_inf, nan;
  double amax, sum_sq; /* of the finite values */
  int64_t flushed, subnormal,
      overflow; /* what float16 would make of the finite values times scale: zero, a subnormal, infinity */
} hm_census;
/* Counts on the host; waits for the device.  histogram: NULL, or HM_HISTOGRAM counts of the finite values by exponent (kernels.h), written. */
int hm_take_census(const hm_tensor *t, double scale, hm_census *out, int64_t *histogram);

typedef struct hm_op_result {
  const char *name;
  hm_tensor *t;
  const hm_census *census;
} hm_op_result;
/* A kernel call that read or made a value that is not finite.  Pointers are valid during the call only. */
typedef struct hm_op_sight {
  const hm_op_info *info;
  bool backward;              /* run by the engine's backward walk */
  const char *backward_of;    /* the op or function whose backward it belongs to; NULL outside a walk */
  const char *recorded;       /* where that one was recorded, if its mode had `anomaly`; else NULL */
  const hm_arg *in;           /* info->n_in operands, as the kernel got them */
  const hm_census *in_census; /* of each, before the call: zeros for numbers, integers and destinations */
  int n_results;
  const hm_op_result *result; /* outputs, and what else was written to */
} hm_op_sight;
typedef void (*hm_op_watch_fn)(void *ud, const hm_op_sight *sight);
/* Looks at the operands and results of every kernel call, which waits for the device each time.  NULL switches off.  For debugging. */
void hm_set_op_watch(hm_op_watch_fn fn, void *ud);
/* Calls looked at since the last watch began. */
int64_t hm_op_watch_calls(void);

/* A gradient on its way through a backward walk that float16 would hold under autocast, or (forward) what a matrix product or convolution of
 * a recorded forward made.  Pointers are valid during the call only. */
typedef struct hm_gradient_sight {
  const hm_tensor *t;
  const hm_census *census;
  const int64_t *histogram; /* HM_HISTOGRAM counts; NULL for forward */
  const char *op;           /* that made the tensor, or whose result the gradient is of */
  const char *recorded;     /* where that one was recorded, if its mode had `anomaly`; else NULL */
  bool forward;
  bool foretold; /* nothing was computed in low precision: the op's class says that autocast would */
} hm_gradient_sight;
typedef int (*hm_gradient_watch_fn)(void *ud, const hm_gradient_sight *sight);
/* Counts each such tensor and tells of it.  Gradients of float32 leaves are not looked at: float16 training has them in float32, too.
 * Waits for the device at each.  NULL switches off: then a gradient pays for one test.  A status that fn returns ends the walk. */
void hm_set_gradient_watch(hm_gradient_watch_fn fn, void *ud);

/* ====== Modes: gradients on or off, autocast (mode.c) ====== */

/* Belongs to one coroutine; the binding keeps one for each and says which is current.  Plain data, copied freely. */
typedef struct hm_mode {
  bool grad;             /* record ops */
  bool autocast;         /* inside an enabled region */
  bool cache;            /* keep casts of weights */
  int8_t low;            /* region's dtype: HM_F16 or HM_BF16; HM_F8_E4M3: products on 8-bit operands, by the recipe */
  int8_t backward_dtype; /* HM_NONE, or HM_F32: gradients of eligible ops are computed in float32 */
  const char *cls; /* NULL, or HM_OP_COUNT letters that override the ops' classes (0: as the table says); borrowed */
  int8_t anomaly;  /* HM_ANOMALY_... */
  struct hm_region *
      region; /* ops leave what backward needs to this region, which computes it again; NULL: they keep it.  Borrowed */
  struct hm_fp8_recipe *fp8; /* of the innermost region of "fp8", also where that is disabled inside; borrowed */
  int32_t fp8_position;      /* products without a weight that came by since the outermost such region began */
} hm_mode;

/* Looking for the op whose backward makes the first NaN. */
enum {
  HM_ANOMALY_OFF,
  HM_ANOMALY_NAN,
  HM_ANOMALY_INF,   /* the first infinity too */
  HM_ANOMALY_PLACES /* looks for nothing, only notes where ops are recorded */
};

hm_mode *hm_mode_current(void);     /* never NULL; changes through it take effect at once */
void hm_mode_switch(hm_mode *mode); /* NULL: this thread's own default mode */

typedef struct hm_cast_stats {
  int64_t hits, misses; /* low copies of weights found / made */
  int64_t casts;        /* casts of anything else */
  int64_t bytes;        /* held by low copies of weights */
} hm_cast_stats;
/* What autocast has cast since the start. */
void hm_cast_get_stats(hm_cast_stats *out);

/* ====== FP8, emulated on the CPU (fp8.c) ====== */

/* How products inside an "fp8" region are scaled: by delayed scaling, one scale per tensor.  Counted. */
typedef struct hm_fp8_recipe hm_fp8_recipe;

enum { HM_FP8_MAX_SLOTS = 4, HM_FP8_MAX_HISTORY = 1 << 20 };

typedef struct hm_fp8_options {
  int margin;       /* scales are divided by 2^margin */
  int history;      /* steps that a slot remembers */
  bool hybrid;      /* gradients in e5m2; else in e4m3, as the factors are */
  bool most_recent; /* the scale follows the newest step, not the largest of those remembered */
} hm_fp8_options;

/* One tensor of a product: a factor, or the gradient of the result. */
typedef struct hm_fp8_slot {
  const char *name; /* static */
  bool e5m2;
  bool recorded;  /* amax is of this step, and not in the history yet */
  float scale;    /* values are multiplied by it before they are rounded */
  float amax;     /* largest magnitude of the last step that had one */
  int n;          /* steps in the history */
  float *history; /* newest first */
} hm_fp8_slot;

/* One product.  For reading only. */
typedef struct hm_fp8_site {
  int32_t refs;
  int32_t op;        /* enum hm_op */
  hm_tensor *weight; /* the leaf that it is known by (owned), or NULL */
  bool weighted;     /* there is, or in a loaded one will be, such a weight */
  int32_t position;  /* without one: its place among such products in the region */
  int32_t n_slots;   /* the gradient's comes last */
  hm_fp8_slot slot[HM_FP8_MAX_SLOTS];
} hm_fp8_site;

int hm_fp8_recipe_new(const hm_fp8_options *options, hm_fp8_recipe **out); /* a new reference; all scales are 1 */
hm_fp8_recipe *hm_fp8_recipe_retain(hm_fp8_recipe *r);                     /* returns r; NULL passes through */
void hm_fp8_recipe_release(hm_fp8_recipe *r);                              /* NULL is ignored */
const hm_fp8_options *hm_fp8_recipe_options(const hm_fp8_recipe *r);       /* as it was made; borrowed */
/* A step begins: what the last one noted goes into the histories, and scales follow.  Called when an outermost region is entered. */
void hm_fp8_begin(hm_fp8_recipe *r);
int hm_fp8_site_count(const hm_fp8_recipe *r);
/* Sites stand in the order in which they first came by, then those that are still to come (hm_fp8_expect); borrowed. */
const hm_fp8_site *hm_fp8_site_get(const hm_fp8_recipe *r, int index);
/* For checkpoints: forgets all sites; then tells of each that is to come, in order.  A product that comes by for the first time takes the first
 * that fits: same op and place, or same op and with a weight.  Copies scale, amax, recorded and history of the slots. */
void hm_fp8_forget(hm_fp8_recipe *r);
int hm_fp8_expect(hm_fp8_recipe *r, const hm_fp8_site *like);

/* ====== Autograd (autograd.c) ====== */

/* Runs backward from n roots.  grads[i]: gradient of roots[i] (borrowed; NULL: ones, for a one-element root).  Gradients add into
 * .grad of the leaves.  The graph is freed as it is walked, unless retain.  An error (from a hook, say) leaves the graph dead and the
 * gradients made so far in place. */
int hm_backward(hm_tensor *const *roots, hm_tensor *const *grads, int n, bool retain, bool create_graph);
/* Gradients of roots by inputs, without touching .grad.  out: n_inputs new references (NULL where unused, an error unless allow_unused). */
int hm_autograd_grad(hm_tensor *const *roots, hm_tensor *const *grads, int n, hm_tensor *const *inputs, int n_inputs,
                     bool retain, bool create_graph, bool allow_unused, hm_tensor **out);

/* Under hm_mode.anomaly each node keeps where it was recorded, as this function tells it: a text from hm_alloc, which is taken over (NULL: not
 * known).  A walk under it fails at the first backward that makes a NaN, and says where its op was recorded. */
typedef char *(*hm_trace_fn)(void);
void hm_set_trace(hm_trace_fn fn);
/* Name of the op that made t, or of the function; NULL for leaves and tensors without a graph. */
const char *hm_grad_fn(const hm_tensor *t);
/* 1 << dtype of t and of every tensor that carries its gradient to the leaves, the leaves among them. */
uint32_t hm_graph_dtypes(const hm_tensor *t);

/* A custom function that cuts a graph, and the parts above (towards the roots) and below it; ud is the function's, borrowed. */
typedef struct hm_cut {
  void *ud;
  int above, below;
} hm_cut;
/* Parts of a graph, from 1: gradients of one part are added without passing a cut. */
typedef struct hm_parts {
  int n_parts, n_cuts, n_leaves;
  hm_cut *cut;
  int *asked; /* parts of the tensors that were asked for; 0: not in the graph */
  int *leaf;  /* parts of the leaves that were not asked for */
} hm_parts;
/* The parts into which custom functions of this name cut the graph below n roots (parts.c).  Functions that a backward has freed cut, but are
 * not listed.  The arrays of *out are the caller's. */
int hm_graph_parts(hm_tensor *const *roots, int n_roots, const char *name, hm_tensor *const *asked, int n_asked,
                   hm_parts *out);
void hm_parts_free(hm_parts *p);

/* A function with its own backward (Lua Functions).  Gradients of the n_out outputs come in (NULL: none arrived), gradients of the n_in inputs go
 * out (new references, NULL: none). */
typedef int (*hm_custom_fn)(void *ud, int n_out, hm_tensor *const *grad, int n_in, hm_tensor **grad_in);
/* Makes `out` (plain tensors, no graph of their own) the outputs of a custom node over `in`; takes ud over (drop(ud) at the end,
 * also when this fails).  Nothing is recorded when gradients are off or no input wants one. */
int hm_record_custom(const char *name, hm_tensor *const *in, int n_in, hm_tensor *const *out, int n_out,
                     hm_custom_fn fn, void *ud, void (*drop)(void *ud));
/* What else a custom node may have. */
typedef struct hm_custom_options {
  hm_tensor *const
      *save; /* tensors to keep for backward (aliases: inputs, outputs, others): hm_custom_saved hands them out */
  int n_save;
  const bool *plain; /* NULL, or for each output: true for one that carries no gradient */
} hm_custom_options;
int hm_record_custom_with(const char *name, hm_tensor *const *in, int n_in, hm_tensor *const *out, int n_out,
                          const hm_custom_options *options, hm_custom_fn fn, void *ud, void (*drop)(void *ud));
/* Inside a hm_custom_fn: the tensors that its node keeps, in order (*n: how many; out: new references, or NULL to ask for the number).  Under
 * create_graph inputs and outputs come with their graph.  One that was changed in place since is an error. */
int hm_custom_saved(int *n, hm_tensor **out);

/* ====== Regions that backward computes again (recompute.c) ====== */

typedef struct hm_region hm_region;
/* Runs the region's forward again on its arguments (borrowed); the results are not looked at. */
typedef int (*hm_region_fn)(void *ud, int n, hm_tensor *const *args);
typedef struct hm_region_options {
  bool random; /* computed again from the forward's random state */
  bool check;  /* what comes must be as in the forward: shape, dtype, device, version */
} hm_region_options;

/* A region of the forward that starts now, with the current modes and random state.  Keeps the arguments.  Takes ud over (drop(ud) at the end,
 * also when this fails).  The caller sets hm_mode.region while the forward runs, and calls hm_region_close behind it; the graph keeps
 * the region as long as it is needed. */
int hm_region_new(hm_tensor *const *args, int n, const hm_region_options *options, hm_region_fn fn, void *ud,
                  void (*drop)(void *ud), hm_region **out);
void hm_region_close(hm_region *r);
void hm_region_release(hm_region *r); /* NULL is ignored */
/* True while a region is computed again: what the forward did to statistics must not be done twice. */
bool hm_region_recomputing(void);

/* ====== Random numbers (random.c) ====== */

/* One Philox stream per device: (seed, offset).  An op takes ceil(numel / 4) counters. */
void hm_seed(uint64_t seed); /* all devices; offset 0 */
void hm_random_get(int device, uint64_t *seed, uint64_t *offset);
void hm_random_set(int device, uint64_t seed, uint64_t offset);
void hm_random_take(int device, int64_t numel, hm_attr *rng); /* fills an rng attribute and advances */

/* ====== Optimizers (optim*.c) ====== */

typedef enum hm_optim_kind {
  HM_OPTIM_SGD,
  HM_OPTIM_ADAM,
  HM_OPTIM_ADAMW,
  HM_OPTIM_RMSPROP,
  HM_OPTIM_ADAGRAD,
  HM_OPTIM_LION,
  HM_OPTIM_KINDS
} hm_optim_kind;

/* hm_optim_fields says which kind has which. */
typedef struct hm_optim_options {
  double lr, weight_decay;
  double momentum, dampening;
  double beta1, beta2, eps;
  double alpha;                               /* RMSprop: how much of the mean square stays */
  double lr_decay, initial_accumulator_value; /* Adagrad */
  bool nesterov, maximize, amsgrad, centered;
  bool kahan; /* half parameters: what rounding takes is kept and made up for */
  bool
      stochastic; /* half parameters: rounded by chance, unbiased; takes ceil(numel / 4) of the device's random numbers each */
} hm_optim_options;

typedef struct hm_optim_field {
  const char *name;
  size_t offset;    /* in hm_optim_options */
  bool flag;        /* a bool, else a double */
  double low, high; /* a number must lie in [low, high) */
  uint32_t kinds;   /* a bit for each kind that has it */
} hm_optim_field;

/* The table of options; static. */
const hm_optim_field *hm_optim_fields(int *n);
const char *hm_optim_kind_name(hm_optim_kind kind); /* "sgd", "adamw"; NULL for no kind */
/* PyTorch's name of the state in a slot, from 0; NULL where a kind has none there. */
const char *hm_optim_state_name(hm_optim_kind kind, int slot);
void hm_optim_defaults(hm_optim_kind kind, hm_optim_options *out);

typedef struct hm_optim hm_optim;

/* An optimizer without parameters. */
int hm_optim_new(hm_optim_kind kind, hm_optim **out);
void hm_optim_free(hm_optim *o); /* NULL is ignored */
/* Adds a group; retains the parameters (leaf tensors of floating dtype, no duplicates).  Returns its index in *group. */
int hm_optim_add_group(hm_optim *o, hm_tensor *const *params, int n, const hm_optim_options *options, int *group);
int hm_optim_group_count(const hm_optim *o);
/* Options of a group, readable and writable between steps (the scheduler's door). */
hm_optim_options *hm_optim_group_options(hm_optim *o, int group);
int hm_optim_param_count(const hm_optim *o);             /* over all groups, in order of addition */
hm_tensor *hm_optim_param(const hm_optim *o, int index); /* borrowed */
int hm_optim_param_group(const hm_optim *o, int index);
void hm_optim_zero_grad(hm_optim *o); /* gradients become NULL */
/* One update of every parameter that has a gradient; others are untouched. */
int hm_optim_step(hm_optim *o);
/* State of one parameter by name -> tensor (borrowed; NULL while there is none); step counts its updates. */
hm_tensor *hm_optim_state(const hm_optim *o, int index, const char *name);
int hm_optim_set_state(hm_optim *o, int index, const char *name,
                       hm_tensor *value); /* retains a copy in the state's dtype */
/* After steps of an asynchronous scaler: waits for the device and takes over which of them were made.  To be called before step counts
 * and state are read; whatever changes them does so itself. */
int hm_optim_settle(hm_optim *o);
int64_t hm_optim_param_step(const hm_optim *o, int index);
void hm_optim_set_param_step(hm_optim *o, int index, int64_t step);
/* Bytes of state held. */
int64_t hm_optim_state_bytes(const hm_optim *o);
/* Norm of all gradients of a list of tensors together, in one fixed order; non-finite values make it non-finite. */
int hm_grad_norm(hm_tensor *const *params, int n, double *norm);
/* grad *= coef for each that has one. */
int hm_grad_scale(hm_tensor *const *params, int n, double coef);
/* Every gradient's values held within [-limit, limit]; NaN stays. */
int hm_grad_clamp(hm_tensor *const *params, int n, double limit);
/* The norm of all gradients together as a 0-dim float32 tensor (new reference), and each gradient scaled so that it is max_norm at most, without
 * a wait for the device.  *norm is NULL, and nothing was done, where the gradients' device cannot do that. */
int hm_grad_clip(hm_tensor *const *params, int n, double max_norm, hm_tensor **norm);

/* ====== The gradient scaler (scaler.c) ====== */

/* What a check found about one parameter. */
typedef struct hm_param_finding {
  hm_tensor *param; /* borrowed */
  int index;        /* in its optimizer */
  int64_t inf_count, nan_count;
  double amax, norm; /* of unscaled finite gradients */
} hm_param_finding;

/* What a policy hears after each update.  Arrays are the scaler's, valid during the call. */
typedef struct hm_scaler_event {
  bool found_inf;
  int64_t inf_count, nan_count;
  int64_t
      step; /* counts updates that had a check, from 1 (a step retried after a skip, without update() in between, counts too) */
  double scale;                  /* the scale those gradients were made with */
  double amax, norm;             /* of unscaled finite gradients */
  const int64_t *histogram;      /* HM_HISTOGRAM counts by exponent (kernels.h); NULL unless wanted */
  const hm_param_finding *param; /* in the order of the checks; NULL unless wanted */
  int n_params;
} hm_scaler_event;

/* Decides the next scale.  Returns HM_OK and sets *scale; or a status with a message: the scale stays and the event is "fault".
 * *scale is the current scale on entry.  *stop may be set to a message (owned by the policy, valid until its next call): update() then fails
 * with HM_ERR_CALLBACK after its state is consistent. */
typedef int (*hm_policy_fn)(void *ud, const hm_scaler_event *event, double *scale, const char **stop);

/* NAN in a number: not given, take the default. */
typedef struct hm_scaler_options {
  double init_scale;           /* 65536 */
  double min_scale, max_scale; /* 1 and 2^24 by default, widened to hold init_scale; 0 and INFINITY switch them off */
  bool enabled;
  bool allow_f16_grads;
  bool async; /* on a device that can: nothing waits, and what happened is told later */
} hm_scaler_options;

typedef struct hm_culprit {
  hm_tensor *param; /* borrowed: lives while the optimizer does */
  int index;        /* in the optimizer */
  int64_t inf_count, nan_count;
} hm_culprit;

/* What a step that nobody waited for will turn out to have done.  Counted; the optimizer must outlive what is read of it. */
typedef struct hm_promise hm_promise;

/* What step() did.  culprits: in backward order, nearest the loss first; owned by the scaler, valid until its next step or unscale_. */
typedef struct hm_step_record {
  bool stepped, found_inf, empty;
  int64_t inf_count, nan_count;
  double scale;
  double norm, amax; /* of unscaled finite gradients */
  const hm_culprit *culprits;
  int n_culprits;
  hm_promise *
      promise; /* async: a new reference, and the other fields say nothing; NULL: all is known (but the scale of an empty one, NAN) */
} hm_step_record;

/* Fills in what became of the step; waits for the device the first time.  culprits belong to the promise. */
int hm_promise_read(hm_promise *promise, hm_step_record *record);
void hm_promise_free(hm_promise *promise); /* drops one reference; NULL is ignored */

typedef enum hm_scale_change {
  HM_SCALE_HOLD,
  HM_SCALE_GROW,
  HM_SCALE_BACKOFF,
  HM_SCALE_FLOOR,
  HM_SCALE_CAP,
  HM_SCALE_FAULT,
  HM_SCALE_STOP
} hm_scale_change;

typedef struct hm_update_record {
  double old_scale, new_scale;
  hm_scale_change event;
  int64_t ticket; /* async: not 0, the other fields say nothing, and hm_scaler_hear tells them under this number */
} hm_update_record;

/* How the device moves the scale in update().  alone: by PyTorch's rule, and no policy is asked; else it only backs off, until the policy has
 * heard of the overflow and says otherwise.  interval 0: no growth. */
typedef struct hm_scaler_rule {
  bool alone;
  double growth, backoff;
  int64_t interval;
} hm_scaler_rule;

/* An update of which all is known now. */
typedef struct hm_heard {
  int64_t ticket, step;
  bool told; /* it had a check, and no scale was given to update() */
  hm_update_record record;
  bool found_inf;
  int64_t inf_count, nan_count;
} hm_heard;

/* How many events a policy may be behind, and how many updates may be untold when there is none to ask. */
enum { HM_SCALER_LAG = 4, HM_SCALER_UNTOLD = 64 };
const char *hm_scale_change_name(hm_scale_change event); /* "hold", "grow", ... */

typedef struct hm_scaler hm_scaler;

/* A scaler without a policy: the scale stays until somebody sets it. */
int hm_scaler_new(const hm_scaler_options *options, hm_scaler **out);
void hm_scaler_free(hm_scaler *s);
bool hm_scaler_enabled(const hm_scaler *s);
double hm_scaler_get_scale(const hm_scaler *s); /* 1 when disabled.  Late: what the policy said last */
/* Does it work without waits now?  True from the first tensor on a device that can. */
bool hm_scaler_late(const hm_scaler *s);
/* The scale that the next loss is multiplied by, and the device's count of clean steps; late: waits for the device. */
int hm_scaler_read(const hm_scaler *s, double *scale, int64_t *clean);
/* Begins with another scale and count: after a checkpoint. */
int hm_scaler_restart(hm_scaler *s, double scale, int64_t clean);
void hm_scaler_set_rule(hm_scaler *s, const hm_scaler_rule *rule);
/* Late: hears of the oldest update that is still untold, asks the policy about it and writes its answer to the device.  *heard: there was one.
 * Waits for it when `all` is set or more are untold than may be (HM_SCALER_LAG, HM_SCALER_UNTOLD), else takes it only if it has come.  To be
 * called after each update() until nothing is heard.  Event STOP: fails, with *out filled in.  FAULT: as hm_scaler_update. */
int hm_scaler_hear(hm_scaler *s, bool all, bool *heard, hm_heard *out);
/* Clamped to the bounds; HM_ERR_ARG unless positive and finite. */
int hm_scaler_set_scale(hm_scaler *s, double scale);
void hm_scaler_bounds(const hm_scaler *s, double *min_scale, double *max_scale);
/* Takes ud over: drop(ud) when replaced or freed. */
void hm_scaler_set_policy(hm_scaler *s, hm_policy_fn fn, void *ud, void (*drop)(void *ud));
/* What events tell beyond counts, amax and norm, from the next check on; costs time in each check.  A scaler that is late has neither. */
void hm_scaler_want(hm_scaler *s, bool histogram, bool per_param);
/* loss * scale, always float32 (float64 stays), recorded.  A disabled scaler returns loss itself.  New reference. */
int hm_scaler_scale(hm_scaler *s, hm_tensor *loss, hm_tensor **out);
int hm_scaler_unscale(hm_scaler *s, hm_optim *o);
/* max_norm: 0 for none, else clips by the global norm inside pass 2. */
int hm_scaler_step(hm_scaler *s, hm_optim *o, double max_norm, hm_step_record *record);
/* new_scale: 0 lets the policy decide; without a policy the scale stays.  No check since the last update: nothing happens, event HOLD.
 * Event FAULT: returns HM_OK, and hm_error_message() says what the policy did.  Event STOP: fails, with the record filled in. */
int hm_scaler_update(hm_scaler *s, double new_scale, hm_update_record *record);
/* What the last check of o's gradients found, if there was one since update().  A scaler that is late does not know. */
bool hm_scaler_checked(const hm_scaler *s, const hm_optim *o, hm_step_record *record);
/* The gradients at hand were made with this scale (1: they are unscaled already), until the next update() that has a check. */
void hm_scaler_assume(hm_scaler *s, double scale);
/* A check that was made elsewhere, as if step() had made it: for replays.  Its histogram and parameters are not told.  Not for a scaler
 * that is disabled or late. */
int hm_scaler_tell(hm_scaler *s, int64_t inf_count, int64_t nan_count, double amax, double norm);
/* Events handed to policies so far, for checkpoints. */
int64_t hm_scaler_get_step(const hm_scaler *s);
void hm_scaler_set_step(hm_scaler *s, int64_t step);
/* An optimizer is about to go: forget what is kept about it. */
void hm_scaler_forget(hm_scaler *s, const hm_optim *o);

/* ====== Files (safetensors.c, idx.c, npy.c, cifar.c, csv.c) ====== */

typedef struct hm_named {
  const char *name;
  hm_tensor *tensor;
} hm_named;

typedef struct hm_pair {
  const char *key, *value;
} hm_pair;

/* Writes to a temporary file beside path, flushes it to the disk, renames.  Row-major, little-endian, dtypes as they are. */
int hm_safetensors_save(const char *path, const hm_named *entries, int n, const hm_pair *metadata, int n_metadata);

typedef struct hm_safetensors hm_safetensors; /* an open file: header checked, data not yet read */
/* Opens a file and checks its header; to be closed. */
int hm_safetensors_open(const char *path, hm_safetensors **out);
void hm_safetensors_close(hm_safetensors *f);
int hm_safetensors_count(const hm_safetensors *f);
const char *hm_safetensors_name(const hm_safetensors *f, int index);                /* in file order; borrowed */
int hm_safetensors_read(hm_safetensors *f, int index, int device, hm_tensor **out); /* new reference */
int hm_safetensors_metadata_count(const hm_safetensors *f);
hm_pair hm_safetensors_metadata(const hm_safetensors *f, int index); /* borrowed */

/* An IDX file (plain or gzip): a new row-major u8, i32, f32 or f64 tensor on the CPU. */
int hm_idx_read(const char *path, hm_tensor **out);

/* NumPy's arrays (npy.c).  Reading: new row-major tensors on the CPU; integers that there is no dtype for become the next wider one.  Writing
 * replaces the file as a whole; HM_ERR_DTYPE for bfloat16, which the format has not. */
int hm_npy_read(const char *path, hm_tensor **out);
int hm_npy_save(const char *path, hm_tensor *t);
typedef struct hm_npz hm_npz; /* an open archive: its directory checked, arrays not yet read */
int hm_npz_open(const char *path, hm_npz **out);
void hm_npz_close(hm_npz *z); /* NULL is ignored */
int hm_npz_count(const hm_npz *z);
const char *hm_npz_name(const hm_npz *z, int index); /* without .npy, in the archive's order; borrowed */
int hm_npz_read(const hm_npz *z, int index, hm_tensor **out);
int hm_npz_save(const char *path, const hm_named *entries, int n);

/* The bytes of a file as a u8 tensor on the CPU (cifar.c). */
int hm_bytes_read(const char *path, hm_tensor **out);
/* CIFAR-10 in its binary form: images u8 [n, 3, 32, 32] and labels i64 [n] of n_paths files, one after the other (cifar.c). */
int hm_cifar_read(const char *const *paths, int n_paths, hm_tensor **images, hm_tensor **labels);

/* Tables as text (csv.c). */
typedef struct hm_csv_options {
  char delimiter;
  int header; /* 1: the first line has names; 0: it has none; -1: it has if one of its fields is not a number */
} hm_csv_options;
typedef struct hm_csv hm_csv; /* an open table: its text in memory */
int hm_csv_open(const char *path, const hm_csv_options *options, hm_csv **out);
void hm_csv_close(hm_csv *c); /* NULL is ignored */
int hm_csv_columns(const hm_csv *c);
const char *hm_csv_name(const hm_csv *c, int column); /* borrowed; NULL where there is no header */
/* The chosen columns (from 0, in the order wanted) as a tensor [rows, n] on the CPU.  Empty fields are NaN, in integer dtypes an error. */
int hm_csv_read(hm_csv *c, const int *columns, int n, int dtype, hm_tensor **out);

/* ====== Batches (loader.c): one C thread gathers rows ahead of the loop ====== */

typedef struct hm_loader hm_loader;

typedef struct hm_loader_options {
  int64_t batch_size;
  bool drop_last;
  bool shuffle;
  uint64_t seed;
  int prefetch;        /* batches ready ahead; 0: gathered on the calling thread */
  int convert_to;      /* dtype of the first tensor's batches, or HM_NONE: as it is */
  double scale, shift; /* first tensor, when converted: x * scale + shift (in float32) */
  int device; /* where batches are delivered; 0: the CPU.  Another: by way of pinned memory, one batch ahead of the loop */
} hm_loader_options;

/* tensors: n of them, contiguous, on the CPU, equal size along dim 0 (retained).  */
int hm_loader_new(hm_tensor *const *tensors, int n, const hm_loader_options *options, hm_loader **out);
void hm_loader_free(hm_loader *l);             /* stops the thread */
int64_t hm_loader_batches(const hm_loader *l); /* per epoch */
/* Begins an epoch: order is a function of (seed, epoch) alone.  Batches of the last one that were not taken are dropped. */
int hm_loader_start(hm_loader *l, int64_t epoch, int64_t first); /* first: batches of the epoch that are passed over */
/* The next batch: n new references in out; *done is set (and out untouched) at the end of the epoch. */
int hm_loader_next(hm_loader *l, hm_tensor **out, bool *done);

#include "ops_api.h" /* generated: one function per op, e.g. int hm_op_tanh(hm_arg x, hm_tensor **out) */

#endif

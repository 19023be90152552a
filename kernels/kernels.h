/*
 * kernels.h -- what a device can compute.
 *
 * The contract between core and the backends.  A backend is one versioned struct of functions (hm_backend):
 * memory, and one kernel entry for each family of ops.  A kernel gets an op id, pointers, dtypes, shapes and strides;
 * it knows no tensor, no autograd and no Lua.  Adding an op adds an id (kernels/ops.def), never a slot here.
 *
 * Rules for every kernel
 *   - it returns HM_OK or an error code, and explains an error through host->fail; it never exits or jumps;
 *   - it allocates only what it says in workspace_size(); workspace arrives 64-byte aligned;
 *   - NaN and infinity propagate as IEEE 754 has it; half types are computed in float32 and rounded once, to nearest even;
 *   - our own kernels give the same bits for any number of threads.
 *
 * May be included by kernels/ and core/.  Includes nothing of either.
 */
#ifndef HM_KERNELS_H
#define HM_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ops.h" /* generated from ops.def: enum hm_op */

/* ====== Status ====== */

/* X(name, text): every status a function of core or kernels may return. */
#define HM_STATUS_MAP(X)                                                                                               \
  X(OK, "success")                                                                                                     \
  X(ERR_ARG, "bad argument")                                                                                           \
  X(ERR_SHAPE, "shapes do not fit")                                                                                    \
  X(ERR_DTYPE, "dtypes do not fit")                                                                                    \
  X(ERR_DEVICE, "devices do not fit")                                                                                  \
  X(ERR_MEMORY, "out of memory")                                                                                       \
  X(ERR_STATE, "called in the wrong order")                                                                            \
  X(ERR_UNSUPPORTED, "not supported here")                                                                             \
  X(ERR_IO, "input or output failed")                                                                                  \
  X(ERR_FORMAT, "damaged or foreign file")                                                                             \
  X(ERR_CALLBACK, "a callback failed")                                                                                 \
  X(ERR_INTERNAL, "internal error")

typedef enum hm_status {
#define X(name, text) HM_##name,
  HM_STATUS_MAP(X)
#undef X
} hm_status;

/* ====== Dtypes ====== */

typedef enum hm_kind { HM_KIND_BOOL, HM_KIND_INT, HM_KIND_FLOAT } hm_kind;

/* X(id, long name, short name, bytes, kind).  Order is promotion order inside a kind, but for the 8-bit floats, which promote to nothing: they are
 * stored, copied, filled and converted, and no other kernel sees one.  Append-only: files store names, never ids. */
#define HM_DTYPE_MAP(X)                                                                                                \
  X(BOOL, "bool", "bool", 1, BOOL)                                                                                     \
  X(U8, "uint8", "u8", 1, INT)                                                                                         \
  X(I32, "int32", "i32", 4, INT)                                                                                       \
  X(I64, "int64", "i64", 8, INT)                                                                                       \
  X(F16, "float16", "f16", 2, FLOAT)                                                                                   \
  X(BF16, "bfloat16", "bf16", 2, FLOAT)                                                                                \
  X(F32, "float32", "f32", 4, FLOAT)                                                                                   \
  X(F64, "float64", "f64", 8, FLOAT)                                                                                   \
  X(F8_E4M3, "float8_e4m3", "f8_e4m3", 1, FLOAT)                                                                       \
  X(F8_E5M2, "float8_e5m2", "f8_e5m2", 1, FLOAT)

typedef enum hm_dtype {
  HM_NONE = -1, /* "no dtype given" */
#define X(id, name, short_name, bytes, kind) HM_##id,
  HM_DTYPE_MAP(X)
#undef X
      HM_DTYPE_COUNT
} hm_dtype;

static inline int hm_dtype_size(int dtype) {
  static const uint8_t bytes[] = {
#define X(id, name, short_name, bytes, kind) bytes,
      HM_DTYPE_MAP(X)
#undef X
  };
  return bytes[dtype];
}

static inline hm_kind hm_dtype_kind(int dtype) {
  static const uint8_t kinds[] = {
#define X(id, name, short_name, bytes, kind) HM_KIND_##kind,
      HM_DTYPE_MAP(X)
#undef X
  };
  return (hm_kind)kinds[dtype];
}

static inline bool hm_dtype_is_float(int dtype) { return hm_dtype_kind(dtype) == HM_KIND_FLOAT; }

/* The formats of one byte, which are for storing and converting only. */
static inline bool hm_dtype_is_f8(int dtype) { return dtype == HM_F8_E4M3 || dtype == HM_F8_E5M2; }

/* Long name ("float16"); "none" for HM_NONE. */
static inline const char *hm_dtype_name(int dtype) {
  static const char *const names[] = {
#define X(id, name, short_name, bytes, kind) name,
      HM_DTYPE_MAP(X)
#undef X
  };
  return dtype < 0 ? "none" : names[dtype];
}

/* Short name ("f16"), as messages and tables print it. */
static inline const char *hm_dtype_short(int dtype) {
  static const char *const names[] = {
#define X(id, name, short_name, bytes, kind) short_name,
      HM_DTYPE_MAP(X)
#undef X
  };
  return dtype < 0 ? "none" : names[dtype];
}

/* ====== What a kernel sees of a tensor ====== */

enum { HM_MAX_NDIM = 8, HM_MAX_IN = 8, HM_MAX_OUT = 4, HM_MAX_ATTR = 8 };

enum {
  HM_VIEW_ABSENT = 1, /* optional input not given; nothing else is set */
  HM_VIEW_SCALAR = 2, /* a Lua number: dtype is F64 or I64, the value lies in `scalar`, strides are 0.  "Weak": it is
                         converted once, straight into the type the kernel computes in */
  HM_VIEW_PACKED =
      4 /* data is in the backend's own layout, made by pack(); shape and strides describe the plain tensor */
};

typedef struct hm_view {
  void *data; /* first element */
  int16_t dtype;
  int16_t ndim;
  uint32_t flags;
  union {
    double f;
    int64_t i;
  } scalar;
  int64_t shape[HM_MAX_NDIM];
  int64_t stride[HM_MAX_NDIM]; /* in elements; 0 repeats */
} hm_view;

/* One attribute of an op (dim, padding, p ...), in the order of its row.  The row tells which field is set:
 *   int bool dim enum dtype -> i (dtype HM_NONE when not given);  float -> f;
 *   ints dims shape         -> n and v (n = 0: not given, which for dims means "all");
 *   rng                     -> v[0] seed, v[1] offset (filled by core; n = 2) */
typedef struct hm_attr {
  union {
    int64_t i;
    double f;
  };
  int32_t n;
  int64_t v[HM_MAX_NDIM];
} hm_attr;

/* One call of one kernel.  Core promises: all tensors on the backend's device; outputs allocated with the shapes of the op's
 * infer function and never overlapping inputs, except that an elementwise op may write exactly over an input of equal
 * shape, strides and dtype.  Elementwise: every view has the output's ndim and shape (broadcast dims have stride 0). */
typedef struct hm_kernel_call {
  int32_t op;      /* enum hm_op */
  int32_t compute; /* the dtype to compute in: F32 (for f32, f16, bf16), F64 or I64 (integers and bool) */
  int32_t n_in, n_out;
  const hm_attr *attr;
  void *workspace;
  size_t workspace_bytes;
  void *stream; /* backend's own; NULL on the CPU */
  hm_view in[HM_MAX_IN];
  hm_view out[HM_MAX_OUT];
} hm_kernel_call;

/* ====== Multi-tensor work: the scaler's and the optimizers' passes over all parameters at once ====== */

enum { HM_MAX_STATE = 4 };

/* One parameter.  All pointers are dense, in the same element order, numel elements each. */
typedef struct hm_multi_item {
  int64_t numel;
  void *param;               /* master weights (f32 or f64; a half dtype when a model has no masters) */
  void *grad;                /* gradient as backward left it */
  void *low;                 /* low-precision copy to refresh, or NULL */
  void *state[HM_MAX_STATE]; /* in the order of the rules in rules.h; NULL where unused.  f32 (f64 for f64) */
  void *lost;                /* half parameters: what rounding took from each, in param_dtype (Kahan), or NULL */
  int16_t param_dtype, grad_dtype, low_dtype, state_dtype;
  int32_t group;  /* index into hm_multi_call.group */
  bool by_chance; /* half parameters: rounded by chance, element i by word i % 4 of Philox's counter + i / 4 */
  uint64_t counter;
} hm_multi_item;

/* What pass 1 writes about one parameter.  Counts are of the values as they came (scaled). */
typedef struct hm_multi_stat {
  int64_t inf_count, nan_count; /* before unscaling, or made non-finite by unscaling */
  double sum_sq;                /* of the unscaled finite values, summed in a fixed order */
  double amax;                  /* largest finite |g|, unscaled; 0 when none */
} hm_multi_stat;

/* A histogram of unscaled finite values by the exponent of float32: [0] zeros, [1 + k] those of exponent k - 126 (k from 0 to 253),
 * [255] subnormals.  float64 values beyond these exponents count at the nearest end. */
enum { HM_HISTOGRAM = 256, HM_HISTOGRAM_ZEROS = 0, HM_HISTOGRAM_SUBNORMALS = 255 };

/* Hyperparameters of one group; rules.h says who reads which.  RMSprop: beta2 is alpha. */
typedef struct hm_multi_group {
  double lr, weight_decay;
  double momentum, dampening;
  double beta1, beta2, eps;
  double lr_decay; /* Adagrad */
  double bias_correction1,
      bias_correction2; /* Adam: 1 - beta^t, computed by core in double; Adagrad: what divides lr; else 1 */
  int64_t step;         /* updates made before this one (hm_late.done are more) */
  bool nesterov, maximize, centered;
  bool decoupled; /* AdamW, Lion; else weight decay is added to the gradient */
  bool first;     /* SGD: the momentum buffer starts as the gradient */
} hm_multi_group;

typedef enum hm_multi_op {
  HM_MULTI_CHECK,   /* pass 1: reads grads, writes stat[] */
  HM_MULTI_UNSCALE, /* grad *= inv_scale, in place, and stat[] as CHECK would */
  HM_MULTI_SCALE,   /* grad *= grad_mul (clipping by norm on gradients already unscaled) */
  HM_MULTI_CLAMP,   /* grad = grad held within [-grad_mul, grad_mul]; NaN stays */
  HM_MULTI_SGD, /* pass 2: g = grad * inv_scale * grad_mul; updates param, state, low; writes g back to grad when it differs */
  HM_MULTI_ADAM, /* the same for Adam and AdamW, and so on */
  HM_MULTI_RMSPROP,
  HM_MULTI_ADAGRAD,
  HM_MULTI_LION
} hm_multi_op;

typedef struct hm_multi_call {
  hm_multi_op op;
  int32_t n;
  const hm_multi_item *item;
  const hm_multi_group *group;
  hm_multi_stat *stat; /* n of them, for CHECK and UNSCALE */
  double inv_scale;    /* 1/scale in double; multiplied in float32 (rounded once), as PyTorch does */
  double grad_mul;     /* clipping coefficient, 1 for none */
  uint64_t seed;       /* of items that are rounded by chance */
  void *stream;
  int64_t *
      histogram; /* CHECK, UNSCALE: HM_HISTOGRAM counts for each item, on the host, written; NULL: not wanted.  late_tensor: NULL */
} hm_multi_call;

/* ====== The same without a wait: a scale that lives on the device (optional) ====== */

/* The structs below lie in device memory, 8-byte aligned; kernels write them, and core reads them when somebody asks. */

/* A scale.  Never changed once it is written: the next scale is a new cell. */
typedef struct hm_scale_cell {
  double scale;
  int64_t clean;     /* updates without overflow since the scale last moved */
  int64_t overflows; /* updates that found one, since the first cell */
} hm_scale_cell;

/* What one check found.  hm_multi_stat of each item follow it in memory. */
typedef struct hm_late_found {
  hm_multi_stat total; /* sum_sq is added in order of the items */
  double scale;        /* the gradients were made with; 1 without a cell */
  int64_t found_inf;   /* 0 or 1 */
} hm_late_found;

/* What the checks of one round found together, and what became of the scale. */
typedef struct hm_scale_event {
  hm_multi_stat total;
  double scale;                        /* of the gradients */
  double old_scale, wanted, new_scale; /* wanted: before the bounds */
  int64_t overflows;                   /* as in the new cell */
} hm_scale_event;

/* What a pass of hm_backend.late_tensor reads and writes instead of the call's own numbers. */
typedef struct hm_late {
  const hm_scale_cell *cell; /* gradients were made with; NULL: they are unscaled */
  hm_late_found *found;  /* CHECK, UNSCALE: written.  Updates: nothing is done where it says found_inf; may be NULL */
  hm_scale_event *event; /* CHECK, UNSCALE: joined, or begun with `begin`; may be NULL */
  bool begin;
  const hm_late_found *norm; /* SCALE and updates: clip to max_norm by what this check found; NULL: no clipping */
  double max_norm;
  float *norm_out;      /* CHECK, UNSCALE: the norm, infinite or NaN where gradients are; may be NULL */
  int64_t *done;        /* updates: how many each parameter had on the device, beside group.step; counted up */
  const int32_t *index; /* updates: place of each item in `done`; on the host */
} hm_late;

/* How the scale goes on: to = rule(from), clamped to [min, max]. */
typedef struct hm_scale_step {
  const hm_scale_cell *from;
  hm_scale_cell *to;
  float *to32;           /* the new scale, rounded: what losses are multiplied by */
  hm_scale_event *event; /* the round that decides, and that hears of the result; NULL: none */
  bool blank;            /* nothing was checked: *event is begun here */
  double set;            /* > 0: the scale becomes this, backed off once for each overflow beyond `heard` */
  int64_t heard;         /* -1: all of them */
  double growth, backoff;
  int64_t interval; /* clean updates until it grows; 0: never */
  double min, max;
} hm_scale_step;

typedef struct hm_fetch hm_fetch; /* a small piece of device memory on its way to the host; the backend's own */
enum { HM_FETCH_BYTES = 128 };    /* the most that one takes */

/* ====== The backend ====== */

/* X(id, name): families of ops.  `view` and `composite` ops never reach a backend. */
#define HM_FAMILY_MAP(X)                                                                                               \
  X(ELEMENTWISE, "elementwise") /* generated from the row's formula */                                                 \
  X(REDUCE, "reduce")           /* sum, mean, max, argmax ...; attr: dims, keepdim */                                  \
  X(SCAN, "scan")               /* cumsum, cumprod */                                                                  \
  X(COPY, "copy")               /* casts, strided and layout copies */                                                 \
  X(FILL, "fill")               /* constants, ranges, eye */                                                           \
  X(RANDOM, "random")           /* Philox */                                                                           \
  X(INDEX, "index")             /* gather, scatter, sort, topk */                                                      \
  X(MATMUL, "matmul")           /* matmul, linear and their gradients */                                               \
  X(CONV, "conv")               /* convolution and its gradients */                                                    \
  X(POOL, "pool")               /* pooling, interpolation */                                                           \
  X(NORM, "norm")               /* softmax, log_softmax, batch, layer and group norm */                                \
  X(ATTENTION, "attention")     /* blocked attention */                                                                \
  X(LOSS, "loss")               /* fused softmax + cross entropy */

typedef enum hm_family {
#define X(id, name) HM_FAMILY_##id,
  HM_FAMILY_MAP(X)
#undef X
      HM_FAMILY_COUNT,
  HM_FAMILY_VIEW,     /* no kernel: core changes shape and strides */
  HM_FAMILY_COMPOSITE /* no kernel: core runs other ops */
} hm_family;

typedef int (*hm_kernel_fn)(const hm_kernel_call *call);

/* A derived layout of one operand that the backend wants to keep (convolution weights in oneDNN's blocked layout).
 * Core stores it as a shadow of the operand's storage under `key`, and drops it when the operand's version moves on. */
typedef struct hm_packing {
  uint64_t key; /* names the layout; 0: the plain view is wanted, nothing to pack */
  size_t bytes;
} hm_packing;

typedef struct hm_device_info {
  char name[128];  /* processor or GPU name */
  char detail[64]; /* instruction set in use, or compute capability */
  size_t memory_bytes;
  int major, minor; /* compute capability; 0 for the CPU */
  /* of a GPU; 0 for the CPU */
  int multiprocessors, max_threads_per_block;
  size_t shared_bytes_per_block; /* the most that a launch may ask for */
  int driver, runtime;           /* versions of CUDA, 1000 * major + 10 * minor */
} hm_device_info;

/* Services of the host, handed to a backend when it is opened. */
typedef struct hm_host {
  uint32_t version;
  int (*fail)(int code, const char *message); /* keeps the message for this thread and returns code */
  const char *(*op_name)(int op);             /* of enum hm_op, for messages; static */
} hm_host;

/* ---- optional: kernels that a user wrote, compiled at run time ---- */

typedef struct hm_user_kernel hm_user_kernel; /* the backend's own */

enum { HM_MAX_USER_ARGS = 64 };
typedef enum hm_user_kind { HM_USER_POINTER, HM_USER_INT, HM_USER_FLOAT } hm_user_kind;

/* One argument of a launch.  The backend converts numbers to the types that the kernel's source declares. */
typedef struct hm_user_arg {
  hm_user_kind kind;
  int16_t dtype; /* of the elements that `data` points at; checked against the declared pointer type */
  void *data;
  int64_t i;
  double f;
  bool written; /* set by user_check: the kernel may write through the pointer (it is not declared const) */
} hm_user_arg;

/* What a backend counted since the process began. */
typedef struct hm_device_counters {
  int64_t launches;         /* kernels, matrix products included */
  int64_t synchronisations; /* times that the host waited for the device */
  int64_t copies;           /* between host and device, or on the device by the copy engine */
  int64_t bytes;            /* moved by them */
  /* convolutions and their gradients; windows of one pixel are plain products and counted nowhere */
  int64_t cudnn_convolutions;  /* done by cuDNN */
  int64_t im2col_convolutions; /* done as products of columns */
  int64_t cudnn_refusals;      /* of which cuDNN was asked for these and refused */
  /* linear with an activation, its gradients through one, and gradients of weight and bias together */
  int64_t fused_linears;   /* done in one product */
  int64_t stepped_linears; /* done as a product and another pass */
} hm_device_counters;

/* ---- optional: uploads that nobody waits for ---- */

typedef struct hm_transfer hm_transfer; /* the backend's own: copies under way, and how to know that they are done */

/* One copy from pinned host memory (host_alloc) to the device. */
typedef struct hm_piece {
  void *data;
  const void *host;
  size_t bytes;
} hm_piece;

struct hm_program; /* kernels/expression.h */

enum { HM_BACKEND_VERSION = 8 };

typedef struct hm_backend {
  uint32_t version; /* HM_BACKEND_VERSION of the header it was built with */
  uint32_t bytes;   /* sizeof(hm_backend) */
  const char *name; /* "cpu" or "cuda" */
  /* Backward of relu(max_pool2d(x)) in one pass (max_pool2d_relu_backward): less traffic and one launch fewer, but relu's result lives until
   * the pool's gradient is there, at what is often the peak of a step. */
  bool fuses_relu_backward;

  int (*device_count)(void); /* 0: none; host->fail then knows why, if a setting cannot be obeyed */
  int (*device_info)(int device, hm_device_info *out);

  /* Raw memory, 64-byte aligned.  Core's caching allocator is the only caller; NULL means out of memory, without a message. */
  void *(*mem_alloc)(int device, size_t bytes);
  void (*mem_free)(int device, void *data, size_t bytes);
  int (*mem_to_host)(void *host, const void *data, size_t bytes, void *stream);
  int (*mem_from_host)(void *data, const void *host, size_t bytes, void *stream);
  int (*synchronize)(int device);

  /* Kernels.  NULL: the family is missing; core then names the op and the device. */
  hm_kernel_fn kernel[HM_FAMILY_COUNT];
  int (*multi_tensor)(const hm_multi_call *call);

  /* (optional) May this call run?  Core asks only where a row is marked partial.  NULL means yes. */
  bool (*supports)(const hm_kernel_call *call);
  /* (optional) Scratch memory that the call needs; pointers in `call` may still be NULL, all else is final. */
  int (*workspace_size)(const hm_kernel_call *call, size_t *bytes);
  /* (optional) How many bytes linear_relu should keep for linear_backward_input_relu; 0: none.  out[0].data is NULL, all else of `call` is final. */
  int (*aux_bytes)(const hm_kernel_call *call, int64_t *bytes);
  /* (optional) Which layout operand `arg` should have; sets key 0 for the plain one. */
  int (*packing)(const hm_kernel_call *call, int arg, hm_packing *out);
  /* (optional) Makes that layout of call->in[arg] in dst (packing().bytes long). */
  int (*pack)(const hm_kernel_call *call, int arg, void *dst);

  /* (optional) Compiles a kernel of the given name from source; exact: no multiplication is contracted with an addition.  HM_ERR_ARG with the
   * compiler's messages where it does not compile. */
  int (*user_compile)(int device, const char *source, const char *name, bool exact, hm_user_kernel **out);
  /* (optional) Checks a launch's arguments against the kernel's declaration; sets arg[].written.  Launches nothing. */
  int (*user_check)(const hm_user_kernel *kernel, hm_user_arg *arg, int n);
  /* (optional) Launches it behind all work queued before; does not wait.  Arguments as user_check passed them. */
  int (*user_launch)(hm_user_kernel *kernel, const int64_t grid[3], const int64_t block[3], int64_t shared_bytes,
                     hm_user_arg *arg, int n);
  /* (optional) Gives a kernel up once the device is done with it; NULL is ignored. */
  void (*user_free)(hm_user_kernel *kernel);
  /* (optional) Reads the counters of all devices together. */
  void (*counters)(hm_device_counters *out);
  /* (optional) What does convolutions on a device, as text: "cudnn 9.19.0", "im2col + cublas (why)".  Valid until the next call. */
  const char *(*convolution)(int device);

  /* (optional, from here to transfer_ready all or none) Pinned host memory, aligned to a page; NULL means out of memory, without a message. */
  void *(*host_alloc)(int device, size_t bytes);
  /* Gives it back; no copy out of it may be under way. */
  void (*host_free)(int device, void *data, size_t bytes);
  int (*transfer_new)(int device, hm_transfer **out);
  /* Waits for its copies; NULL is ignored. */
  void (*transfer_free)(hm_transfer *transfer);
  /* Begins copies, behind all work asked for so far, and does not wait.  The transfer stands for its earlier copies, too, if they are not done.
   * Where it fails, work asked for from now on comes behind what was begun. */
  int (*transfer_start)(hm_transfer *transfer, const hm_piece *piece, int n);
  /* Work asked for from now on comes behind the copies; does not wait. */
  int (*transfer_join)(hm_transfer *transfer);
  /* Are the copies done, so that their host memory may be written again?  With `wait` they are when it returns HM_OK. */
  int (*transfer_ready)(hm_transfer *transfer, bool wait, bool *ready);

  /* (optional, from here to fetch_drop all or none) multi_tensor with `late` in place of inv_scale, grad_mul, stat and
   * bias corrections.  Waits for nothing. */
  int (*late_tensor)(const hm_multi_call *call, const hm_late *late);
  int (*late_scale)(int device, const hm_scale_step *step);
  /* Starts to bring a piece of device memory to the host, as it is behind all work asked for so far. */
  int (*fetch_begin)(int device, const void *data, size_t bytes, hm_fetch **out);
  /* Has it come?  Then it is copied to `host` and the fetch is given up.  With `wait` it has, when HM_OK is returned. */
  int (*fetch_end)(hm_fetch *fetch, void *host, bool wait, bool *done);
  void (*fetch_drop)(hm_fetch *fetch); /* gives it up, come or not; NULL is ignored */

  /* (optional) Runs a formula on the operands of an elementwise call (op -1).  Where it is missing, core prints the formula as a kernel for
   * user_compile. */
  int (*expression)(const hm_kernel_call *call, const struct hm_program *program);
} hm_backend;

/* The one symbol of a plug-in: `const hm_backend *hm_backend_open(const hm_host *host)`.  `host` must outlive it.  NULL with a message where
 * the plug-in was built against another version of this file; a machine without a device is a backend that counts none. */
#define HM_BACKEND_SYMBOL "hm_backend_open"
typedef const hm_backend *(*hm_backend_open_fn)(const hm_host *host);

/* The CPU backend; `host` must outlive it.  HALFMOON_ISA and HALFMOON_THREADS are read here, once. Never NULL. */
const hm_backend *hm_backend_cpu(const hm_host *host);

/* What the CPU backend found and chose, for `halfmoon --version` and hm.cpu.features(). */
typedef struct hm_cpu_features {
  const char *isa;                           /* "baseline", "avx2" or "avx512": what the kernels run with */
  bool avx2, f16c, avx512, avx512_bf16, amx; /* what the processor has and HALFMOON_ISA allows */
  bool native_bf16;                          /* bf16 matrix products by bfloat16 instructions */
  int threads;
  int onednn_version[3];
} hm_cpu_features;

const hm_cpu_features *hm_cpu_get_features(void);
/* Threads for kernels from now on; n >= 1. */
int hm_cpu_set_threads(int n);
/* Weight gradients that go through oneDNN give the same bits for any number of threads from now on; off by default, since it costs time. */
void hm_cpu_set_deterministic(bool on);
bool hm_cpu_is_deterministic(void);

#endif

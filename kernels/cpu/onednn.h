/*
 * onednn.h -- oneDNN primitives, made once per shape and kept.
 *
 * Private to matmul.c, conv.c and onednn.c.  A primitive (hm_prim) lives in a hash table under everything that shaped
 * it: kind, dtypes, sizes, strides, number of threads.  Its memory objects are made with it; a call sets data pointers
 * and runs.  The table owns all of them; a pointer got from hm_prim_matmul() or hm_prim_conv() is good until 1,000
 * other primitives have been asked for, so a kernel takes what it needs at its start and keeps nothing between calls.
 * One thread only: the one that runs kernels.
 *
 * A primitive whose implementation name begins with "ref" or "simple" is refused (about 1 GFLOP/s): hm_prim.primitive
 * is then NULL and the caller takes another way or reports it.
 */
#ifndef HM_CPU_ONEDNN_H
#define HM_CPU_ONEDNN_H

#include <dnnl.h>

#include "isa.h"

/* Places of operands in hm_prim_execute(). */
enum { HM_PRIM_X, HM_PRIM_Y, HM_PRIM_OUT, HM_PRIM_BIAS, HM_PRIM_ARGS };

typedef struct hm_prim {
  dnnl_primitive_t primitive; /* NULL: refused */
  char impl[48];              /* oneDNN's name of it */
  size_t scratch;             /* bytes of scratchpad that a run needs */

  /* Convolutions: the layout oneDNN chose for the weight, as a sum of offsets: element (group, out, in, place) lies at
   * group_at[group] + out_at[out] + in_at[in] + place_at[place].  dtype and key as in hm_packing. */
  uint64_t weight_key;
  size_t weight_bytes;
  int weight_dtype;
  bool weight_padded; /* has elements that no offset names; they must be zero */
  int64_t *group_at, *out_at, *in_at, *place_at;

  dnnl_memory_t memory[HM_PRIM_ARGS], scratch_memory; /* NULL where there is none */
  int arg_id[HM_PRIM_ARGS];
} hm_prim;

/* out = x * y (+ bias) (+ out).  Batch dims first, then rows and columns; strides in elements; a batch dim of 1 is
 * repeated. */
typedef struct hm_mm_desc {
  int ndim;
  int x_dtype, y_dtype, out_dtype; /* F32 or BF16 */
  int bias_dtype;                  /* HM_NONE for no bias; [columns] */
  bool accumulate;                 /* add to what out holds */
  int lane;                        /* 0; or a number that tells primitives apart which run at the same time */
  dnnl_dims_t x_shape, x_stride, y_shape, y_stride, out_shape, out_stride;
} hm_mm_desc;

typedef enum hm_conv_kind { HM_CONV_FORWARD, HM_CONV_INPUT, HM_CONV_WEIGHT } hm_conv_kind;

/* A convolution or one of its gradients; x and out (or their gradients) channels-last.  `n` images of `c` channels,
 * `o` channels out. */
typedef struct hm_conv_desc {
  int64_t kind;
  int64_t x_dtype, weight_dtype, out_dtype, bias_dtype; /* of x and out or of their gradients; bias HM_NONE for none */
  int64_t n, c, h, w;
  int64_t o, oh, ow;
  int64_t kh, kw;
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  int64_t lane; /* as in hm_mm_desc */
} hm_conv_desc;

/* Finds or makes the primitive; `op` names the caller in messages.  HM_OK also where it was refused (primitive is
 * NULL). */
int hm_prim_matmul(const char *op, const hm_mm_desc *d, hm_prim **out);
int hm_prim_conv(const char *op, const hm_conv_desc *d, hm_prim **out);

/* Runs it: data[HM_PRIM_X] and so on; scratch has at least prim->scratch bytes.
 * HM_CONV_INPUT: X is the gradient of x, OUT the gradient of out; HM_CONV_WEIGHT: Y is the gradient of the weight. */
int hm_prim_execute(const char *op, hm_prim *p, void *const data[HM_PRIM_ARGS], void *scratch);

/* Writes a plain row-major weight [groups * out, in, kH * kW] of any floating dtype into the layout of p (weight_bytes
 * at dst), and back. */
void hm_prim_pack_weight(const hm_prim *p, const hm_conv_desc *d, void *dst, const void *src, int src_dtype);
void hm_prim_unpack_weight(const hm_prim *p, const hm_conv_desc *d, void *dst, int dst_dtype, const void *src);

/* n contiguous elements from one dtype to another, by as many threads as that is worth. */
void hm_convert_many(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n);

/* A float element of any dtype as a double, and the other way. */
double hm_load_double(const void *data, int dtype, int64_t index);
void hm_store_double(void *data, int dtype, int64_t index, double value);

/* Cuts `total` items of `item_bytes` each into equal chunks of about `target` bytes, of at least `least` items.
 * Depends on nothing else.  The last chunk may overlap the one before, so that one primitive serves all. */
typedef struct hm_chunks {
  int64_t count, size;
} hm_chunks;
hm_chunks hm_chunk(int64_t total, int64_t item_bytes, int64_t target, int64_t least);
/* First item of chunk i. */
static inline int64_t hm_chunk_start(const hm_chunks *c, int64_t i, int64_t total) {
  return i * c->size + c->size <= total ? i * c->size : total - c->size;
}

/* ====== Fixed pieces: what hm.use_deterministic(true) asks for ====== */

/* oneDNN cuts a weight gradient by the number of threads, and the sums change with it.  In fixed pieces the cut depends on shapes only: each
 * piece is a primitive made for one thread, with its own memory objects (`lane`), and the threads share the pieces out. */
enum { HM_LANES = 8 };

/* Primitives made between these two are for one thread. */
void hm_prims_single_begin(void);
void hm_prims_single_end(void);

static inline size_t hm_round64(size_t n) { return (n + 63) & ~(size_t)63; }

/* Parts of a workspace, handed out in order. */
static inline size_t hm_take(size_t *top, size_t bytes) {
  const size_t at = *top;
  *top += hm_round64(bytes);
  return at;
}

/* The convolutions' share of hm_cpu_packing() and hm_cpu_pack(): theirs is all of it. */
int hm_conv_packing(const hm_kernel_call *call, int arg, hm_packing *out);
int hm_conv_pack(const hm_kernel_call *call, int arg, void *dst);

#endif

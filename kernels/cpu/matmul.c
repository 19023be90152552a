/*
 * matmul.c -- family matmul: matmul, linear and linear's gradients by input and by weight.
 *
 * All four are one thing: out[b] = x[b] * y[b] + bias, with x and y as strided matrices (linear's weight is a
 * transposed y).  A call takes one of six ways, chosen from dtypes, shapes and strides alone:
 *   F64     plain loops in double; also the reference that the others are tested against
 *   TINY    float32 loops on the stack, where a primitive would cost more than the product
 *   DIRECT  one oneDNN primitive on the operands as they lie (f32; bf16 where the processor multiplies it)
 *   CHUNKS  chunks of one product, with operands converted to float32 (or copied, where their strides suit no primitive
 *           or slow it down) and the result rounded once: along the rows of x, or along the inner dim with partial sums
 *           added in order
 *   GROUPS  the same for many small products: a chunk is a group of them
 *   FIXED   under hm.use_deterministic: rows or columns of the result in fixed pieces, each by one thread
 * Memory comes from call->workspace; hm_cpu_matmul_workspace() makes the same plan and tells its size.
 */
#include <string.h>

#include "onednn.h"

enum {
  TINY_LIMIT = 1024,     /* multiply-adds, and elements of each operand, up to which TINY is taken */
  CHUNK_BYTES = 2 << 20, /* float32 operands and result of one chunk: they stay in cache */
  CHUNK_ROWS = 128,      /* a primitive on fewer rows spends its time on y */
  CHUNK_INNER = 512,     /* a chunk of the inner dim adds to the whole result: its work must outweigh that */
  ALIAS = 512, /* lines this many float32 apart fall into the same few cache sets: oneDNN's copying halves its speed */
  ALIAS_REUSE = 64,    /* an operand used at least so often is worth a copy with other distances */
  ALIAS_MOST = 1 << 24 /* elements; a larger copy would cost too much memory */
};

typedef enum way { WAY_F64, WAY_TINY, WAY_DIRECT, WAY_CHUNKS, WAY_GROUPS, WAY_FIXED } way;

/* One matrix, or a batch of them. */
typedef struct matrix {
  char *data;
  int dtype;
  int64_t rs, cs;             /* strides of rows and columns, in elements */
  int64_t batch[HM_MAX_NDIM]; /* strides of the batch dims */
} matrix;

typedef struct product {
  const char *name;
  int64_t m, n, k;
  int batch_dims;
  int64_t batch_shape[HM_MAX_NDIM], batches;
  matrix x, y, out; /* m*k, k*n, m*n; out is dense, row-major */
  void *bias;       /* [n] or NULL */
  int bias_dtype;
  int lane; /* which primitive of several alike; 0 for the only one */
} product;

typedef struct plan {
  way way;
  bool loop;                           /* DIRECT: one primitive call per product of the batch */
  bool x_staged, y_staged, out_staged; /* copied to float32 in the workspace */
  bool by_k;                           /* CHUNKS: along the inner dim */
  hm_chunks chunks;
  hm_prim *prim, *add;                                   /* add: the same, accumulating (by_k after the first chunk) */
  size_t x_at, y_at, out_at, bias_at, scratch_at, bytes; /* offsets in the workspace */
  hm_prim
      *lane[HM_LANES]; /* FIXED: a primitive for each piece of chunks.size rows or columns, the last may be smaller */
  bool by_columns;
  size_t lane_scratch;
} plan;

/* ====== Reading the call ====== */

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Strides that say the same and that a matrix product takes: those of dims of size 1 mean nothing. */
static void tidy(matrix *a, int64_t rows, int64_t cols) {
  if (cols == 1) {
    a->cs = 1;
    if (rows == 1) a->rs = 1;
  } else if (rows == 1) {
    if (a->cs == 1) a->rs = cols;
    else a->rs = 1;
  }
}

/* May a primitive read it as it lies? */
static bool regular(const matrix *a, int64_t rows, int64_t cols) {
  return (a->cs == 1 && a->rs >= cols) || (a->rs == 1 && a->cs >= rows);
}

static matrix plain(const hm_view *v, int64_t rs, int64_t cs) {
  return (matrix){.data = v->data, .dtype = v->dtype, .rs = rs, .cs = cs};
}

/* Distance of lines of n elements in a copy of ours. */
static int64_t line_distance(int64_t n) { return n % (ALIAS / 2) ? n : n + 16; }

/* The weight [out, in]; transposed for the forward step. */
static matrix linear_weight(const hm_view *v, bool transposed) {
  const int64_t line = v->shape[1];
  return transposed ? plain(v, 1, line) : plain(v, line, 1);
}

static void read_linear(const hm_kernel_call *call, product *p) {
  const hm_view *a = &call->in[0], *b = &call->in[1];
  const int64_t last = a->shape[a->ndim - 1];
  int64_t rows = 1;
  for (int i = 0; i < a->ndim - 1; i++) rows *= a->shape[i];
  p->batches = 1;
  if (call->op == HM_OP_LINEAR) {
    p->m = rows, p->k = last, p->n = b->shape[0];
    p->x = plain(a, last, 1);
    p->y = linear_weight(b, true);
    if (!(call->in[2].flags & HM_VIEW_ABSENT)) p->bias = call->in[2].data, p->bias_dtype = call->in[2].dtype;
  } else if (call->op == HM_OP_LINEAR_BACKWARD_INPUT) {
    p->m = rows, p->k = last, p->n = b->shape[1];
    p->x = plain(a, last, 1);
    p->y = linear_weight(b, false);
  } else {
    p->m = last, p->k = rows, p->n = b->shape[b->ndim - 1];
    p->x = plain(a, 1, last);
    p->y = plain(b, p->n, 1);
  }
  p->out = plain(&call->out[0], p->n, 1);
}

/* Appends batch dim of size n, merged with the last one where all strides allow. */
static void add_batch_dim(product *p, int64_t n, int64_t xs, int64_t ys, int64_t os) {
  if (n == 1) return;
  const int d = p->batch_dims;
  if (d > 0 && p->x.batch[d - 1] == xs * n && p->y.batch[d - 1] == ys * n && p->out.batch[d - 1] == os * n) {
    p->batch_shape[d - 1] *= n;
    p->x.batch[d - 1] = xs, p->y.batch[d - 1] = ys, p->out.batch[d - 1] = os;
    return;
  }
  p->batch_shape[d] = n;
  p->x.batch[d] = xs, p->y.batch[d] = ys, p->out.batch[d] = os;
  p->batch_dims++;
}

/* Many x against one y are one tall x, where they follow each other in memory. */
static void stack_rows(product *p) {
  while (p->batch_dims > 0) {
    const int d = p->batch_dims - 1;
    matrix *x = &p->x;
    if (p->y.batch[d] != 0 || x->cs != 1) return;
    if (p->m == 1 && x->batch[d] >= p->k) x->rs = x->batch[d];
    else if (x->batch[d] != p->m * x->rs) return;
    p->m *= p->batch_shape[d];
    p->batch_dims--;
  }
}

static void read_matmul(const hm_kernel_call *call, product *p) {
  const hm_view *a = &call->in[0], *b = &call->in[1], *o = &call->out[0];
  const int nd = o->ndim;
  p->m = a->shape[nd - 2], p->k = a->shape[nd - 1], p->n = b->shape[nd - 1];
  p->x = plain(a, a->stride[nd - 2], a->stride[nd - 1]);
  p->y = plain(b, b->stride[nd - 2], b->stride[nd - 1]);
  p->out = plain(o, p->n, 1);
  tidy(&p->x, p->m, p->k);
  tidy(&p->y, p->k, p->n);
  p->batches = 1;
  int64_t os[HM_MAX_NDIM], size = p->m * p->n;
  for (int i = nd - 3; i >= 0; i--) {
    os[i] = size;
    size *= o->shape[i];
    p->batches *= o->shape[i];
  }
  if (!p->batches) return;
  for (int i = 0; i < nd - 2; i++)
    add_batch_dim(p, o->shape[i], a->shape[i] == 1 ? 0 : a->stride[i], b->shape[i] == 1 ? 0 : b->stride[i], os[i]);
  stack_rows(p);
  p->batches = 1;
  for (int i = 0; i < p->batch_dims; i++) p->batches *= p->batch_shape[i];
}

static int read_call(const hm_kernel_call *call, product *p) {
  memset(p, 0, sizeof *p);
  p->bias_dtype = HM_NONE;
  switch (call->op) {
  case HM_OP_MATMUL: p->name = "matmul"; break;
  case HM_OP_LINEAR: p->name = "linear"; break;
  case HM_OP_LINEAR_BACKWARD_INPUT: p->name = "linear_backward_input"; break;
  case HM_OP_LINEAR_BACKWARD_WEIGHT: p->name = "linear_backward_weight"; break;
  default: return hm_cpu_fail(HM_ERR_UNSUPPORTED, "matmul: op %d is none of this family", call->op);
  }
  if (call->op == HM_OP_MATMUL) {
    read_matmul(call, p);
  } else {
    read_linear(call, p);
    tidy(&p->x, p->m, p->k);
    tidy(&p->y, p->k, p->n);
  }
  const int x = p->x.dtype, y = p->y.dtype, out = p->out.dtype;
  if (hm_dtype_is_float(x) && hm_dtype_is_float(y) && hm_dtype_is_float(out) && (x == HM_F64) == (y == HM_F64))
    return HM_OK;
  return hm_cpu_fail(HM_ERR_DTYPE, "%s: no product of %s[%lld,%lld] and %s[%lld,%lld] into %s", p->name,
                     hm_dtype_short(x), (long long)p->m, (long long)p->k, hm_dtype_short(y), (long long)p->k,
                     (long long)p->n, hm_dtype_short(out));
}

/* ====== Planning ====== */

/* The primitive for a batch of products with dense or given strides.  Batch dims as in p where `batched`, else none. */
static int find_prim(const product *p, const matrix *x, const matrix *y, const matrix *out, int64_t m, int64_t k,
                     int batch_dims, const int64_t *batch_shape, bool accumulate, hm_prim **prim) {
  hm_mm_desc d;
  d.ndim = batch_dims + 2;
  d.x_dtype = x->dtype, d.y_dtype = y->dtype, d.out_dtype = out->dtype;
  d.bias_dtype = p->bias ? HM_F32 : HM_NONE;
  d.accumulate = accumulate;
  d.lane = p->lane;
  for (int i = 0; i < batch_dims; i++) {
    d.x_shape[i] = x->batch[i] ? batch_shape[i] : 1,
    d.x_stride[i] = x->batch[i] ? x->batch[i] : max64(m * x->rs, k * x->cs);
    d.y_shape[i] = y->batch[i] ? batch_shape[i] : 1,
    d.y_stride[i] = y->batch[i] ? y->batch[i] : max64(k * y->rs, p->n * y->cs);
    d.out_shape[i] = batch_shape[i], d.out_stride[i] = out->batch[i];
  }
  const int r = batch_dims, c = r + 1;
  d.x_shape[r] = m, d.x_shape[c] = k, d.x_stride[r] = x->rs, d.x_stride[c] = x->cs;
  d.y_shape[r] = k, d.y_shape[c] = p->n, d.y_stride[r] = y->rs, d.y_stride[c] = y->cs;
  d.out_shape[r] = m, d.out_shape[c] = p->n, d.out_stride[r] = out->rs, d.out_stride[c] = out->cs;
  return hm_prim_matmul(p->name, &d, prim);
}

static bool native_bf16(const product *p) {
  return p->x.dtype == HM_BF16 && p->y.dtype == HM_BF16 && (p->out.dtype == HM_F32 || p->out.dtype == HM_BF16) &&
         hm_cpu_get_features()->native_bf16;
}

static size_t bias_room(const product *p) { return p->bias && p->bias_dtype != HM_F32 ? (size_t)p->n * 4 : 0; }

/* Operands as they lie; HM_OK with l->prim NULL where oneDNN has nothing fast for them. */
static int plan_direct(const product *p, plan *l) {
  l->way = WAY_DIRECT;
  int status = find_prim(p, &p->x, &p->y, &p->out, p->m, p->k, p->batch_dims, p->batch_shape, false, &l->prim);
  if (!status && !l->prim->primitive && p->batch_dims) {
    l->loop = true;
    status = find_prim(p, &p->x, &p->y, &p->out, p->m, p->k, 0, NULL, false, &l->prim);
  }
  if (status) return status;
  if (!l->prim->primitive) l->prim = NULL;
  if (!l->prim) return HM_OK;
  l->bias_at = hm_take(&l->bytes, bias_room(p));
  l->scratch_at = hm_take(&l->bytes, l->prim->scratch);
  return HM_OK;
}

/* Column by column in memory? */
static bool by_columns(const matrix *a) { return a->cs != 1 && a->rs == 1; }

/* A float32 copy that keeps the order of `a`; its batch[0] is the size of one. */
static matrix copy_like(const matrix *a, int64_t rows, int64_t cols) {
  matrix s = {.dtype = HM_F32, .rs = 1, .cs = 1};
  if (by_columns(a)) s.cs = line_distance(rows), s.batch[0] = s.cs * cols;
  else s.rs = line_distance(cols), s.batch[0] = s.rs * rows;
  return s;
}

/* Lines of the inner dim at a distance that oneDNN is slow with. */
static bool aliased_x(const product *p) {
  return by_columns(&p->x) && p->x.cs % ALIAS == 0 && p->k >= 16 && p->n >= ALIAS_REUSE && p->k * p->m <= ALIAS_MOST;
}
static bool aliased_y(const product *p) {
  return !by_columns(&p->y) && p->n > 1 && p->y.rs % ALIAS == 0 && p->k >= 16 && p->m >= ALIAS_REUSE &&
         p->k * p->n <= ALIAS_MOST;
}

static bool wants_staging_x(const product *p) {
  return p->x.dtype != HM_F32 || !regular(&p->x, p->m, p->k) || aliased_x(p);
}
static bool wants_staging_y(const product *p) {
  return p->y.dtype != HM_F32 || !regular(&p->y, p->k, p->n) || aliased_y(p);
}

static int no_primitive(const product *p, const plan *l) {
  return hm_cpu_fail(HM_ERR_UNSUPPORTED, "%s: oneDNN has no fast float32 product of [%lld,%lld] and [%lld,%lld] (%s)",
                     p->name, (long long)p->m, (long long)p->k, (long long)p->k, (long long)p->n, l->prim->impl);
}

static int plan_chunks(const product *p, plan *l) {
  l->way = WAY_CHUNKS;
  l->x_staged = wants_staging_x(p);
  l->y_staged = wants_staging_y(p);
  l->out_staged = p->out.dtype != HM_F32;
  l->by_k = l->y_staged && p->k > 4 * max64(p->m, p->n);
  l->chunks = l->by_k ? hm_chunk(p->k, 4 * (p->m + p->n), CHUNK_BYTES, CHUNK_INNER)
                      : hm_chunk(p->m, 4 * (p->k + p->n), CHUNK_BYTES, CHUNK_ROWS);
  if (!l->by_k && !l->x_staged && !l->out_staged) l->chunks = (hm_chunks){1, p->m};
  const int64_t m = l->by_k ? p->m : l->chunks.size, k = l->by_k ? l->chunks.size : p->k;
  if (l->by_k && l->chunks.count > 1) l->x_staged = l->y_staged = true; /* the last chunk is filled up with zeros */
  const matrix x = l->x_staged ? copy_like(&p->x, m, k) : p->x, y = l->y_staged ? copy_like(&p->y, k, p->n) : p->y;
  matrix out = p->out;
  out.dtype = HM_F32;
  int status = find_prim(p, &x, &y, &out, m, k, 0, NULL, false, &l->prim);
  if (!status && l->by_k && l->chunks.count > 1) {
    product rest = *p;
    rest.bias = NULL;
    status = find_prim(&rest, &x, &y, &out, m, k, 0, NULL, true, &l->add);
  }
  if (status) return status;
  if (!l->prim->primitive || (l->add && !l->add->primitive)) return no_primitive(p, l);
  l->bias_at = hm_take(&l->bytes, bias_room(p));
  if (l->x_staged) l->x_at = hm_take(&l->bytes, (size_t)x.batch[0] * 4);
  if (l->y_staged) l->y_at = hm_take(&l->bytes, (size_t)y.batch[0] * 4);
  if (l->out_staged) l->out_at = hm_take(&l->bytes, (size_t)(m * p->n) * 4);
  l->scratch_at = hm_take(&l->bytes, l->add && l->add->scratch > l->prim->scratch ? l->add->scratch : l->prim->scratch);
  return HM_OK;
}

static int64_t one_bytes(const product *p) { return 4 * (p->m * p->k + p->k * p->n + p->m * p->n); }

static int plan_groups(const product *p, plan *l) {
  l->way = WAY_GROUPS;
  l->x_staged = l->y_staged = true;
  l->out_staged = p->out.dtype != HM_F32;
  l->chunks = hm_chunk(p->batches, one_bytes(p), CHUNK_BYTES, 1);
  const int64_t group = l->chunks.size;
  const matrix x = copy_like(&p->x, p->m, p->k), y = copy_like(&p->y, p->k, p->n);
  matrix out = p->out;
  out.dtype = HM_F32;
  out.batch[0] = p->m * p->n;
  int status = find_prim(p, &x, &y, &out, p->m, p->k, 1, &group, false, &l->prim);
  if (status) return status;
  if (!l->prim->primitive) return no_primitive(p, l);
  l->x_at = hm_take(&l->bytes, (size_t)(group * x.batch[0]) * 4);
  l->y_at = hm_take(&l->bytes, (size_t)(group * y.batch[0]) * 4);
  if (l->out_staged) l->out_at = hm_take(&l->bytes, (size_t)(group * p->m * p->n) * 4);
  l->scratch_at = hm_take(&l->bytes, l->prim->scratch);
  return HM_OK;
}

/* Rows (or columns) of a fixed piece: few enough for all lanes to have one, enough for a primitive. */
static hm_chunks fixed_pieces(int64_t total) {
  enum { LEAST = 32 };
  const int64_t size = max64((total + HM_LANES - 1) / HM_LANES, LEAST);
  return (hm_chunks){(total + size - 1) / size, size};
}

static int find_lanes(const product *p, plan *l, const matrix *x, const matrix *y, const matrix *out) {
  product q = *p;
  const int64_t total = l->by_columns ? p->n : p->m;
  int status = HM_OK;
  hm_prims_single_begin();
  for (int i = 0; i < l->chunks.count && !status; i++) {
    q.lane = i + 1;
    const int64_t size = min64(l->chunks.size, total - i * l->chunks.size);
    if (l->by_columns) q.n = size;
    status = find_prim(&q, x, y, out, l->by_columns ? p->m : size, p->k, 0, NULL, false, &l->lane[i]);
    if (!status && !l->lane[i]->primitive) {
      l->prim = l->lane[i];
      status = no_primitive(p, l);
    }
  }
  hm_prims_single_end();
  return status;
}

/* One product; bit for bit the same for any number of threads. */
static int plan_fixed(const product *p, plan *l) {
  l->way = WAY_FIXED;
  l->x_staged = p->x.dtype != HM_F32 || !regular(&p->x, p->m, p->k);
  l->y_staged = p->y.dtype != HM_F32 || !regular(&p->y, p->k, p->n);
  l->out_staged = p->out.dtype != HM_F32;
  l->by_columns = p->n > p->m;
  l->chunks = fixed_pieces(l->by_columns ? p->n : p->m);
  const matrix x = l->x_staged ? copy_like(&p->x, p->m, p->k) : p->x,
               y = l->y_staged ? copy_like(&p->y, p->k, p->n) : p->y;
  matrix out = p->out;
  out.dtype = HM_F32;
  const int status = find_lanes(p, l, &x, &y, &out);
  if (status) return status;
  l->bias_at = hm_take(&l->bytes, bias_room(p));
  if (l->x_staged) l->x_at = hm_take(&l->bytes, (size_t)x.batch[0] * 4);
  if (l->y_staged) l->y_at = hm_take(&l->bytes, (size_t)y.batch[0] * 4);
  if (l->out_staged) l->out_at = hm_take(&l->bytes, (size_t)(p->m * p->n) * 4);
  for (int i = 0; i < l->chunks.count; i++)
    l->lane_scratch = l->lane[i]->scratch > l->lane_scratch ? l->lane[i]->scratch : l->lane_scratch;
  l->lane_scratch = hm_round64(l->lane_scratch);
  l->scratch_at = hm_take(&l->bytes, l->lane_scratch * (size_t)l->chunks.count);
  return HM_OK;
}

static bool is_tiny(const product *p) {
  const int64_t limit = TINY_LIMIT;
  return p->batches == 1 && p->m <= limit && p->n <= limit && p->k <= limit && p->m * p->k <= limit &&
         p->k * p->n <= limit && p->m * p->n <= limit && p->m * p->n * p->k <= limit;
}

static bool is_empty(const product *p) { return p->m == 0 || p->n == 0 || p->batches == 0; }

/* `p` is not empty and k > 0. */
static int make_plan(const product *p, plan *l) {
  memset(l, 0, sizeof *l);
  if (p->x.dtype == HM_F64) {
    l->way = WAY_F64;
    return HM_OK;
  }
  if (is_tiny(p)) {
    l->way = WAY_TINY;
    return HM_OK;
  }
  if (hm_cpu_is_deterministic() && p->batches == 1) return plan_fixed(p, l);
  const bool f32 = p->x.dtype == HM_F32 && p->y.dtype == HM_F32 && p->out.dtype == HM_F32;
  const bool slow = f32 && p->batches == 1 && (aliased_x(p) || aliased_y(p));
  if ((f32 || native_bf16(p)) && !slow && regular(&p->x, p->m, p->k) && regular(&p->y, p->k, p->n)) {
    const int status = plan_direct(p, l);
    if (status || l->prim) return status;
    memset(l, 0, sizeof *l);
  }
  return p->batches > 1 && one_bytes(p) <= CHUNK_BYTES ? plan_groups(p, l) : plan_chunks(p, l);
}

/* ====== Staging ====== */

/* Copies n elements that lie `stride` apart to float32. */
static void gather_f32(float *dst, const char *src, int dtype, int64_t stride, int64_t n) {
  enum { PIECE = 512 };
  const int size = hm_dtype_size(dtype);
  char piece[PIECE * 8];
  for (int64_t i = 0; i < n; i += PIECE) {
    const int64_t m = min64(PIECE, n - i);
    for (int64_t j = 0; j < m; j++) memcpy(piece + j * size, src + (i + j) * stride * size, (size_t)size);
    hm_cpu_isa()->convert(dst + i, HM_F32, piece, dtype, m);
  }
}

/* rows * cols of `a`, from `data` on, to float32 as copy_like() lays it out.  `parallel`: false inside a parallel
 * region. */
static void stage(float *dst, const matrix *a, const char *data, int64_t rows, int64_t cols, bool parallel) {
  const int size = hm_dtype_size(a->dtype);
  const bool columns = by_columns(a);
  const int64_t lines = columns ? cols : rows, n = columns ? rows : cols, line = line_distance(n);
  const int64_t from = columns ? a->cs : a->rs, stride = columns ? 1 : a->cs;
  if (stride == 1 && ((from == n && line == n) || lines == 1)) {
    if (parallel) hm_convert_many(dst, HM_F32, data, a->dtype, lines * n);
    else hm_cpu_isa()->convert(dst, HM_F32, data, a->dtype, lines * n);
    return;
  }
  const int threads = parallel ? hm_cpu_threads(lines, n * (4 + size)) : 1;
#pragma omp parallel for schedule(static) if (threads > 1) num_threads(threads)
  for (int64_t i = 0; i < lines; i++) {
    const char *src = data + i * from * size;
    if (stride == 1) hm_cpu_isa()->convert(dst + i * line, HM_F32, src, a->dtype, n);
    else gather_f32(dst + i * line, src, a->dtype, stride, n);
  }
}

/* Element offset of product b in a batch. */
static int64_t batch_offset(const product *p, const matrix *a, int64_t b) {
  int64_t at = 0;
  for (int d = p->batch_dims - 1; d >= 0; d--) {
    at += b % p->batch_shape[d] * a->batch[d];
    b /= p->batch_shape[d];
  }
  return at;
}

static char *element(const matrix *a, int64_t offset) { return a->data + offset * hm_dtype_size(a->dtype); }

/* The bias as float32. */
static void *stage_bias(const product *p, const plan *l, char *ws) {
  if (!p->bias || p->bias_dtype == HM_F32) return p->bias;
  hm_cpu_isa()->convert(ws + l->bias_at, HM_F32, p->bias, p->bias_dtype, p->n);
  return ws + l->bias_at;
}

/* ====== The ways ====== */

static int run_direct(const product *p, const plan *l, char *ws) {
  void *bias = stage_bias(p, l, ws);
  const int64_t calls = l->loop ? p->batches : 1;
  int status = HM_OK;
  for (int64_t b = 0; b < calls && !status; b++) {
    void *const data[HM_PRIM_ARGS] = {element(&p->x, batch_offset(p, &p->x, b)),
                                      element(&p->y, batch_offset(p, &p->y, b)),
                                      element(&p->out, batch_offset(p, &p->out, b)), bias};
    status = hm_prim_execute(p->name, l->prim, data, ws + l->scratch_at);
  }
  return status;
}

/* One product along the rows of x: each chunk is complete. */
static int run_rows(const product *p, const plan *l, char *ws, char *x, char *y, char *out, void *bias) {
  const int64_t rows = l->chunks.size;
  if (l->y_staged) {
    stage((float *)(ws + l->y_at), &p->y, y, p->k, p->n, true);
    y = ws + l->y_at;
  }
  int status = HM_OK;
  for (int64_t i = 0; i < l->chunks.count && !status; i++) {
    const int64_t at = hm_chunk_start(&l->chunks, i, p->m);
    char *from = x + at * p->x.rs * hm_dtype_size(p->x.dtype), *to = out + at * p->n * hm_dtype_size(p->out.dtype);
    if (l->x_staged) stage((float *)(ws + l->x_at), &p->x, from, rows, p->k, true);
    void *const data[HM_PRIM_ARGS] = {l->x_staged ? ws + l->x_at : from, y, l->out_staged ? ws + l->out_at : to, bias};
    status = hm_prim_execute(p->name, l->prim, data, ws + l->scratch_at);
    if (l->out_staged && !status) hm_convert_many(to, p->out.dtype, ws + l->out_at, HM_F32, rows * p->n);
  }
  return status;
}

/* Stages n of the k lines of the inner dim (columns of x, rows of y) and fills up with zeros to `full`. */
static void stage_inner(float *dst, const matrix *a, const char *data, int64_t other, int64_t n, int64_t full,
                        bool is_x) {
  const bool columns = by_columns(a);
  if (n == full || columns == is_x) { /* whole lines */
    stage(dst, a, data, is_x ? other : n, is_x ? n : other, true);
    if (n < full) memset(dst + n * line_distance(other), 0, (size_t)((full - n) * line_distance(other)) * 4);
    return;
  }
  const int64_t from = columns ? a->cs : a->rs, stride = columns ? 1 : a->cs, line = line_distance(full);
  for (int64_t i = 0; i < other; i++) { /* the first n elements of each line */
    gather_f32(dst + i * line, data + i * from * hm_dtype_size(a->dtype), a->dtype, stride, n);
    memset(dst + i * line + n, 0, (size_t)(full - n) * 4);
  }
}

/* One product along the inner dim: partial sums, added in order. */
static int run_inner(const product *p, const plan *l, char *ws, char *x, char *y, char *out, void *bias) {
  const int64_t full = l->chunks.size;
  void *sum = l->out_staged ? ws + l->out_at : out;
  int status = HM_OK;
  for (int64_t i = 0; i < l->chunks.count && !status; i++) {
    const int64_t at = i * full, n = min64(full, p->k - at);
    char *xi = x + at * p->x.cs * hm_dtype_size(p->x.dtype), *yi = y + at * p->y.rs * hm_dtype_size(p->y.dtype);
    if (l->x_staged) stage_inner((float *)(ws + l->x_at), &p->x, xi, p->m, n, full, true);
    if (l->y_staged) stage_inner((float *)(ws + l->y_at), &p->y, yi, p->n, n, full, false);
    void *const data[HM_PRIM_ARGS] = {l->x_staged ? ws + l->x_at : xi, l->y_staged ? ws + l->y_at : yi, sum, bias};
    status = hm_prim_execute(p->name, i ? l->add : l->prim, data, ws + l->scratch_at);
  }
  if (l->out_staged && !status) hm_convert_many(out, p->out.dtype, sum, HM_F32, p->m * p->n);
  return status;
}

static int run_chunks(const product *p, const plan *l, char *ws) {
  void *bias = stage_bias(p, l, ws);
  int status = HM_OK;
  for (int64_t b = 0; b < p->batches && !status; b++) {
    char *x = element(&p->x, batch_offset(p, &p->x, b)), *y = element(&p->y, batch_offset(p, &p->y, b));
    char *out = element(&p->out, batch_offset(p, &p->out, b));
    status = l->by_k ? run_inner(p, l, ws, x, y, out, bias) : run_rows(p, l, ws, x, y, out, bias);
  }
  return status;
}

static int run_groups(const product *p, const plan *l, char *ws) {
  const int64_t group = l->chunks.size, on = p->m * p->n;
  const int64_t xn = copy_like(&p->x, p->m, p->k).batch[0], yn = copy_like(&p->y, p->k, p->n).batch[0];
  const int threads = hm_cpu_threads(group, 6 * (xn + yn));
  float *x = (float *)(ws + l->x_at), *y = (float *)(ws + l->y_at);
  int status = HM_OK;
  for (int64_t i = 0; i < l->chunks.count && !status; i++) {
    const int64_t first = hm_chunk_start(&l->chunks, i, p->batches);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < group; b++) {
      stage(x + b * xn, &p->x, element(&p->x, batch_offset(p, &p->x, first + b)), p->m, p->k, false);
      stage(y + b * yn, &p->y, element(&p->y, batch_offset(p, &p->y, first + b)), p->k, p->n, false);
    }
    char *to = element(&p->out, first * on); /* out is dense */
    void *const data[HM_PRIM_ARGS] = {x, y, l->out_staged ? ws + l->out_at : to, NULL};
    status = hm_prim_execute(p->name, l->prim, data, ws + l->scratch_at);
    if (l->out_staged && !status) hm_convert_many(to, p->out.dtype, ws + l->out_at, HM_F32, group * on);
  }
  return status;
}

/* Rows or columns of the result in fixed pieces, shared out to the threads. */
static int run_fixed(const product *p, const plan *l, char *ws) {
  matrix x = p->x, y = p->y;
  char *out = l->out_staged ? ws + l->out_at : p->out.data, *bias = stage_bias(p, l, ws);
  if (l->x_staged) {
    stage((float *)(void *)(ws + l->x_at), &p->x, x.data, p->m, p->k, true);
    x = copy_like(&p->x, p->m, p->k);
    x.data = ws + l->x_at;
  }
  if (l->y_staged) {
    stage((float *)(void *)(ws + l->y_at), &p->y, y.data, p->k, p->n, true);
    y = copy_like(&p->y, p->k, p->n);
    y.data = ws + l->y_at;
  }
  int failed = 0;
#pragma omp parallel for schedule(static, 1) num_threads(hm_cpu_get_features()->threads) reduction(| : failed)
  for (int64_t i = 0; i < l->chunks.count; i++) {
    const int64_t at = i * l->chunks.size, row = l->by_columns ? 0 : at, col = l->by_columns ? at : 0;
    void *const data[HM_PRIM_ARGS] = {x.data + row * x.rs * 4, y.data + col * y.cs * 4, out + (row * p->n + col) * 4,
                                      bias ? bias + col * 4 : NULL};
    failed |= hm_prim_execute(p->name, l->lane[i], data, ws + l->scratch_at + (size_t)i * l->lane_scratch) != HM_OK;
  }
  if (failed) return hm_cpu_fail(HM_ERR_INTERNAL, "%s: a piece of the product failed in oneDNN", p->name);
  if (l->out_staged) hm_convert_many(p->out.data, p->out.dtype, out, HM_F32, p->m * p->n);
  return HM_OK;
}

/* A small strided matrix to row-major float32. */
static const float *tiny_operand(float *room, const matrix *a, int64_t rows, int64_t cols) {
  if (a->dtype == HM_F32 && a->cs == 1 && (a->rs == cols || rows == 1)) return (const float *)(const void *)a->data;
  const int size = hm_dtype_size(a->dtype);
  char raw[TINY_LIMIT * 4];
  char *to = a->dtype == HM_F32 ? (char *)room : raw;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) {
      const char *src = a->data + (i * a->rs + j * a->cs) * size;
      if (size == 4) memcpy(to + (i * cols + j) * 4, src, 4);
      else memcpy(to + (i * cols + j) * 2, src, 2);
    }
  if (a->dtype != HM_F32) hm_cpu_isa()->convert(room, HM_F32, raw, a->dtype, rows * cols);
  return room;
}

static int run_tiny(const product *p) {
  float xs[TINY_LIMIT], ys[TINY_LIMIT], os[TINY_LIMIT], bs[TINY_LIMIT];
  const float *x = tiny_operand(xs, &p->x, p->m, p->k), *y = tiny_operand(ys, &p->y, p->k, p->n);
  float *out = p->out.dtype == HM_F32 ? (float *)(void *)p->out.data : os;
  if (p->bias) hm_cpu_isa()->convert(bs, HM_F32, p->bias, p->bias_dtype, p->n);
  for (int64_t i = 0; i < p->m; i++) {
    float *restrict row = out + i * p->n;
    for (int64_t j = 0; j < p->n; j++) row[j] = 0.0f;
    for (int64_t k = 0; k < p->k; k++) {
      const float a = x[i * p->k + k];
      for (int64_t j = 0; j < p->n; j++) row[j] += a * y[k * p->n + j];
    }
    if (p->bias)
      for (int64_t j = 0; j < p->n; j++) row[j] += bs[j];
  }
  if (out == os) hm_cpu_isa()->convert(p->out.data, p->out.dtype, os, HM_F32, p->m * p->n);
  return HM_OK;
}

/* Columns [from, to) of one row of out, in double. */
static void f64_row(const product *p, const double *x, const double *y, int64_t out_at, int64_t from, int64_t to) {
  enum { WIDTH = 64 };
  double sum[WIDTH];
  const int64_t n = to - from;
  for (int64_t j = 0; j < n; j++) sum[j] = 0.0;
  for (int64_t k = 0; k < p->k; k++) {
    const double a = x[k * p->x.cs];
    const double *row = y + k * p->y.rs + from * p->y.cs;
    if (p->y.cs == 1)
      for (int64_t j = 0; j < n; j++) sum[j] += a * row[j];
    else
      for (int64_t j = 0; j < n; j++) sum[j] += a * row[j * p->y.cs];
  }
  if (p->bias)
    for (int64_t j = 0; j < n; j++) sum[j] += hm_load_double(p->bias, p->bias_dtype, from + j);
  hm_cpu_isa()->convert(p->out.data + (out_at + from) * hm_dtype_size(p->out.dtype), p->out.dtype, sum, HM_F64, n);
}

static int run_f64(const product *p) {
  const int64_t rows = p->batches * p->m;
#pragma omp parallel for schedule(static) num_threads(hm_cpu_threads(rows, p->n * p->k * 2))
  for (int64_t r = 0; r < rows; r++) {
    const int64_t b = r / p->m, i = r % p->m;
    const double *x = (const double *)(const void *)element(&p->x, batch_offset(p, &p->x, b) + i * p->x.rs);
    const double *y = (const double *)(const void *)element(&p->y, batch_offset(p, &p->y, b));
    for (int64_t j = 0; j < p->n; j += 64) f64_row(p, x, y, r * p->n, j, min64(j + 64, p->n));
  }
  return HM_OK;
}

/* An empty inner dim: zeros, or the bias. */
static int run_no_inner(const product *p) {
  const int64_t rows = p->batches * p->m;
  const int size = hm_dtype_size(p->out.dtype);
  if (!p->bias) memset(p->out.data, 0, (size_t)(rows * p->n * size));
  for (int64_t r = 0; p->bias && r < rows; r++)
    hm_cpu_isa()->convert(p->out.data + r * p->n * size, p->out.dtype, p->bias, p->bias_dtype, p->n);
  return HM_OK;
}

/* ====== Entries ====== */

int hm_cpu_matmul_workspace(const hm_kernel_call *call, size_t *bytes) {
  product p;
  plan l;
  *bytes = 0;
  int status = read_call(call, &p);
  if (status || is_empty(&p) || p.k == 0) return status;
  const bool single = hm_cpu_is_deterministic() && p.batches > 1; /* primitives for one thread */
  if (single) hm_prims_single_begin();
  status = make_plan(&p, &l);
  if (single) hm_prims_single_end();
  *bytes = l.bytes;
  return status;
}

static int run(const product *p, const plan *l, char *ws) {
  switch (l->way) {
  case WAY_F64: return run_f64(p);
  case WAY_TINY: return run_tiny(p);
  case WAY_DIRECT: return run_direct(p, l, ws);
  case WAY_CHUNKS: return run_chunks(p, l, ws);
  case WAY_GROUPS: return run_groups(p, l, ws);
  case WAY_FIXED: return run_fixed(p, l, ws);
  }
  return hm_cpu_fail(HM_ERR_INTERNAL, "%s: no way chosen", p->name);
}

static int plan_and_run(const product *p, const hm_kernel_call *call) {
  plan l;
  const int status = make_plan(p, &l);
  if (status) return status;
  if (l.bytes > call->workspace_bytes)
    return hm_cpu_fail(HM_ERR_INTERNAL, "%s: needs %zu bytes of workspace, has %zu", p->name, l.bytes,
                       call->workspace_bytes);
  return run(p, &l, call->workspace);
}

int hm_cpu_matmul(const hm_kernel_call *call) {
  product p;
  int status = read_call(call, &p);
  if (status || is_empty(&p)) return status;
  if (p.k == 0) return run_no_inner(&p);
  const bool single = hm_cpu_is_deterministic() && p.batches > 1;
  if (single) hm_prims_single_begin();
  status = plan_and_run(&p, call);
  if (single) hm_prims_single_end();
  return status;
}

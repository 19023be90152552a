/*
 * conv.cu -- family conv: conv2d and its gradients by input and by weight, by cuDNN or as matrix products.
 *
 * Where cuDNN is found (cudnn.cu) it does what it can.  It takes operands and a result of one dtype alone: mixed ones go through float32, and a
 * float32 gradient of half operands does too, on the tensor cores, as a half value is a TF32 value.  Left to products are float64, windows of one
 * pixel (which are products as they stand), that gradient on a device without TF32, and what cuDNN refuses.  hm_cuda_conv_counters() tells who did
 * how many.
 *
 * As products: activations are channels-last, so each window of an image is a line of kh * kw stretches of channels (im2col), and an output is a
 * plain matrix [places, O].  Weights are read in the matching order [O, kH, kW, C / groups], which core keeps as a packed copy (cuDNN reads the
 * same).  With P places and K = kh * kw * C / groups:
 *     conv2d             out[P, O]  = col[P, K]  * weight[O, K]' + bias
 *     backward_input     col[P, K]  = g[P, O]    * weight[O, K],   then each pixel gathers its share (col2im)
 *     backward_weight    dw[O, K]   = g[P, O]'   * col[P, K]
 * Groups are the batch of the product.  A 1 x 1 window of stride 1 needs no columns: the image is the matrix.
 *
 * Columns, and float32 copies for cuDNN, are made for a chunk of images at a time; how many depends on the shape alone.  Weight gradients of the
 * chunks are added in order, in float32 (float64 for float64); columns of an input gradient are float32, so that a half result is rounded once.
 * Memory comes from call->workspace; hm_cuda_conv_workspace() makes the same plan and tells its size.
 */
#include "backend.h"

/* Columns of one chunk, at most, unless a single image has more.  (Tests build with a small one.) */
#ifndef HM_CUDA_COLUMN_BYTES
#define HM_CUDA_COLUMN_BYTES ((int64_t)64 << 20)
#endif

/* One call.  x and out are the activations or the gradients by them, whichever way data flows. */
typedef struct conv {
  const char *name;
  hm_cuda_conv_kind kind;
  hm_view x, weight, out, bias; /* bias.ndim 0: none */
  hm_im2col g;                  /* geometry; n is all images */
  int64_t o, places, k;         /* output channels, places of one image, length of a window */
} conv;

/* Room in the workspace: bytes 0 is none. */
typedef struct room {
  size_t at, bytes;
} room;

typedef struct plan {
  int in, wide;         /* dtype of the products' operands, and of sums: float32 or float64 */
  int col_dtype, to;    /* dtype of the columns, and of what the products write */
  bool direct;          /* no columns */
  bool cudnn, refused;  /* cuDNN does it; it was asked and does not */
  int64_t chunk, count; /* images of a chunk; chunks */
  room col, x, out, weight, bias, sum, library;
  hm_cuda_conv_shape shape, tail; /* for cuDNN: a chunk, and the last one if it is smaller */
  size_t bytes;
} plan;

/* ====== Reading the call ====== */

static int read_operands(const hm_kernel_call *call, conv *c) {
  const hm_view *a = &call->in[0], *b = &call->in[1], *o = &call->out[0];
  switch (call->op) {
  case HM_OP_CONV2D:
    c->kind = HM_CUDA_CONV_FORWARD, c->x = *a, c->weight = *b, c->out = *o;
    if (!(call->in[2].flags & HM_VIEW_ABSENT)) c->bias = call->in[2];
    break;
  case HM_OP_CONV2D_BACKWARD_INPUT: c->kind = HM_CUDA_CONV_INPUT, c->x = *o, c->weight = *b, c->out = *a; break;
  case HM_OP_CONV2D_BACKWARD_WEIGHT: c->kind = HM_CUDA_CONV_WEIGHT, c->x = *b, c->weight = *o, c->out = *a; break;
  default: return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: none of this family", c->name);
  }
  return HM_OK;
}

static void read_geometry(const hm_attr *attr, conv *c) {
  hm_im2col *g = &c->g;
  const int64_t *x = c->x.shape, *w = c->weight.shape, *out = c->out.shape;
  const int s = attr[0].n > 1, p = attr[1].n > 1, d = attr[2].n > 1;
  g->n = x[0], g->c = x[1], g->h = x[2], g->w = x[3], g->oh = out[2], g->ow = out[3], g->kh = w[2], g->kw = w[3];
  g->sh = attr[0].v[0], g->sw = attr[0].v[s], g->ph = attr[1].v[0], g->pw = attr[1].v[p], g->dh = attr[2].v[0],
  g->dw = attr[2].v[d];
  g->groups = attr[3].i;
  g->xs[0] = g->h * g->w * g->c, g->xs[1] = 1, g->xs[2] = g->w * g->c, g->xs[3] = g->c;
  c->o = out[1];
  c->places = g->oh * g->ow;
}

static int read_call(const hm_kernel_call *call, conv *c) {
  memset(c, 0, sizeof *c);
  c->name = hm_cuda_op_name(call->op);
  const int status = read_operands(call, c);
  if (status) return status;
  read_geometry(call->op == HM_OP_CONV2D ? call->attr : call->attr + 1, c);
  const int first = call->in[0].dtype, second = call->in[1].dtype, to = call->out[0].dtype;
  if (!hm_dtype_is_float(first) || !hm_dtype_is_float(second) || !hm_dtype_is_float(to) ||
      (first == HM_F64) != (second == HM_F64))
    return hm_cuda_fail(HM_ERR_DTYPE, "%s: no convolution of %s and %s into %s", c->name, hm_dtype_short(first),
                        hm_dtype_short(second), hm_dtype_short(to));
  if (c->g.groups < 1 || c->g.c % c->g.groups || c->o % c->g.groups)
    return hm_cuda_fail(HM_ERR_SHAPE, "%s: %lld groups do not divide %lld and %lld channels", c->name,
                        (long long)c->g.groups, (long long)c->g.c, (long long)c->o);
  c->k = c->g.kh * c->g.kw * (c->g.c / c->g.groups);
  return HM_OK;
}

/* Some size is 0: the result has no terms, or no elements. */
static bool is_empty(const conv *c) { return c->g.n * c->g.xs[0] == 0 || c->o * c->places == 0 || c->k == 0; }

/* Is the weight's order in memory another than [O, kH, kW, C / groups]? */
static bool wants_reorder(const hm_view *weight) {
  return weight->shape[2] * weight->shape[3] != 1 && weight->shape[1] != 1;
}

/* ====== Planning ====== */

static room take(plan *l, bool wanted, int64_t elements, int dtype) {
  room r = {0, 0};
  if (!wanted) return r;
  r.bytes = (size_t)(elements * hm_dtype_size(dtype));
  r.at = hm_cuda_take(&l->bytes, r.bytes);
  return r;
}

static void cut_images(const conv *c, plan *l) {
  const int64_t image = l->direct ? 1 : c->places * c->g.groups * c->g.ld * hm_dtype_size(l->col_dtype);
  const int64_t most = l->direct || image <= 0 ? c->g.n : HM_CUDA_COLUMN_BYTES / image;
  const int64_t per = most < 1 ? 1 : (most > c->g.n ? c->g.n : most);
  l->count = (c->g.n + per - 1) / per;
  l->chunk = (c->g.n + l->count - 1) / l->count;
}

/* May a weight gradient be written as it comes out of the products? */
static bool weight_at_once(const conv *c, const plan *l) {
  return hm_cuda_gemm_takes(l->in, l->in, c->weight.dtype) && !wants_reorder(&c->weight) &&
         (l->count == 1 || c->weight.dtype == l->wide);
}

/* What the products write: the result where cuBLAS can, else a float32 copy of it. */
static void choose_result(const conv *c, plan *l) {
  if (c->kind == HM_CUDA_CONV_WEIGHT) {
    l->to = weight_at_once(c, l) ? c->weight.dtype : l->wide;
    return;
  }
  const int result = c->kind == HM_CUDA_CONV_FORWARD ? c->out.dtype : c->x.dtype;
  const bool odd_bias = c->bias.ndim && c->bias.dtype != result;
  l->to = hm_cuda_gemm_takes(l->in, l->in, result) && !odd_bias ? result : l->wide;
  if (c->kind == HM_CUDA_CONV_INPUT && !l->direct) l->to = l->wide; /* the columns */
}

/* A call in cuDNN's terms; false where products serve better: float64, and float32 sums of half operands on a device that has no TF32. */
static bool describe(const conv *c, const hm_cuda_device *d, hm_cuda_conv_shape *s) {
  const hm_im2col *g = &c->g;
  const int x = c->x.dtype, w = c->weight.dtype, o = c->out.dtype;
  const int a = c->kind == HM_CUDA_CONV_INPUT ? w : x, b = c->kind == HM_CUDA_CONV_FORWARD ? w : o;
  if (x == HM_F64 || w == HM_F64 || o == HM_F64) return false;
  memset(s, 0, sizeof *s);
  s->kind = c->kind;
  s->dtype = x == w && w == o && (!c->bias.ndim || c->bias.dtype == o) ? x : HM_F32;
  const bool halves = a == b && a != HM_F32; /* their values are TF32 values */
  if (s->dtype == HM_F32 && halves && d->major < 8) return false;
  s->tf32 = s->dtype == HM_F32 && (halves || hm_cuda_tf32());
  s->n = g->n, s->c = g->c, s->h = g->h, s->w = g->w, s->o = c->o, s->oh = g->oh, s->ow = g->ow;
  s->kh = g->kh, s->kw = g->kw, s->sh = g->sh, s->sw = g->sw, s->ph = g->ph, s->pw = g->pw, s->dh = g->dh,
  s->dw = g->dw, s->groups = g->groups;
  return true;
}

/* Images of which cuDNN gets float32 copies are cut into chunks, so that these stay small; else all go at once. */
static void cut_for_cudnn(const conv *c, plan *l) {
  const int64_t x = c->x.dtype != l->in ? c->g.xs[0] : 0, out = c->out.dtype != l->in ? c->places * c->o : 0;
  const int64_t image = (x + out) * hm_dtype_size(l->in), most = image ? HM_CUDA_COLUMN_BYTES / image : c->g.n;
  const int64_t per = most < 1 ? 1 : (most > c->g.n ? c->g.n : most);
  l->count = (c->g.n + per - 1) / per;
  l->chunk = (c->g.n + l->count - 1) / l->count;
  l->shape.n = l->chunk;
  l->tail = l->shape;
  l->tail.n = c->g.n - (c->g.n - 1) / l->chunk * l->chunk;
}

/* Lets cuDNN have the call if it takes it: its dtypes and chunks are then set. */
static int ask_cudnn(const hm_kernel_call *call, const conv *c, plan *l, size_t *bytes) {
  hm_cuda_cudnn_answer answer;
  size_t last = 0;
  *bytes = 0;
  if (l->direct) return HM_OK;
  hm_cuda_device *d = hm_cuda_device_of(call->out[0].data, c->name);
  if (!d) return HM_ERR_DEVICE;
  if (!describe(c, d, &l->shape)) return HM_OK;
  l->in = l->to = l->col_dtype = l->shape.dtype;
  l->wide = HM_F32;
  cut_for_cudnn(c, l);
  int status = hm_cuda_cudnn_ask(d, &l->shape, &answer, bytes);
  if (!status && answer == HM_CUDA_CUDNN_YES && l->tail.n != l->chunk)
    status = hm_cuda_cudnn_ask(d, &l->tail, &answer, &last);
  l->cudnn = answer == HM_CUDA_CUDNN_YES;
  l->refused = answer == HM_CUDA_CUDNN_NO;
  *bytes = l->cudnn ? (last > *bytes ? last : *bytes) : 0;
  return status;
}

/* dtypes and chunks of products.  Sets c->g.ld, too. */
static void plan_products(conv *c, plan *l) {
  const int a = c->kind == HM_CUDA_CONV_INPUT ? c->weight.dtype : c->x.dtype,
            b = c->kind == HM_CUDA_CONV_FORWARD ? c->weight.dtype : c->out.dtype;
  l->in = a == b ? a : HM_F32;
  l->wide = l->in == HM_F64 ? HM_F64 : HM_F32;
  l->col_dtype = c->kind == HM_CUDA_CONV_INPUT ? l->wide : l->in;
  const int64_t unit = 16 / hm_dtype_size(l->col_dtype); /* lines begin at multiples of 16 bytes */
  c->g.ld = (c->k + unit - 1) / unit * unit;
  cut_images(c, l);
  choose_result(c, l);
}

/* `c` is not empty. */
static int make_plan(const hm_kernel_call *call, conv *c, plan *l) {
  const hm_im2col *g = &c->g;
  size_t library;
  memset(l, 0, sizeof *l);
  l->direct = g->kh * g->kw == 1 && g->sh == 1 && g->sw == 1 && g->ph == 0 && g->pw == 0;
  const int status = ask_cudnn(call, c, l, &library);
  if (status) return status;
  if (!l->cudnn) plan_products(c, l);
  const int64_t x = l->chunk * g->xs[0], out = l->chunk * c->places * c->o, weight = c->o * c->k;
  l->col = take(l, !l->direct && !l->cudnn, l->chunk * c->places * g->groups * c->g.ld, l->col_dtype);
  if (c->kind == HM_CUDA_CONV_INPUT) l->x = take(l, (l->direct || l->cudnn) && l->to != c->x.dtype, x, l->to);
  else l->x = take(l, c->x.dtype != l->in, x, l->in);
  if (c->kind == HM_CUDA_CONV_FORWARD) l->out = take(l, l->to != c->out.dtype, out, l->to);
  else l->out = take(l, c->out.dtype != l->in, out, l->in);
  const bool plain = !(c->weight.flags & HM_VIEW_PACKED) && wants_reorder(&c->weight);
  l->weight = take(l, c->kind != HM_CUDA_CONV_WEIGHT && (plain || c->weight.dtype != l->in), weight, l->in);
  l->bias = take(l, c->bias.ndim && c->bias.dtype != l->to, c->o, l->to);
  l->sum = take(l, c->kind == HM_CUDA_CONV_WEIGHT && !weight_at_once(c, l), weight, l->to);
  l->library = take(l, library > 0, (int64_t)library, HM_U8);
  return HM_OK;
}

/* ====== Copies ====== */

/* n elements that lie side by side, converted. */
static int convert(void *to, int to_dtype, void *from, int dtype, int64_t n) {
  const hm_view src = hm_cuda_dense(from, dtype, 1, &n), dst = hm_cuda_dense(to, to_dtype, 1, &n);
  return hm_cuda_copy_view(&src, &dst);
}

/* A view of a weight [O, C, kH, kW] with its dims in the order [O, kH, kW, C]. */
static hm_view window_order(const hm_view *weight) {
  static const int8_t order[4] = {0, 2, 3, 1};
  hm_view v = *weight;
  v.flags = 0;
  for (int d = 0; d < 4; d++) v.shape[d] = weight->shape[order[d]], v.stride[d] = weight->stride[order[d]];
  return v;
}

/* The weight as [O, K] in the products' dtype. */
static int ready_weight(const conv *c, const plan *l, char *ws, void **out) {
  *out = c->weight.data;
  if (!l->weight.bytes) return HM_OK;
  *out = ws + l->weight.at;
  if (c->weight.flags & HM_VIEW_PACKED) return convert(*out, l->in, c->weight.data, c->weight.dtype, c->o * c->k);
  const hm_view from = window_order(&c->weight), to = hm_cuda_dense(*out, l->in, 4, from.shape);
  return hm_cuda_copy_view(&from, &to);
}

/* Images from `first` on: where they lie, or a converted copy. */
static int ready_images(const hm_view *v, const room *r, int dtype, int64_t image, int64_t first, int64_t n, char *ws,
                        void **out) {
  *out = hm_cuda_at(v->data, first * image, v->dtype);
  if (!r->bytes) return HM_OK;
  void *from = *out;
  *out = ws + r->at;
  return convert(*out, dtype, from, v->dtype, n * image);
}

/* The images, or the windows of them, as the matrix of a product. */
static hm_cuda_matrix columns(const conv *c, const plan *l, int64_t n, void *images, void *col) {
  if (l->direct) return {images, c->kind == HM_CUDA_CONV_INPUT ? l->to : l->in, c->g.c, 1, c->g.c / c->g.groups};
  return {col, l->col_dtype, c->g.ld, 1, n * c->places * c->g.ld};
}

static hm_cuda_matrix outputs(const conv *c, void *data, int dtype) {
  return {data, dtype, c->o, 1, c->o / c->g.groups};
}

static hm_cuda_product product(const conv *c, int64_t m, int64_t n, int64_t k) {
  hm_cuda_product p;
  memset(&p, 0, sizeof p);
  p.name = c->name;
  p.m = m, p.n = n, p.k = k, p.batches = c->g.groups;
  return p;
}

static int make_columns(const conv *c, const plan *l, int64_t n, const void *x, void *col, void *stream) {
  if (l->direct) return HM_OK;
  hm_im2col g = c->g;
  g.n = n;
  return hm_cuda_im2col(&g, x, col, l->in, stream);
}

/* ====== The three directions, for n images from `first` on ====== */

/* Lets a product of several groups add to the bias. */
static int lay_bias(const conv *c, void *bias, void *out, int dtype, int64_t places) {
  const int64_t shape[2] = {places, c->o};
  hm_view from = hm_cuda_dense(bias, dtype, 2, shape);
  const hm_view to = hm_cuda_dense(out, dtype, 2, shape);
  from.stride[0] = 0;
  return hm_cuda_copy_view(&from, &to);
}

static int run_forward(const conv *c, const plan *l, char *ws, void *weight, int64_t first, int64_t n, void *stream) {
  const int64_t places = n * c->places, og = c->o / c->g.groups;
  void *x, *result = hm_cuda_at(c->out.data, first * c->places * c->o, c->out.dtype);
  void *to = l->out.bytes ? ws + l->out.at : result, *col = ws + l->col.at;
  int status = ready_images(&c->x, &l->x, l->in, c->g.xs[0], first, n, ws, &x);
  if (!status) status = make_columns(c, l, n, x, col, stream);
  if (status) return status;
  hm_cuda_product p = product(c, places, og, c->k);
  p.x = columns(c, l, n, x, col);
  p.y = {weight, l->in, 1, c->k, og * c->k};
  p.out = outputs(c, to, l->to);
  if (c->bias.ndim) {
    void *bias = l->bias.bytes ? (void *)(ws + l->bias.at) : c->bias.data;
    if (c->g.groups == 1) p.bias = bias;
    else status = lay_bias(c, bias, to, l->to, places);
    p.accumulate = c->g.groups > 1;
  }
  if (!status) status = hm_cuda_gemm(&p);
  return status || to == result ? status : convert(result, c->out.dtype, to, l->to, places * c->o);
}

static int run_input(const conv *c, const plan *l, char *ws, void *weight, int64_t first, int64_t n, void *stream) {
  const int64_t og = c->o / c->g.groups;
  void *out, *result = hm_cuda_at(c->x.data, first * c->g.xs[0], c->x.dtype);
  void *to = l->x.bytes ? ws + l->x.at : result, *col = ws + l->col.at;
  int status = ready_images(&c->out, &l->out, l->in, c->places * c->o, first, n, ws, &out);
  if (status) return status;
  hm_cuda_product p = product(c, n * c->places, c->k, og);
  p.x = outputs(c, out, l->in);
  p.y = {weight, l->in, c->k, 1, og * c->k};
  p.out = columns(c, l, n, to, col);
  status = hm_cuda_gemm(&p);
  if (status || (l->direct && to == result)) return status;
  if (l->direct) return convert(result, c->x.dtype, to, l->to, n * c->g.xs[0]);
  hm_im2col g = c->g;
  g.n = n;
  return hm_cuda_col2im(&g, col, l->col_dtype, result, c->x.dtype, stream);
}

static int run_weight(const conv *c, const plan *l, char *ws, void *sum, int64_t first, int64_t n, void *stream) {
  const int64_t og = c->o / c->g.groups;
  void *x, *out, *col = ws + l->col.at;
  int status = ready_images(&c->x, &l->x, l->in, c->g.xs[0], first, n, ws, &x);
  if (!status) status = ready_images(&c->out, &l->out, l->in, c->places * c->o, first, n, ws, &out);
  if (!status) status = make_columns(c, l, n, x, col, stream);
  if (status) return status;
  hm_cuda_product p = product(c, og, c->k, n * c->places);
  p.x = {out, l->in, 1, c->o, og};
  p.y = columns(c, l, n, x, col);
  p.out = {sum, l->to, c->k, 1, og * c->k};
  p.accumulate = first > 0;
  return hm_cuda_gemm(&p);
}

/* ====== The same by cuDNN ====== */

/* Operands of n images from `first` on, where they lie or converted, and where the result is written. */
static int ready_call(const conv *c, const plan *l, char *ws, int64_t first, int64_t n, hm_cuda_cudnn_call *k) {
  const int64_t x = c->g.xs[0], out = c->places * c->o;
  int status = HM_OK;
  memset(k, 0, sizeof *k);
  k->name = c->name;
  k->workspace = l->library.bytes ? ws + l->library.at : NULL;
  k->x = l->x.bytes ? ws + l->x.at : hm_cuda_at(c->x.data, first * x, c->x.dtype);
  k->out = l->out.bytes ? ws + l->out.at : hm_cuda_at(c->out.data, first * out, c->out.dtype);
  if (c->kind != HM_CUDA_CONV_INPUT) status = ready_images(&c->x, &l->x, l->in, x, first, n, ws, &k->x);
  if (c->kind != HM_CUDA_CONV_FORWARD && !status)
    status = ready_images(&c->out, &l->out, l->in, out, first, n, ws, &k->out);
  return status;
}

/* Brings a result of n images from `first` on where it belongs. */
static int give_images(const conv *c, const plan *l, int64_t first, int64_t n, const hm_cuda_cudnn_call *k) {
  const int64_t x = c->g.xs[0], out = c->places * c->o;
  if (c->kind == HM_CUDA_CONV_FORWARD && l->out.bytes)
    return convert(hm_cuda_at(c->out.data, first * out, c->out.dtype), c->out.dtype, k->out, l->to, n * out);
  if (c->kind == HM_CUDA_CONV_INPUT && l->x.bytes)
    return convert(hm_cuda_at(c->x.data, first * x, c->x.dtype), c->x.dtype, k->x, l->to, n * x);
  return HM_OK;
}

/* *done false: it was refused at the last moment, and products have to do all of it. */
static int run_cudnn(const conv *c, const plan *l, char *ws, void *weight, int64_t first, int64_t n, bool *done) {
  const hm_cuda_conv_shape *shape = n == l->chunk ? &l->shape : &l->tail;
  hm_cuda_cudnn_call k;
  hm_cuda_cudnn_answer answer = HM_CUDA_CUDNN_NO;
  void *bias = l->bias.bytes ? (void *)(ws + l->bias.at) : c->bias.data;
  int status = ready_call(c, l, ws, first, n, &k);
  k.weight = weight;
  k.bias = c->bias.ndim ? bias : NULL;
  k.add = c->kind == HM_CUDA_CONV_WEIGHT && first > 0;
  if (!status) status = hm_cuda_cudnn_run(hm_cuda_current(), shape, &k, &answer);
  if (!status && answer == HM_CUDA_CUDNN_LAY_BIAS) {
    k.bias = NULL;
    k.add = true;
    status = lay_bias(c, bias, k.out, l->to, n * c->places);
    if (!status) status = hm_cuda_cudnn_run(hm_cuda_current(), shape, &k, &answer);
  }
  *done = answer == HM_CUDA_CUDNN_YES;
  return status || !*done ? status : give_images(c, l, first, n, &k);
}

/* The sum of all chunks, in the weight's own order. */
static int give_weight(const conv *c, const plan *l, void *sum) {
  if (!l->sum.bytes) return HM_OK;
  const hm_view to = window_order(&c->weight), from = hm_cuda_dense(sum, l->to, 4, to.shape);
  return hm_cuda_copy_view(&from, &to);
}

/* Sums without terms: zeros, or the bias in each place. */
static int run_empty(const conv *c, const hm_kernel_call *call) {
  const hm_view *out = &call->out[0];
  if (!c->bias.ndim) return hm_cuda_zero(out->data, (size_t)(hm_cuda_numel(out) * hm_dtype_size(out->dtype)), c->name);
  hm_view bias = *out;
  bias.data = c->bias.data;
  bias.dtype = c->bias.dtype;
  for (int d = 0; d < 4; d++) bias.stride[d] = d == 1 ? 1 : 0;
  return hm_cuda_copy_view(&bias, out);
}

/* ====== Entries ====== */

static struct { int64_t cudnn, im2col, refused; } counted;

void hm_cuda_conv_counters(hm_device_counters *out) {
  out->cudnn_convolutions = counted.cudnn;
  out->im2col_convolutions = counted.im2col;
  out->cudnn_refusals = counted.refused;
}

int hm_cuda_conv_workspace(const hm_kernel_call *call, size_t *bytes) {
  conv c;
  plan l;
  *bytes = 0;
  int status = read_call(call, &c);
  if (status || is_empty(&c)) return status;
  status = make_plan(call, &c, &l);
  *bytes = l.bytes;
  return status;
}

/* *done false: see run_cudnn. */
static int run_chunks(const conv *c, const plan *l, char *ws, void *weight, void *stream, bool *done) {
  int status = HM_OK;
  *done = true;
  for (int64_t first = 0; first < c->g.n && !status && *done; first += l->chunk) {
    const int64_t n = c->g.n - first < l->chunk ? c->g.n - first : l->chunk;
    if (l->cudnn) status = run_cudnn(c, l, ws, weight, first, n, done);
    else if (c->kind == HM_CUDA_CONV_FORWARD) status = run_forward(c, l, ws, weight, first, n, stream);
    else if (c->kind == HM_CUDA_CONV_INPUT) status = run_input(c, l, ws, weight, first, n, stream);
    else status = run_weight(c, l, ws, weight, first, n, stream);
  }
  return status;
}

static int run_plan(const hm_kernel_call *call, const conv *c, const plan *l, char *ws, bool *done) {
  int status = HM_OK;
  void *weight = l->sum.bytes ? (void *)(ws + l->sum.at) : c->weight.data;
  *done = false;
  if (c->kind != HM_CUDA_CONV_WEIGHT) status = ready_weight(c, l, ws, &weight);
  if (!status && l->bias.bytes) status = convert(ws + l->bias.at, l->to, c->bias.data, c->bias.dtype, c->o);
  if (!status) status = run_chunks(c, l, ws, weight, call->stream, done);
  return status || !*done || c->kind != HM_CUDA_CONV_WEIGHT ? status : give_weight(c, l, weight);
}

static void count(const plan *l) {
  if (l->cudnn) counted.cudnn++;
  else if (!l->direct) counted.im2col++;
  if (l->refused) counted.refused++;
}

/* cuDNN refused what it had agreed to.  Products do it now, with a workspace of their own this once; later calls plan with them. */
static int run_refused(const hm_kernel_call *call, conv *c) {
  plan l;
  bool done;
  int status = make_plan(call, c, &l);
  if (status) return status;
  const int device = hm_cuda_current()->index;
  void *ws = l.bytes ? hm_cuda_mem_alloc(device, l.bytes) : NULL;
  if (l.bytes && !ws)
    return hm_cuda_fail(HM_ERR_MEMORY, "%s: no memory for a workspace of %zu bytes", c->name, l.bytes);
  count(&l);
  status = run_plan(call, c, &l, (char *)ws, &done);
  if (ws) hm_cuda_mem_free(device, ws, l.bytes);
  return status;
}

int hm_cuda_conv(const hm_kernel_call *call) {
  conv c;
  plan l;
  bool done;
  int status = read_call(call, &c);
  if (status) return status;
  if (is_empty(&c)) return run_empty(&c, call);
  status = make_plan(call, &c, &l);
  if (!status) status = run_plan(call, &c, &l, (char *)call->workspace, &done);
  if (status) return status;
  if (!done) return run_refused(call, &c);
  count(&l);
  return HM_OK;
}

int hm_cuda_conv_packing(const hm_kernel_call *call, int arg, hm_packing *out) {
  const hm_view *w = &call->in[arg];
  if (!wants_reorder(w)) return HM_OK;
  uint64_t key = UINT64_C(0xcbf29ce484222325) ^ (uint64_t)w->dtype;
  for (int d = 0; d < 4; d++) key = (key ^ (uint64_t)w->shape[d]) * UINT64_C(0x100000001b3);
  out->key = key | UINT64_C(1) << 63;
  out->bytes = (size_t)(hm_cuda_numel(w) * hm_dtype_size(w->dtype));
  return HM_OK;
}

int hm_cuda_conv_pack(const hm_kernel_call *call, int arg, void *dst) {
  const hm_view from = window_order(&call->in[arg]), to = hm_cuda_dense(dst, from.dtype, 4, from.shape);
  return hm_cuda_copy_view(&from, &to);
}

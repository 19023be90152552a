/*
 * conv.c -- family conv: conv2d and its gradients by input and by weight.
 *
 * x, out and their gradients are channels-last in memory, the weight is plain row-major [O, C/groups, kH, kW] or comes
 * packed in oneDNN's layout.  A call takes one of four ways, chosen from dtypes, shapes and hm.use_deterministic alone:
 *   F64     plain loops in double; also the reference that the others are tested against
 *   DIRECT  one oneDNN primitive on the operands as they lie (f32; bf16 where the processor multiplies it)
 *   CHUNKS  images in chunks: converted to float32, the float32 primitive, the result rounded once; weight gradients of
 *           the chunks are added in float32 in order
 *   FIXED   weight gradients under hm.use_deterministic: chunks dealt out to a fixed number of lanes, whose sums are added in order
 * In a weight gradient a NaN or infinity may also meet the zeros of the padding: more elements become NaN than in exact
 * arithmetic, never fewer.
 * Memory comes from call->workspace; hm_cpu_conv_workspace() makes the same plan and tells its size.
 */
#include <string.h>

#include "onednn.h"

enum { CHUNK_BYTES = 768 << 10 }; /* float32 images of one chunk, both sides: they stay in cache */

typedef enum way { WAY_F64, WAY_DIRECT, WAY_CHUNKS, WAY_FIXED } way;

/* One call.  x and out are the operands or the gradients by them, whichever way data flows. */
typedef struct conv {
  const char *name;
  hm_conv_desc d; /* with the operands' own dtypes and all images */
  char *x, *weight, *out, *bias;
  int weight_packed;
} conv;

typedef struct plan {
  way way;
  hm_conv_desc d; /* as the primitive has it: n images of a chunk */
  hm_prim *prim;
  hm_chunks chunks;
  size_t x_at, weight_at, out_at, bias_at, sum_at, scratch_at, bytes; /* offsets in the workspace */
  bool x_staged, out_staged, weight_staged;
  /* FIXED: the offsets are within a lane's part of the workspace */
  hm_prim *lane[HM_LANES];
  int lanes;
  size_t lane_bytes;
} plan;

/* ====== Reading the call ====== */

static void read_window(const hm_attr *attr, hm_conv_desc *d) {
  for (int i = 0; i < 2; i++) {
    d->stride[i] = attr[0].v[attr[0].n > 1 ? i : 0];
    d->padding[i] = attr[1].v[attr[1].n > 1 ? i : 0];
    d->dilation[i] = attr[2].v[attr[2].n > 1 ? i : 0];
  }
  d->groups = attr[3].i;
}

static void read_shapes(hm_conv_desc *d, const int64_t *x, const int64_t *weight, const int64_t *out) {
  d->n = x[0], d->c = x[1], d->h = x[2], d->w = x[3];
  d->o = out[1], d->oh = out[2], d->ow = out[3];
  d->kh = weight[2], d->kw = weight[3];
}

static int read_operands(const hm_kernel_call *call, conv *c) {
  const hm_view *a = &call->in[0], *b = &call->in[1], *o = &call->out[0], *x, *weight, *out;
  switch (call->op) {
  case HM_OP_CONV2D:
    c->name = "conv2d", c->d.kind = HM_CONV_FORWARD;
    x = a, weight = b, out = o;
    if (!(call->in[2].flags & HM_VIEW_ABSENT)) c->bias = call->in[2].data, c->d.bias_dtype = call->in[2].dtype;
    break;
  case HM_OP_CONV2D_BACKWARD_INPUT:
    c->name = "conv2d_backward_input", c->d.kind = HM_CONV_INPUT;
    x = o, weight = b, out = a;
    break;
  case HM_OP_CONV2D_BACKWARD_WEIGHT:
    c->name = "conv2d_backward_weight", c->d.kind = HM_CONV_WEIGHT;
    x = b, weight = o, out = a;
    break;
  default: return hm_cpu_fail(HM_ERR_UNSUPPORTED, "conv: op %d is none of this family", call->op);
  }
  read_window(call->op == HM_OP_CONV2D ? call->attr : call->attr + 1, &c->d);
  read_shapes(&c->d, x->shape, weight->shape, out->shape);
  c->x = x->data, c->weight = weight->data, c->out = out->data;
  c->d.x_dtype = x->dtype, c->d.weight_dtype = weight->dtype, c->d.out_dtype = out->dtype;
  c->weight_packed = (weight->flags & HM_VIEW_PACKED) != 0;
  return HM_OK;
}

static int read_call(const hm_kernel_call *call, conv *c) {
  memset(c, 0, sizeof *c);
  c->d.bias_dtype = HM_NONE;
  const int status = read_operands(call, c);
  if (status) return status;
  const hm_conv_desc *d = &c->d;
  const int first = call->in[0].dtype, second = call->in[1].dtype, to = call->out[0].dtype;
  if (!hm_dtype_is_float(first) || !hm_dtype_is_float(second) || !hm_dtype_is_float(to) ||
      (first == HM_F64) != (second == HM_F64))
    return hm_cpu_fail(HM_ERR_DTYPE, "%s: no convolution of %s and %s into %s", c->name, hm_dtype_short(first),
                       hm_dtype_short(second), hm_dtype_short(to));
  if (d->groups < 1 || d->c % d->groups || d->o % d->groups)
    return hm_cpu_fail(HM_ERR_SHAPE, "%s: %lld groups do not divide %lld and %lld channels", c->name,
                       (long long)d->groups, (long long)d->c, (long long)d->o);
  return HM_OK;
}

static int64_t x_image(const hm_conv_desc *d) { return d->c * d->h * d->w; }
static int64_t out_image(const hm_conv_desc *d) { return d->o * d->oh * d->ow; }
static int64_t weight_numel(const hm_conv_desc *d) { return d->o * (d->c / d->groups) * d->kh * d->kw; }

/* Some size is 0: the result has no terms, or no elements. */
static bool is_empty(const hm_conv_desc *d) {
  return d->n * x_image(d) == 0 || out_image(d) == 0 || weight_numel(d) == 0;
}

/* ====== Planning ====== */

static bool native_bf16(const conv *c) {
  const hm_conv_desc *d = &c->d;
  if (!hm_cpu_get_features()->native_bf16) return false;
  switch (d->kind) {
  case HM_CONV_FORWARD:
    return d->x_dtype == HM_BF16 && d->weight_dtype == HM_BF16 && (d->out_dtype == HM_BF16 || d->out_dtype == HM_F32);
  case HM_CONV_INPUT:
    return d->out_dtype == HM_BF16 && d->weight_dtype == HM_BF16 && (d->x_dtype == HM_BF16 || d->x_dtype == HM_F32);
  default: return d->x_dtype == HM_BF16 && d->out_dtype == HM_BF16;
  }
}

/* float32 on both sides; for a weight gradient its own dtype does not matter, it is unpacked anyway. */
static bool plain_f32(const conv *c) {
  const hm_conv_desc *d = &c->d;
  return d->x_dtype == HM_F32 && d->out_dtype == HM_F32 && (d->kind == HM_CONV_WEIGHT || d->weight_dtype == HM_F32);
}

/* Workspace for the weight, the bias, the sum of partial gradients and the primitive. */
static void take_common(const conv *c, plan *l) {
  l->weight_staged = c->d.kind == HM_CONV_WEIGHT || !c->weight_packed;
  if (l->weight_staged) l->weight_at = hm_take(&l->bytes, l->prim->weight_bytes);
  if (c->d.kind == HM_CONV_WEIGHT && l->chunks.count > 1) l->sum_at = hm_take(&l->bytes, l->prim->weight_bytes);
  if (c->bias && c->d.bias_dtype != HM_F32) l->bias_at = hm_take(&l->bytes, (size_t)c->d.o * 4);
  l->scratch_at = hm_take(&l->bytes, l->prim->scratch);
}

static int find_prim(const conv *c, plan *l) {
  if (l->d.kind == HM_CONV_WEIGHT) l->d.weight_dtype = HM_F32; /* rounded once, when it is unpacked */
  if (l->d.bias_dtype != HM_NONE) l->d.bias_dtype = HM_F32;
  return hm_prim_conv(c->name, &l->d, &l->prim);
}

static int plan_direct(const conv *c, plan *l) {
  l->way = WAY_DIRECT;
  l->d = c->d;
  l->chunks = (hm_chunks){1, c->d.n};
  const int status = find_prim(c, l);
  if (status) return status;
  if (l->prim->primitive) take_common(c, l);
  else l->prim = NULL;
  return HM_OK;
}

/* How the images are cut: weights are read once per chunk, so a chunk outweighs them. */
static hm_chunks image_chunks(const hm_conv_desc *d) {
  const int64_t weights = 8 * weight_numel(d);
  return hm_chunk(d->n, 4 * (x_image(d) + out_image(d)), weights > CHUNK_BYTES ? weights : CHUNK_BYTES, 1);
}

static int no_primitive(const conv *c, const plan *l) {
  return hm_cpu_fail(
      HM_ERR_UNSUPPORTED,
      "%s: oneDNN has no fast float32 convolution of [%lld,%lld,%lld,%lld] with [%lld,%lld,%lld,%lld] (%s)", c->name,
      (long long)l->d.n, (long long)l->d.c, (long long)l->d.h, (long long)l->d.w, (long long)l->d.o,
      (long long)(l->d.c / l->d.groups), (long long)l->d.kh, (long long)l->d.kw, l->prim->impl);
}

static int plan_chunks(const conv *c, plan *l) {
  l->way = WAY_CHUNKS;
  l->d = c->d;
  l->chunks = image_chunks(&c->d);
  l->d.n = l->chunks.size;
  l->d.x_dtype = l->d.weight_dtype = l->d.out_dtype = HM_F32;
  const int status = find_prim(c, l);
  if (status) return status;
  if (!l->prim->primitive) return no_primitive(c, l);
  const bool fill = c->d.kind == HM_CONV_WEIGHT && l->chunks.count > 1; /* the last chunk is filled up with zeros */
  l->x_staged = c->d.x_dtype != HM_F32 || fill;
  l->out_staged = c->d.out_dtype != HM_F32 || fill;
  if (l->x_staged) l->x_at = hm_take(&l->bytes, (size_t)(l->d.n * x_image(&l->d)) * 4);
  if (l->out_staged) l->out_at = hm_take(&l->bytes, (size_t)(l->d.n * out_image(&l->d)) * 4);
  take_common(c, l);
  return HM_OK;
}

/* Finds the primitive of each lane. */
static int find_lanes(const conv *c, plan *l) {
  int status = HM_OK;
  hm_prims_single_begin();
  for (int i = 0; i < l->lanes && !status; i++) {
    l->d.lane = i + 1;
    status = find_prim(c, l);
    l->lane[i] = l->prim;
  }
  hm_prims_single_end();
  return status;
}

static int plan_fixed(const conv *c, plan *l) {
  l->way = WAY_FIXED;
  l->d = c->d;
  const int64_t share = (c->d.n + HM_LANES - 1) / HM_LANES, most = image_chunks(&c->d).size;
  l->d.n = share < most ? share : most;
  l->chunks = (hm_chunks){(c->d.n + l->d.n - 1) / l->d.n, l->d.n};
  l->lanes = l->chunks.count < HM_LANES ? (int)l->chunks.count : HM_LANES;
  l->d.x_dtype = l->d.weight_dtype = l->d.out_dtype = HM_F32;
  const int status = find_lanes(c, l);
  if (status) return status;
  if (!l->prim->primitive) return no_primitive(c, l);
  const bool fill = c->d.n % l->d.n != 0; /* the last chunk is filled up with zeros */
  l->x_staged = c->d.x_dtype != HM_F32 || fill;
  l->out_staged = c->d.out_dtype != HM_F32 || fill;
  if (l->x_staged) l->x_at = hm_take(&l->lane_bytes, (size_t)(l->d.n * x_image(&l->d)) * 4);
  if (l->out_staged) l->out_at = hm_take(&l->lane_bytes, (size_t)(l->d.n * out_image(&l->d)) * 4);
  l->weight_at = hm_take(&l->lane_bytes, l->prim->weight_bytes);
  l->sum_at = hm_take(&l->lane_bytes, l->prim->weight_bytes);
  l->scratch_at = hm_take(&l->lane_bytes, l->prim->scratch);
  l->bytes = l->lane_bytes * (size_t)l->lanes;
  return HM_OK;
}

/* `c` is not empty. */
static int make_plan(const conv *c, plan *l) {
  memset(l, 0, sizeof *l);
  const int64_t operand = c->d.kind == HM_CONV_INPUT ? c->d.out_dtype : c->d.x_dtype;
  if (operand == HM_F64) {
    l->way = WAY_F64;
    return HM_OK;
  }
  if (c->d.kind == HM_CONV_WEIGHT && hm_cpu_is_deterministic()) return plan_fixed(c, l);
  if (plain_f32(c) || native_bf16(c)) {
    const int status = plan_direct(c, l);
    if (status || l->prim) return status;
    memset(l, 0, sizeof *l);
  }
  return plan_chunks(c, l);
}

/* ====== The ways ====== */

/* The weight in the primitive's layout: as it came, or packed now; for a gradient, room for it. */
static char *ready_weight(const conv *c, const plan *l, char *ws) {
  if (!l->weight_staged) return c->weight;
  if (c->d.kind != HM_CONV_WEIGHT)
    hm_prim_pack_weight(l->prim, &l->d, ws + l->weight_at, c->weight, (int)c->d.weight_dtype);
  return ws + l->weight_at;
}

static char *ready_bias(const conv *c, const plan *l, char *ws) {
  if (!c->bias || c->d.bias_dtype == HM_F32) return c->bias;
  hm_cpu_isa()->convert(ws + l->bias_at, HM_F32, c->bias, (int)c->d.bias_dtype, c->d.o);
  return ws + l->bias_at;
}

static int run_direct(const conv *c, const plan *l, char *ws) {
  void *const data[HM_PRIM_ARGS] = {c->x, ready_weight(c, l, ws), c->out, ready_bias(c, l, ws)};
  const int status = hm_prim_execute(c->name, l->prim, data, ws + l->scratch_at);
  if (!status && c->d.kind == HM_CONV_WEIGHT)
    hm_prim_unpack_weight(l->prim, &l->d, c->weight, (int)c->d.weight_dtype, data[HM_PRIM_Y]);
  return status;
}

/* n images of one side as float32, and zeros up to `full`. */
static void stage_images(char *dst, const char *src, int dtype, int64_t image, int64_t n, int64_t full) {
  hm_convert_many(dst, HM_F32, src, dtype, n * image);
  if (n < full) memset(dst + n * image * 4, 0, (size_t)((full - n) * image) * 4);
}

/* conv2d and its gradient by input: `from` is read, `to` written, chunk by chunk. */
static int run_images(const conv *c, const plan *l, char *ws) {
  const hm_conv_desc *d = &l->d;
  const bool forward = d->kind == HM_CONV_FORWARD;
  const int64_t from_image = forward ? x_image(d) : out_image(d), to_image = forward ? out_image(d) : x_image(d);
  const int from_dtype = (int)(forward ? c->d.x_dtype : c->d.out_dtype),
            to_dtype = (int)(forward ? c->d.out_dtype : c->d.x_dtype);
  const bool from_staged = forward ? l->x_staged : l->out_staged, to_staged = forward ? l->out_staged : l->x_staged;
  char *from_room = ws + (forward ? l->x_at : l->out_at), *to_room = ws + (forward ? l->out_at : l->x_at);
  char *weight = ready_weight(c, l, ws), *bias = ready_bias(c, l, ws);
  int status = HM_OK;
  for (int64_t i = 0; i < l->chunks.count && !status; i++) {
    const int64_t first = hm_chunk_start(&l->chunks, i, c->d.n);
    char *from = (forward ? c->x : c->out) + first * from_image * hm_dtype_size(from_dtype);
    char *to = (forward ? c->out : c->x) + first * to_image * hm_dtype_size(to_dtype);
    if (from_staged) stage_images(from_room, from, from_dtype, from_image, d->n, d->n);
    char *a = from_staged ? from_room : from, *b = to_staged ? to_room : to;
    void *const data[HM_PRIM_ARGS] = {forward ? a : b, weight, forward ? b : a, bias};
    status = hm_prim_execute(c->name, l->prim, data, ws + l->scratch_at);
    if (to_staged && !status) hm_convert_many(to, to_dtype, b, HM_F32, d->n * to_image);
  }
  return status;
}

static void add_into(float *sum, const float *part, int64_t n) {
#pragma omp parallel for simd schedule(static) num_threads(hm_cpu_threads(n, 12))
  for (int64_t i = 0; i < n; i++) sum[i] += part[i];
}

/* Gradient by the weight: partial gradients of the chunks, added in order. */
static int run_weight(const conv *c, const plan *l, char *ws) {
  const hm_conv_desc *d = &l->d;
  const int64_t xi = x_image(d), oi = out_image(d);
  float *part = (float *)(ws + l->weight_at), *sum = l->chunks.count > 1 ? (float *)(ws + l->sum_at) : part;
  int status = HM_OK;
  for (int64_t i = 0; i < l->chunks.count && !status; i++) {
    const int64_t first = i * d->n, n = c->d.n - first < d->n ? c->d.n - first : d->n;
    char *x = c->x + first * xi * hm_dtype_size((int)c->d.x_dtype),
         *out = c->out + first * oi * hm_dtype_size((int)c->d.out_dtype);
    if (l->x_staged) stage_images(ws + l->x_at, x, (int)c->d.x_dtype, xi, n, d->n);
    if (l->out_staged) stage_images(ws + l->out_at, out, (int)c->d.out_dtype, oi, n, d->n);
    void *const data[HM_PRIM_ARGS] = {l->x_staged ? ws + l->x_at : x, i ? part : sum,
                                      l->out_staged ? ws + l->out_at : out, NULL};
    status = hm_prim_execute(c->name, l->prim, data, ws + l->scratch_at);
    if (i && !status) add_into(sum, part, (int64_t)(l->prim->weight_bytes / 4));
  }
  if (!status) hm_prim_unpack_weight(l->prim, d, c->weight, (int)c->d.weight_dtype, sum);
  return status;
}

/* n images of one side as float32 on this thread, and zeros up to `full`. */
static char *lane_images(char *room, char *src, int dtype, int64_t image, int64_t n, int64_t full) {
  hm_cpu_isa()->convert(room, HM_F32, src, dtype, n * image);
  if (n < full) memset(room + n * image * 4, 0, (size_t)((full - n) * image) * 4);
  return room;
}

/* The chunks of one lane: i, i + lanes, ...; their sum in the lane's workspace. */
static int run_lane(const conv *c, const plan *l, int lane, char *ws) {
  const hm_conv_desc *d = &l->d;
  const int64_t xi = x_image(d), oi = out_image(d), elements = (int64_t)(l->prim->weight_bytes / 4);
  float *part = (float *)(void *)(ws + l->weight_at), *sum = (float *)(void *)(ws + l->sum_at);
  int status = HM_OK;
  for (int64_t i = lane; i < l->chunks.count && !status; i += l->lanes) {
    const int64_t first = i * d->n, n = c->d.n - first < d->n ? c->d.n - first : d->n;
    char *x = c->x + first * xi * hm_dtype_size((int)c->d.x_dtype),
         *out = c->out + first * oi * hm_dtype_size((int)c->d.out_dtype);
    if (l->x_staged) x = lane_images(ws + l->x_at, x, (int)c->d.x_dtype, xi, n, d->n);
    if (l->out_staged) out = lane_images(ws + l->out_at, out, (int)c->d.out_dtype, oi, n, d->n);
    void *const data[HM_PRIM_ARGS] = {x, i == lane ? sum : part, out, NULL};
    status = hm_prim_execute(c->name, l->lane[lane], data, ws + l->scratch_at);
    for (int64_t e = 0; e < elements && i != lane && !status; e++) sum[e] += part[e];
  }
  return status;
}

/* Gradient by the weight, the same bits for any number of threads. */
static int run_fixed(const conv *c, const plan *l, char *ws) {
  int failed = 0;
#pragma omp parallel for schedule(static, 1) num_threads(hm_cpu_get_features()->threads) reduction(| : failed)
  for (int i = 0; i < l->lanes; i++) failed |= run_lane(c, l, i, ws + (size_t)i * l->lane_bytes) != HM_OK;
  if (failed) return hm_cpu_fail(HM_ERR_INTERNAL, "%s: a piece of the gradient failed in oneDNN", c->name);
  float *sum = (float *)(void *)(ws + l->sum_at);
  for (int i = 1; i < l->lanes; i++)
    add_into(sum, (const float *)(const void *)(ws + (size_t)i * l->lane_bytes + l->sum_at),
             (int64_t)(l->prim->weight_bytes / 4));
  hm_prim_unpack_weight(l->prim, &l->d, c->weight, (int)c->d.weight_dtype, sum);
  return HM_OK;
}

/* Sums without terms: zeros, or the bias in each place. */
static int run_empty(const conv *c) {
  const hm_conv_desc *d = &c->d;
  if (d->kind == HM_CONV_INPUT) memset(c->x, 0, (size_t)(d->n * x_image(d) * hm_dtype_size((int)d->x_dtype)));
  if (d->kind == HM_CONV_WEIGHT) memset(c->weight, 0, (size_t)(weight_numel(d) * hm_dtype_size((int)d->weight_dtype)));
  if (d->kind != HM_CONV_FORWARD) return HM_OK;
  const int size = hm_dtype_size((int)d->out_dtype);
  const int64_t places = d->n * d->oh * d->ow;
  if (!c->bias) memset(c->out, 0, (size_t)(places * d->o * size));
  for (int64_t i = 0; c->bias && i < places; i++)
    hm_cpu_isa()->convert(c->out + i * d->o * size, (int)d->out_dtype, c->bias, (int)d->bias_dtype, d->o);
  return HM_OK;
}

/* ====== Double precision ====== */

/* Where window place k of output position o looks in the input; false outside. */
static bool input_place(int64_t o, int64_t k, int64_t stride, int64_t padding, int64_t dilation, int64_t size,
                        int64_t *at) {
  *at = o * stride - padding + k * dilation;
  return *at >= 0 && *at < size;
}

/* Which output position looks at input place `at` through window place k; false where none does. */
static bool output_place(int64_t at, int64_t k, int64_t stride, int64_t padding, int64_t dilation, int64_t size,
                         int64_t *o) {
  const int64_t shifted = at + padding - k * dilation;
  *o = shifted / stride;
  return shifted >= 0 && shifted % stride == 0 && *o < size;
}

static const double *f64_at(const char *data, int64_t offset) { return (const double *)(const void *)data + offset; }

/* All output channels at one place. */
static void f64_forward_place(const conv *c, int64_t n, int64_t y, int64_t x) {
  const hm_conv_desc *d = &c->d;
  const int64_t in = d->c / d->groups, out = d->o / d->groups;
  for (int64_t o = 0; o < d->o; o++) {
    double sum = 0;
    for (int64_t i = 0; i < d->kh; i++)
      for (int64_t j = 0; j < d->kw; j++) {
        int64_t iy, ix;
        if (!input_place(y, i, d->stride[0], d->padding[0], d->dilation[0], d->h, &iy)) continue;
        if (!input_place(x, j, d->stride[1], d->padding[1], d->dilation[1], d->w, &ix)) continue;
        const double *a = f64_at(c->x, ((n * d->h + iy) * d->w + ix) * d->c + o / out * in);
        const double *w = f64_at(c->weight, o * in * d->kh * d->kw + i * d->kw + j);
        for (int64_t k = 0; k < in; k++) sum += a[k] * w[k * d->kh * d->kw];
      }
    if (c->bias) sum += hm_load_double(c->bias, (int)d->bias_dtype, o);
    hm_store_double(c->out, (int)d->out_dtype, ((n * d->oh + y) * d->ow + x) * d->o + o, sum);
  }
}

/* The gradient of all channels of x at one place. */
static void f64_input_place(const conv *c, int64_t n, int64_t y, int64_t x) {
  const hm_conv_desc *d = &c->d;
  const int64_t in = d->c / d->groups, out = d->o / d->groups;
  for (int64_t k = 0; k < d->c; k++) {
    double sum = 0;
    for (int64_t i = 0; i < d->kh; i++)
      for (int64_t j = 0; j < d->kw; j++) {
        int64_t oy, ox;
        if (!output_place(y, i, d->stride[0], d->padding[0], d->dilation[0], d->oh, &oy)) continue;
        if (!output_place(x, j, d->stride[1], d->padding[1], d->dilation[1], d->ow, &ox)) continue;
        const int64_t first = k / in * out; /* the group's output channels */
        const double *g = f64_at(c->out, ((n * d->oh + oy) * d->ow + ox) * d->o + first);
        const double *w = f64_at(c->weight, ((first * in + k % in) * d->kh + i) * d->kw + j);
        for (int64_t o = 0; o < out; o++) sum += g[o] * w[o * in * d->kh * d->kw];
      }
    hm_store_double(c->x, (int)d->x_dtype, ((n * d->h + y) * d->w + x) * d->c + k, sum);
  }
}

/* The gradient of one element of the weight. */
static double f64_weight_element(const conv *c, int64_t o, int64_t k, int64_t i, int64_t j) {
  const hm_conv_desc *d = &c->d;
  const int64_t in = d->c / d->groups, channel = o / (d->o / d->groups) * in + k;
  double sum = 0;
  for (int64_t n = 0; n < d->n; n++)
    for (int64_t y = 0; y < d->oh; y++)
      for (int64_t x = 0; x < d->ow; x++) {
        int64_t iy, ix;
        if (!input_place(y, i, d->stride[0], d->padding[0], d->dilation[0], d->h, &iy)) continue;
        if (!input_place(x, j, d->stride[1], d->padding[1], d->dilation[1], d->w, &ix)) continue;
        sum += *f64_at(c->x, ((n * d->h + iy) * d->w + ix) * d->c + channel) *
               *f64_at(c->out, ((n * d->oh + y) * d->ow + x) * d->o + o);
      }
  return sum;
}

static int run_f64_weight(const conv *c) {
  const hm_conv_desc *d = &c->d;
  const int64_t places = d->kh * d->kw, in = d->c / d->groups, elements = weight_numel(d);
#pragma omp parallel for schedule(static) num_threads(hm_cpu_threads(elements, d->n * d->oh * d->ow * 4))
  for (int64_t e = 0; e < elements; e++)
    hm_store_double(c->weight, (int)d->weight_dtype, e,
                    f64_weight_element(c, e / (in * places), e / places % in, e % places / d->kw, e % d->kw));
  return HM_OK;
}

static int run_f64(const conv *c) {
  const hm_conv_desc *d = &c->d;
  if (d->kind == HM_CONV_WEIGHT) return run_f64_weight(c);
  const bool forward = d->kind == HM_CONV_FORWARD;
  const int64_t h = forward ? d->oh : d->h, w = forward ? d->ow : d->w, rows = d->n * h;
#pragma omp parallel for schedule(static) num_threads(hm_cpu_threads(rows, w *weight_numel(d) * 4))
  for (int64_t r = 0; r < rows; r++)
    for (int64_t x = 0; x < w; x++) {
      if (forward) f64_forward_place(c, r / h, r % h, x);
      else f64_input_place(c, r / h, r % h, x);
    }
  return HM_OK;
}

/* ====== Entries ====== */

int hm_cpu_conv_workspace(const hm_kernel_call *call, size_t *bytes) {
  conv c;
  plan l;
  *bytes = 0;
  int status = read_call(call, &c);
  if (status || is_empty(&c.d)) return status;
  status = make_plan(&c, &l);
  *bytes = l.bytes;
  return status;
}

int hm_cpu_conv(const hm_kernel_call *call) {
  conv c;
  plan l;
  int status = read_call(call, &c);
  if (status) return status;
  if (is_empty(&c.d)) return run_empty(&c);
  status = make_plan(&c, &l);
  if (status) return status;
  if (l.bytes > call->workspace_bytes)
    return hm_cpu_fail(HM_ERR_INTERNAL, "%s: needs %zu bytes of workspace, has %zu", c.name, l.bytes,
                       call->workspace_bytes);
  char *ws = call->workspace;
  if (l.way == WAY_F64) return run_f64(&c);
  if (l.way == WAY_DIRECT) return run_direct(&c, &l, ws);
  if (l.way == WAY_FIXED) return run_fixed(&c, &l, ws);
  return c.d.kind == HM_CONV_WEIGHT ? run_weight(&c, &l, ws) : run_images(&c, &l, ws);
}

int hm_conv_packing(const hm_kernel_call *call, int arg, hm_packing *out) {
  conv c;
  plan l;
  (void)arg;
  int status = read_call(call, &c);
  if (status || is_empty(&c.d)) return status;
  status = make_plan(&c, &l);
  if (status || l.way == WAY_F64) return status;
  /* Copies of one layout made from different dtypes differ in value. */
  *out = (hm_packing){l.prim->weight_key ^ (uint64_t)c.d.weight_dtype << 8, l.prim->weight_bytes};
  return HM_OK;
}

int hm_conv_pack(const hm_kernel_call *call, int arg, void *dst) {
  conv c;
  plan l;
  int status = read_call(call, &c);
  if (status) return status;
  status = make_plan(&c, &l);
  if (status) return status;
  hm_prim_pack_weight(l.prim, &l.d, dst, call->in[arg].data, call->in[arg].dtype);
  return HM_OK;
}

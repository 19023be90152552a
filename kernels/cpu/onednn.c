/*
 * onednn.c -- the engine, the cache of primitives, and the layouts of convolution weights.  See onednn.h.
 *
 * The cache is a hash table with a list in order of use; it owns every hm_prim, frees the one used longest ago when
 * full, and remembers refusals too.  Called by matmul.c, conv.c and (open, version, packing) backend.c, on one thread.
 */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include <dnnl_debug.h>

#include "onednn.h"

enum { CACHE_CAPACITY = 1024, CACHE_BUCKETS = 2048, KEY_WORDS = 64 };

/* What a primitive was made for, word by word. */
typedef struct prim_key {
  int32_t n;
  int64_t word[KEY_WORDS];
} prim_key;

typedef struct cache_entry {
  hm_prim prim; /* first: an hm_prim pointer is an entry pointer */
  uint64_t hash;
  struct cache_entry *next;          /* in the bucket */
  struct cache_entry *newer, *older; /* in order of use */
  int32_t n;
  int64_t word[]; /* n of them */
} cache_entry;

static struct {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  cache_entry *bucket[CACHE_BUCKETS];
  cache_entry *newest, *oldest;
  int count;
} dn;

/* ====== Opening ====== */

static dnnl_cpu_isa_t isa_limit(const hm_cpu_features *f) {
  if (!strcmp(f->isa, "avx512"))
    return f->amx           ? dnnl_cpu_isa_avx512_core_amx
           : f->avx512_bf16 ? dnnl_cpu_isa_avx512_core_bf16
                            : dnnl_cpu_isa_avx512_core_vnni;
  return !strcmp(f->isa, "avx2") ? dnnl_cpu_isa_avx2 : dnnl_cpu_isa_sse41;
}

int hm_cpu_onednn_open(const hm_cpu_features *features) {
  if (dn.engine) return HM_OK;
#if defined(__x86_64__)
  dnnl_set_max_cpu_isa(isa_limit(
      features)); /* refused by a library built without limits, or after its first use: it then decides itself */
#else
  (void)isa_limit;
  (void)features;
#endif
  dnnl_set_primitive_cache_capacity(0); /* ours is in front of it */
  dnnl_status_t s = dnnl_engine_create(&dn.engine, dnnl_cpu, 0);
  if (s == dnnl_success) s = dnnl_stream_create(&dn.stream, dn.engine, dnnl_stream_default_flags);
  return s == dnnl_success ? HM_OK : hm_cpu_fail(HM_ERR_INTERNAL, "cpu: oneDNN does not start: %s", dnnl_status2str(s));
}

void hm_cpu_onednn_version(int version[3]) {
  const dnnl_version_t *v = dnnl_version();
  version[0] = v->major;
  version[1] = v->minor;
  version[2] = v->patch;
}

/* ====== The cache ====== */

static uint64_t mix(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0x9E3779B97F4A7C15u;
  return h ^ (h >> 32);
}

static uint64_t hash_words(const int64_t *word, int n) {
  uint64_t h = 0x243F6A8885A308D3u;
  for (int i = 0; i < n; i++) h = mix(h, (uint64_t)word[i]);
  return h;
}

static void push(prim_key *k, int64_t word) { k->word[k->n++] = word; }

static void push_many(prim_key *k, const int64_t *word, int n) {
  memcpy(&k->word[k->n], word, (size_t)n * sizeof *word);
  k->n += n;
}

static void use_unlink(cache_entry *e) {
  if (e->newer) e->newer->older = e->older;
  else dn.newest = e->older;
  if (e->older) e->older->newer = e->newer;
  else dn.oldest = e->newer;
}

static void use_link(cache_entry *e) {
  e->newer = NULL;
  e->older = dn.newest;
  if (dn.newest) dn.newest->newer = e;
  else dn.oldest = e;
  dn.newest = e;
}

static bool same_key(const cache_entry *e, const prim_key *k) {
  return e->n == k->n && !memcmp(e->word, k->word, (size_t)k->n * sizeof *k->word);
}

/* The entry for k, now the newest; or NULL. */
static cache_entry *cache_find(const prim_key *k, uint64_t *hash) {
  if (dn.newest && same_key(dn.newest, k)) return dn.newest;
  *hash = hash_words(k->word, k->n);
  cache_entry *e = dn.bucket[*hash % CACHE_BUCKETS];
  while (e && !(e->hash == *hash && same_key(e, k))) e = e->next;
  if (e) {
    use_unlink(e);
    use_link(e);
  }
  return e;
}

static void entry_free(cache_entry *e) {
  hm_prim *p = &e->prim;
  for (int i = 0; i < HM_PRIM_ARGS; i++)
    if (p->memory[i]) dnnl_memory_destroy(p->memory[i]);
  if (p->scratch_memory) dnnl_memory_destroy(p->scratch_memory);
  if (p->primitive) dnnl_primitive_destroy(p->primitive);
  free(p->group_at); /* the other tables lie behind it */
  free(e);
}

static void cache_drop(cache_entry *e) {
  cache_entry **at = &dn.bucket[e->hash % CACHE_BUCKETS];
  while (*at != e) at = &(*at)->next;
  *at = e->next;
  use_unlink(e);
  dn.count--;
  entry_free(e);
}

static cache_entry *entry_new(const prim_key *k, uint64_t hash) {
  cache_entry *e = calloc(1, sizeof *e + (size_t)k->n * sizeof *k->word);
  if (!e) return NULL;
  e->hash = hash;
  e->n = k->n;
  memcpy(e->word, k->word, (size_t)k->n * sizeof *k->word);
  return e;
}

static void cache_add(cache_entry *e) {
  if (dn.count == CACHE_CAPACITY) cache_drop(dn.oldest);
  e->next = dn.bucket[e->hash % CACHE_BUCKETS];
  dn.bucket[e->hash % CACHE_BUCKETS] = e;
  use_link(e);
  dn.count++;
}

/* ====== Making primitives ====== */

static dnnl_data_type_t data_type(int64_t dtype) { return dtype == HM_BF16 ? dnnl_bf16 : dnnl_f32; }

/* Where each operand of a primitive is found: its argument number and its query. */
typedef struct arg_place {
  int id;
  dnnl_query_t query;
  int index;
} arg_place;

static const arg_place mm_place[HM_PRIM_ARGS] = {{DNNL_ARG_SRC, dnnl_query_src_md, 0},
                                                 {DNNL_ARG_WEIGHTS, dnnl_query_weights_md, 0},
                                                 {DNNL_ARG_DST, dnnl_query_dst_md, 0},
                                                 {DNNL_ARG_BIAS, dnnl_query_weights_md, 1}};
static const arg_place conv_place[3][HM_PRIM_ARGS] = {{{DNNL_ARG_SRC, dnnl_query_src_md, 0},
                                                       {DNNL_ARG_WEIGHTS, dnnl_query_weights_md, 0},
                                                       {DNNL_ARG_DST, dnnl_query_dst_md, 0},
                                                       {DNNL_ARG_BIAS, dnnl_query_weights_md, 1}},
                                                      {{DNNL_ARG_DIFF_SRC, dnnl_query_diff_src_md, 0},
                                                       {DNNL_ARG_WEIGHTS, dnnl_query_weights_md, 0},
                                                       {DNNL_ARG_DIFF_DST, dnnl_query_diff_dst_md, 0},
                                                       {0, 0, 0}},
                                                      {{DNNL_ARG_SRC, dnnl_query_src_md, 0},
                                                       {DNNL_ARG_DIFF_WEIGHTS, dnnl_query_diff_weights_md, 0},
                                                       {DNNL_ARG_DIFF_DST, dnnl_query_diff_dst_md, 0},
                                                       {0, 0, 0}}};

static bool too_slow(const char *impl) { return !strncmp(impl, "ref", 3) || !strncmp(impl, "simple", 6); }

/* Creates primitive and memory objects from its description. */
static dnnl_status_t build(hm_prim *p, const_dnnl_primitive_desc_t pd, const arg_place *place, bool bias) {
  dnnl_status_t s = dnnl_primitive_create(&p->primitive, pd);
  for (int i = 0; i < HM_PRIM_ARGS && s == dnnl_success; i++) {
    if (i == HM_PRIM_BIAS && !bias) continue;
    p->arg_id[i] = place[i].id;
    s = dnnl_memory_create(&p->memory[i], dnnl_primitive_desc_query_md(pd, place[i].query, place[i].index), dn.engine,
                           DNNL_MEMORY_NONE);
  }
  const dnnl_memory_desc_t *scratch = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
  p->scratch = scratch ? dnnl_memory_desc_get_size(scratch) : 0;
  if (s == dnnl_success && p->scratch) s = dnnl_memory_create(&p->scratch_memory, scratch, dn.engine, DNNL_MEMORY_NONE);
  return s;
}

/* The fastest description oneDNN has; `impl` gets its name.  Where it has none, or only a slow one, *pd is NULL and that is no failure: the
 * primitive is refused, and the caller goes another way. */
static dnnl_status_t describe(const void *op_desc, bool accumulate, const_dnnl_primitive_desc_t hint,
                              dnnl_primitive_desc_t *pd, char *impl) {
  dnnl_primitive_attr_t attr = NULL;
  dnnl_post_ops_t sum = NULL;
  *pd = NULL;
  dnnl_status_t s = dnnl_primitive_attr_create(&attr);
  if (s == dnnl_success) s = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
  if (s == dnnl_success && accumulate) {
    s = dnnl_post_ops_create(&sum);
    if (s == dnnl_success) s = dnnl_post_ops_append_sum(sum, 1.0f);
    if (s == dnnl_success) s = dnnl_primitive_attr_set_post_ops(attr, sum);
  }
  if (s == dnnl_success) s = dnnl_primitive_desc_create(pd, op_desc, attr, dn.engine, hint);
  if (sum) dnnl_post_ops_destroy(sum);
  if (attr) dnnl_primitive_attr_destroy(attr);
  strcpy(impl, "none");
  if (s == dnnl_unimplemented) return dnnl_success;
  if (s != dnnl_success) return s;
  const char *name = "";
  dnnl_primitive_desc_query(*pd, dnnl_query_impl_info_str, 0, &name);
  strncpy(impl, name, sizeof((hm_prim *)0)->impl - 1);
  if (too_slow(impl)) {
    dnnl_primitive_desc_destroy(*pd);
    *pd = NULL;
  }
  return dnnl_success;
}

static int fail_status(const char *op, dnnl_status_t s) {
  if (s == dnnl_out_of_memory) return hm_cpu_fail(HM_ERR_MEMORY, "%s: oneDNN is out of memory", op);
  return hm_cpu_fail(HM_ERR_INTERNAL, "%s: oneDNN: %s", op, dnnl_status2str(s));
}

int hm_prim_execute(const char *op, hm_prim *p, void *const data[HM_PRIM_ARGS], void *scratch) {
  dnnl_exec_arg_t arg[HM_PRIM_ARGS + 1];
  int n = 0;
  for (int i = 0; i < HM_PRIM_ARGS; i++) {
    if (!p->memory[i]) continue;
    dnnl_memory_set_data_handle(p->memory[i], data[i]);
    arg[n++] = (dnnl_exec_arg_t){p->arg_id[i], p->memory[i]};
  }
  if (p->scratch_memory) {
    dnnl_memory_set_data_handle(p->scratch_memory, scratch);
    arg[n++] = (dnnl_exec_arg_t){DNNL_ARG_SCRATCHPAD, p->scratch_memory};
  }
  const dnnl_status_t s = dnnl_primitive_execute(p->primitive, dn.stream, n, arg);
  return s == dnnl_success ? HM_OK : fail_status(op, s);
}

void hm_prims_single_begin(void) { omp_set_num_threads(1); }

void hm_prims_single_end(void) { omp_set_num_threads(hm_cpu_get_features()->threads); }

/* ====== Matrix products ====== */

static dnnl_status_t mm_desc(const hm_mm_desc *d, dnnl_matmul_desc_t *out) {
  dnnl_memory_desc_t x, y, z, b;
  dnnl_dims_t one = {0};
  for (int i = 0; i < d->ndim; i++) one[i] = 1;
  one[d->ndim - 1] = d->out_shape[d->ndim - 1];
  dnnl_status_t s = dnnl_memory_desc_init_by_strides(&x, d->ndim, d->x_shape, data_type(d->x_dtype), d->x_stride);
  if (s == dnnl_success)
    s = dnnl_memory_desc_init_by_strides(&y, d->ndim, d->y_shape, data_type(d->y_dtype), d->y_stride);
  if (s == dnnl_success)
    s = dnnl_memory_desc_init_by_strides(&z, d->ndim, d->out_shape, data_type(d->out_dtype), d->out_stride);
  if (s == dnnl_success) s = dnnl_memory_desc_init_by_strides(&b, d->ndim, one, data_type(d->bias_dtype), NULL);
  if (s == dnnl_success) s = dnnl_matmul_desc_init(out, &x, &y, d->bias_dtype == HM_NONE ? NULL : &b, &z);
  return s;
}

int hm_prim_matmul(const char *op, const hm_mm_desc *d, hm_prim **out) {
  prim_key k = {.n = 0};
  push(&k, (int64_t)d->ndim | (int64_t)d->accumulate << 8 | (int64_t)d->x_dtype << 16 | (int64_t)d->y_dtype << 24 |
               (int64_t)d->out_dtype << 32 | (int64_t)(d->bias_dtype + 1) << 40);
  push(&k, omp_get_max_threads() | (int64_t)d->lane << 32);
  push_many(&k, d->x_shape, d->ndim);
  push_many(&k, d->x_stride, d->ndim);
  push_many(&k, d->y_shape, d->ndim);
  push_many(&k, d->y_stride, d->ndim);
  push_many(&k, d->out_shape, d->ndim);
  push_many(&k, d->out_stride, d->ndim);
  uint64_t hash;
  cache_entry *e = cache_find(&k, &hash);
  if (e) {
    *out = &e->prim;
    return HM_OK;
  }
  e = entry_new(&k, hash);
  if (!e) return hm_cpu_fail(HM_ERR_MEMORY, "%s: out of memory", op);
  dnnl_matmul_desc_t md;
  dnnl_primitive_desc_t pd = NULL;
  dnnl_status_t s = mm_desc(d, &md);
  strcpy(e->prim.impl, "none");
  if (s == dnnl_invalid_arguments)
    s = dnnl_success; /* strides that oneDNN does not take (overlapping batches): refused */
  else if (s == dnnl_success) s = describe(&md, d->accumulate, NULL, &pd, e->prim.impl);
  if (s == dnnl_success && pd) s = build(&e->prim, pd, mm_place, d->bias_dtype != HM_NONE);
  if (pd) dnnl_primitive_desc_destroy(pd);
  if (s != dnnl_success) {
    entry_free(e);
    return fail_status(op, s);
  }
  cache_add(e);
  *out = &e->prim;
  return HM_OK;
}

/* ====== Convolutions ====== */

/* The memory descriptions and the window as oneDNN wants them. */
typedef struct conv_memory {
  dnnl_memory_desc_t x, weight, out, bias;
  dnnl_dims_t stride, dilation, near, far; /* near and far: padding */
} conv_memory;

/* Padding at the far end is what the last window reaches beyond the input (negative where it stops short). */
static void conv_window(const hm_conv_desc *d, conv_memory *m) {
  const int64_t in[2] = {d->h, d->w}, out[2] = {d->oh, d->ow}, kernel[2] = {d->kh, d->kw};
  for (int i = 0; i < 2; i++) {
    m->stride[i] = d->stride[i];
    m->dilation[i] = d->dilation[i] - 1;
    m->near[i] = d->padding[i];
    m->far[i] = (out[i] - 1) * d->stride[i] + (kernel[i] - 1) * d->dilation[i] + 1 - in[i] - d->padding[i];
  }
}

static dnnl_status_t conv_memory_desc(const hm_conv_desc *d, conv_memory *m) {
  const int64_t g = d->groups;
  const dnnl_dims_t x = {d->n, d->c, d->h, d->w}, out = {d->n, d->o, d->oh, d->ow}, bias = {d->o};
  const dnnl_dims_t plain = {d->o, d->c, d->kh, d->kw}, grouped = {g, d->o / g, d->c / g, d->kh, d->kw};
  conv_window(d, m);
  dnnl_status_t s = dnnl_memory_desc_init_by_tag(&m->x, 4, x, data_type(d->x_dtype), dnnl_nhwc);
  if (s == dnnl_success) s = dnnl_memory_desc_init_by_tag(&m->out, 4, out, data_type(d->out_dtype), dnnl_nhwc);
  if (s == dnnl_success) s = dnnl_memory_desc_init_by_tag(&m->bias, 1, bias, data_type(d->bias_dtype), dnnl_a);
  if (s == dnnl_success)
    s = dnnl_memory_desc_init_by_tag(&m->weight, g > 1 ? 5 : 4, g > 1 ? grouped : plain, data_type(d->weight_dtype),
                                     dnnl_format_tag_any);
  return s;
}

static dnnl_status_t conv_describe(const hm_conv_desc *d, dnnl_primitive_desc_t *pd, char *impl) {
  conv_memory m;
  dnnl_convolution_desc_t cd;
  *pd = NULL;
  dnnl_status_t s = conv_memory_desc(d, &m);
  if (s != dnnl_success) return s;
  const dnnl_memory_desc_t *bias = d->bias_dtype == HM_NONE ? NULL : &m.bias;
  dnnl_primitive_desc_t hint = NULL;
  /* A gradient wants a description of its forward step, for dtypes and layouts. */
  s = dnnl_dilated_convolution_forward_desc_init(&cd, dnnl_forward_training, dnnl_convolution_direct, &m.x, &m.weight,
                                                 bias, &m.out, m.stride, m.dilation, m.near, m.far);
  if (s != dnnl_success) return s;
  if (d->kind == HM_CONV_FORWARD) return describe(&cd, false, NULL, pd, impl);
  s = dnnl_primitive_desc_create(&hint, &cd, NULL, dn.engine, NULL);
  if (s == dnnl_success && d->kind == HM_CONV_INPUT)
    s = dnnl_dilated_convolution_backward_data_desc_init(&cd, dnnl_convolution_direct, &m.x, &m.weight, &m.out,
                                                         m.stride, m.dilation, m.near, m.far);
  else if (s == dnnl_success)
    s = dnnl_dilated_convolution_backward_weights_desc_init(&cd, dnnl_convolution_direct, &m.x, &m.weight, NULL, &m.out,
                                                            m.stride, m.dilation, m.near, m.far);
  if (s == dnnl_success) s = describe(&cd, false, hint, pd, impl);
  if (hint) dnnl_primitive_desc_destroy(hint);
  return s == dnnl_unimplemented ? dnnl_success : s; /* *pd is NULL then, as describe() leaves it */
}

/* Offset of index i along dim in a blocked layout.  Offsets of several dims add up. */
static int64_t blocked_offset(const dnnl_memory_desc_t *md, int dim, int64_t i) {
  const dnnl_blocking_desc_t *b = &md->format_desc.blocking;
  int64_t at = 0, block = 1;
  for (int j = b->inner_nblks - 1; j >= 0; j--) {
    if (b->inner_idxs[j] == dim) {
      at += i % b->inner_blks[j] * block;
      i /= b->inner_blks[j];
    }
    block *= b->inner_blks[j];
  }
  return at + i * b->strides[dim];
}

static uint64_t layout_key(const dnnl_memory_desc_t *md) {
  const dnnl_blocking_desc_t *b = &md->format_desc.blocking;
  uint64_t h = mix(mix(mix(1, (uint64_t)md->ndims), (uint64_t)md->data_type), (uint64_t)b->inner_nblks);
  for (int i = 0; i < md->ndims; i++)
    h = mix(mix(mix(h, (uint64_t)md->dims[i]), (uint64_t)md->padded_dims[i]), (uint64_t)b->strides[i]);
  for (int i = 0; i < b->inner_nblks; i++) h = mix(mix(h, (uint64_t)b->inner_blks[i]), (uint64_t)b->inner_idxs[i]);
  return h | (uint64_t)1 << 63;
}

/* Keeps the weight's layout as tables of offsets; false where it is not a blocked one or memory is short. */
static bool keep_layout(hm_prim *p, const hm_conv_desc *d, const dnnl_memory_desc_t *md) {
  if (md->format_kind != dnnl_blocked || md->extra.flags) return false;
  const int g = d->groups > 1 ? 1 : 0; /* a groups dim comes first */
  const int64_t out = d->o / d->groups, in = d->c / d->groups, places = d->kh * d->kw;
  p->group_at = malloc((size_t)(d->groups + out + in + places) * sizeof *p->group_at);
  if (!p->group_at) return false;
  p->out_at = p->group_at + d->groups;
  p->in_at = p->out_at + out;
  p->place_at = p->in_at + in;
  for (int64_t i = 0; i < d->groups; i++) p->group_at[i] = md->offset0 + (g ? blocked_offset(md, 0, i) : 0);
  for (int64_t i = 0; i < out; i++) p->out_at[i] = blocked_offset(md, g, i);
  for (int64_t i = 0; i < in; i++) p->in_at[i] = blocked_offset(md, g + 1, i);
  for (int64_t i = 0; i < places; i++)
    p->place_at[i] = blocked_offset(md, g + 2, i / d->kw) + blocked_offset(md, g + 3, i % d->kw);
  p->weight_key = layout_key(md);
  p->weight_bytes = dnnl_memory_desc_get_size(md);
  p->weight_dtype = (int)d->weight_dtype;
  p->weight_padded = p->weight_bytes != (size_t)(d->o * in * places * hm_dtype_size(p->weight_dtype));
  return true;
}

int hm_prim_conv(const char *op, const hm_conv_desc *d, hm_prim **out) {
  prim_key k = {.n = 0};
  push(&k, -1); /* no matrix product begins so */
  push(&k, omp_get_max_threads());
  push_many(&k, (const int64_t *)d, (int)(sizeof *d / sizeof(int64_t)));
  uint64_t hash;
  cache_entry *e = cache_find(&k, &hash);
  if (e) {
    *out = &e->prim;
    return HM_OK;
  }
  e = entry_new(&k, hash);
  if (!e) return hm_cpu_fail(HM_ERR_MEMORY, "%s: out of memory", op);
  dnnl_primitive_desc_t pd = NULL;
  dnnl_status_t s = conv_describe(d, &pd, e->prim.impl);
  const arg_place *place = conv_place[d->kind];
  if (s == dnnl_success && pd) {
    if (keep_layout(&e->prim, d, dnnl_primitive_desc_query_md(pd, place[HM_PRIM_Y].query, 0)))
      s = build(&e->prim, pd, place, d->bias_dtype != HM_NONE);
  }
  if (pd) dnnl_primitive_desc_destroy(pd);
  if (s != dnnl_success) {
    entry_free(e);
    return fail_status(op, s);
  }
  cache_add(e);
  *out = &e->prim;
  return HM_OK;
}

/* ====== Weights in and out of their layout ====== */

/* A weight's rows (one per output channel: in * places elements) move in tiles of a few rows and a stretch of whole
 * `in`s, so that either the outputs or the ins of a block lie side by side in the layout and move together. */
enum { TILE_ROWS = 16, TILE_ELEMENTS = 4096 };

typedef struct weight_tile {
  const hm_prim *p;
  int64_t places;
  int64_t rows, first_in, ins; /* of the tile */
  const int64_t *row_at;       /* offset of each row in the layout */
} weight_tile;

/* One element between plain[row][in][place] and its place in the layout.  Elements are 4 or 2 bytes (T). */
#define MOVE_TILE(name, T)                                                                                             \
  static void name(const weight_tile *t, T *layout, T *tile, bool pack) {                                              \
    const int64_t *in_at = t->p->in_at + t->first_in, *place_at = t->p->place_at, n = t->ins * t->places;              \
    const bool rows_inside = t->rows > 1 && t->row_at[1] == t->row_at[0] + 1;                                          \
    for (int64_t place = 0; place < t->places; place++) {                                                              \
      if (rows_inside)                                                                                                 \
        for (int64_t i = 0; i < t->ins; i++) {                                                                         \
          T *at = layout + in_at[i] + place_at[place], *plain = tile + i * t->places + place;                          \
          if (pack)                                                                                                    \
            for (int64_t r = 0; r < t->rows; r++) at[t->row_at[r]] = plain[r * n];                                     \
          else                                                                                                         \
            for (int64_t r = 0; r < t->rows; r++) plain[r * n] = at[t->row_at[r]];                                     \
        }                                                                                                              \
      else                                                                                                             \
        for (int64_t r = 0; r < t->rows; r++) {                                                                        \
          T *at = layout + t->row_at[r] + place_at[place], *plain = tile + r * n + place;                              \
          if (pack)                                                                                                    \
            for (int64_t i = 0; i < t->ins; i++) at[in_at[i]] = plain[i * t->places];                                  \
          else                                                                                                         \
            for (int64_t i = 0; i < t->ins; i++) plain[i * t->places] = at[in_at[i]];                                  \
        }                                                                                                              \
    }                                                                                                                  \
  }

MOVE_TILE(move_tile4, uint32_t)
MOVE_TILE(move_tile2, uint16_t)

static void move_tile(const weight_tile *t, void *layout, void *tile, bool pack) {
  if (t->p->weight_dtype == HM_F32) move_tile4(t, layout, tile, pack);
  else move_tile2(t, layout, tile, pack);
}

/* The rows from `first` on: between plain memory of any dtype and the layout, through a buffer of float32 (or
 * bfloat16). */
static void move_rows(const hm_prim *p, const hm_conv_desc *d, int64_t first, int64_t rows, void *layout, char *plain,
                      int dtype, bool pack) {
  const int64_t out = d->o / d->groups, in = d->c / d->groups, places = d->kh * d->kw;
  const int size = hm_dtype_size(p->weight_dtype), plain_size = hm_dtype_size(dtype);
  int64_t row_at[TILE_ROWS];
  uint32_t room[TILE_ELEMENTS];
  char *const buffer = (char *)room;
  for (int64_t r = 0; r < rows; r++) row_at[r] = p->group_at[(first + r) / out] + p->out_at[(first + r) % out];
  weight_tile t = {.p = p, .places = places, .rows = rows, .row_at = row_at};
  const int64_t step = TILE_ELEMENTS / (rows * places);
  for (t.first_in = 0; t.first_in < in; t.first_in += t.ins) {
    t.ins = in - t.first_in < step ? in - t.first_in : step;
    const int64_t n = t.ins * places;
    for (int64_t r = 0; pack && r < rows; r++)
      hm_cpu_isa()->convert(buffer + r * n * size, p->weight_dtype,
                            plain + ((first + r) * in + t.first_in) * places * plain_size, dtype, n);
    move_tile(&t, layout, buffer, pack);
    for (int64_t r = 0; !pack && r < rows; r++)
      hm_cpu_isa()->convert(plain + ((first + r) * in + t.first_in) * places * plain_size, dtype, buffer + r * n * size,
                            p->weight_dtype, n);
  }
}

/* A kernel too large for a tile, element by element. */
static void move_row_slowly(const hm_prim *p, const hm_conv_desc *d, int64_t row, void *layout, char *plain, int dtype,
                            bool pack) {
  const int64_t out = d->o / d->groups, in = d->c / d->groups, places = d->kh * d->kw;
  const int size = hm_dtype_size(p->weight_dtype), plain_size = hm_dtype_size(dtype);
  const int64_t row_at = p->group_at[row / out] + p->out_at[row % out];
  for (int64_t i = 0; i < in * places; i++) {
    char *at = (char *)layout + (row_at + p->in_at[i / places] + p->place_at[i % places]) * size,
         *e = plain + (row * in * places + i) * plain_size;
    if (pack) hm_cpu_isa()->convert(at, p->weight_dtype, e, dtype, 1);
    else hm_cpu_isa()->convert(e, dtype, at, p->weight_dtype, 1);
  }
}

static void move_weight(const hm_prim *p, const hm_conv_desc *d, void *layout, char *plain, int dtype, bool pack) {
  const int64_t places = d->kh * d->kw, per_row = d->c / d->groups * places;
  const int64_t room = TILE_ELEMENTS / places, rows = room < TILE_ROWS ? room : TILE_ROWS;
  const int64_t step = rows > 8 ? 8 * (rows / 8) : rows > 0 ? rows : 1, tiles = (d->o + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(hm_cpu_threads(tiles, step *per_row * 8))
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t first = i * step, n = d->o - first < step ? d->o - first : step;
    if (rows > 0) move_rows(p, d, first, n, layout, plain, dtype, pack);
    else move_row_slowly(p, d, first, layout, plain, dtype, pack);
  }
}

void hm_prim_pack_weight(const hm_prim *p, const hm_conv_desc *d, void *dst, const void *src, int src_dtype) {
  if (p->weight_padded) memset(dst, 0, p->weight_bytes);
  move_weight(p, d, dst, (char *)src, src_dtype, true);
}

void hm_prim_unpack_weight(const hm_prim *p, const hm_conv_desc *d, void *dst, int dst_dtype, const void *src) {
  move_weight(p, d, (void *)src, dst, dst_dtype, false);
}

/* ====== Helpers of both families ====== */

void hm_convert_many(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n) {
  enum { BLOCK = 8192 };
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const int ds = hm_dtype_size(dst_dtype), ss = hm_dtype_size(src_dtype);
  const int threads = blocks > 1 ? hm_cpu_threads(blocks, (int64_t)BLOCK * (ds + ss)) : 1;
  if (threads <= 1) {
    if (n > 0) hm_cpu_isa()->convert(dst, dst_dtype, src, src_dtype, n);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t at = b * BLOCK, m = n - at < BLOCK ? n - at : BLOCK;
    hm_cpu_isa()->convert((char *)dst + at * ds, dst_dtype, (const char *)src + at * ss, src_dtype, m);
  }
}

double hm_load_double(const void *data, int dtype, int64_t index) {
  if (dtype == HM_F64) return ((const double *)data)[index];
  if (dtype == HM_F32) return (double)((const float *)data)[index];
  float value;
  hm_cpu_isa()->convert(&value, HM_F32, (const char *)data + index * hm_dtype_size(dtype), dtype, 1);
  return (double)value;
}

void hm_store_double(void *data, int dtype, int64_t index, double value) {
  if (dtype == HM_F64) ((double *)data)[index] = value;
  else hm_cpu_isa()->convert((char *)data + index * hm_dtype_size(dtype), dtype, &value, HM_F64, 1);
}

hm_chunks hm_chunk(int64_t total, int64_t item_bytes, int64_t target, int64_t least) {
  int64_t size = item_bytes > 0 ? target / item_bytes : total;
  if (size < least) size = least;
  if (size >= total) return (hm_chunks){1, total};
  const int64_t count = (total + size - 1) / size;
  return (hm_chunks){count, (total + count - 1) / count};
}

/* ====== Packing ====== */

/* Convolution weights want oneDNN's layout.  Linear weights stay plain: a float32 copy of a half weight would save a conversion a call and cost
 * twice the weight's memory for as long as it lives. */
static bool wants_packing(int op) { return op == HM_OP_CONV2D || op == HM_OP_CONV2D_BACKWARD_INPUT; }

int hm_cpu_packing(const hm_kernel_call *call, int arg, hm_packing *out) {
  *out = (hm_packing){0, 0};
  if (arg != 1 || call->in[1].flags || !wants_packing(call->op)) return HM_OK; /* absent or packed already */
  return hm_conv_packing(call, arg, out);
}

int hm_cpu_pack(const hm_kernel_call *call, int arg, void *dst) {
  if (wants_packing(call->op)) return hm_conv_pack(call, arg, dst);
  return hm_cpu_fail(HM_ERR_INTERNAL, "cpu: operand %d of this op has no layout of its own", arg + 1);
}

/*
 * normalize.cu -- batch_norm and group_norm, and their gradients.
 *
 * The steps are those of cpu/normalize.c, and the plan is the same header's: moments (or sums) of each part of an image into the workspace;
 * a warp for each statistic joins its parts in double and writes the channels' coefficients; one pass over the tensor makes the result.
 *   y  = (x - mean) * scale + bias, with relu: negative results become 0
 *   dx = g * scale - (less + (x - mean) * tilt)
 * Every statistic is made in one order that depends on shapes only.
 */
#include "cpu/normalize.h"
#include "group.h"

enum { MEAN, SCALE, BIAS, LESS, TILT, COEFFICIENTS };
enum { AHEAD = 4 }; /* numbers that a thread reads at once */

/* What every kernel of a call sees. */
struct channel_job {
  hm_channel_plan p;
  const void *x, *g;
  void *out;
  const void *weight, *bias; /* NULL: ones, zeros */
  void *mean, *rstd;         /* outputs forward, inputs backward */
  void *running_mean, *running_var;
  void *dweight, *dbias;
  void *stat;                      /* T [images * parts][2][c] */
  void *coefficient[COEFFICIENTS]; /* T [sets][c] */
  double momentum, eps;
  int32_t lanes; /* threads across channels (rows) or pixels (planes); a power of two */
  int32_t x_dtype, g_dtype, out_dtype, weight_dtype, bias_dtype, stat_dtype, mean_dtype, rstd_dtype, running_dtype[2];
  bool relu, plain, training;
};

template <class T> HM_DEV T *coefficients(const channel_job &j, int k) { return static_cast<T *>(j.coefficient[k]); }
HM_DEV int64_t set_of(const hm_channel_plan &p, int64_t image) { return p.batch ? 0 : image; }

/* ====== What is made of a part: moments, or sums of gradients ====== */

template <class T> struct pair_of {
  T n, a, b; /* moments: count, mean, sum of squares about it.  Sums: unused, sum, dot */
};

template <class T> HM_DEV pair_of<T> hm_shuffle_down(pair_of<T> x, int by) {
  pair_of<T> y;
  y.n = hm_shuffle_down(x.n, by), y.a = hm_shuffle_down(x.a, by), y.b = hm_shuffle_down(x.b, by);
  return y;
}

template <class T> HM_DEV pair_of<T> hm_first_lane(pair_of<T> x) {
  pair_of<T> y;
  y.n = hm_first_lane(x.n), y.a = hm_first_lane(x.a), y.b = hm_first_lane(x.b);
  return y;
}

template <class T> struct channel_numbers { T mean, scale, bias; };

struct join_moments {
  template <class T> HM_DEV pair_of<T> join(pair_of<T> x, pair_of<T> y) {
    if (y.n == (T)0) return x;
    if (x.n == (T)0) return y;
    const T n = x.n + y.n, d = y.a - x.a, share = y.n / n;
    pair_of<T> z;
    z.n = n;
    z.a = x.a + d * share;
    z.b = x.b + y.b + d * d * (x.n * share);
    return z;
  }
};

struct join_sums {
  template <class T> HM_DEV pair_of<T> join(pair_of<T> x, pair_of<T> y) {
    pair_of<T> z;
    z.n = x.n, z.a = x.a + y.a, z.b = x.b + y.b;
    return z;
  }
};

/* n numbers more (up to AHEAD): sums about the mean so far, joined. */
template <class T> struct take_moments : join_moments {
  typedef T type;
  static const bool gradient = false;
  HM_DEV void add(pair_of<T> &s, const T *x, const T *, int n, const channel_numbers<T> &, bool) {
    const T shift = s.n == (T)0 ? x[0] : s.a;
    T sum = (T)0, square = (T)0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (i < n) {
        const T d = x[i] - shift;
        sum += d;
        square += d * d;
      }
    pair_of<T> more;
    const T mean = sum / (T)n;
    more.n = (T)n, more.a = shift + mean, more.b = square - sum * mean;
    s = join_moments::join(s, more);
  }
};

template <class T> HM_DEV T passed(T g, T d, T scale, T bias, bool relu) {
  return relu && d * scale + bias <= (T)0 ? (T)0 : g;
}

template <class T> struct take_sums : join_sums {
  typedef T type;
  static const bool gradient = true;
  HM_DEV void add(pair_of<T> &s, const T *x, const T *g, int n, const channel_numbers<T> &k, bool relu) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (i < n) {
        const T d = x[i] - k.mean, p = passed(g[i], d, k.scale, k.bias, relu);
        s.a += p;
        s.b += p * d;
      }
  }
};

template <class T> HM_DEV channel_numbers<T> numbers_of(const channel_job &j, int64_t image, int64_t c) {
  const int64_t at = set_of(j.p, image) * j.p.c + c;
  channel_numbers<T> k;
  k.mean = coefficients<T>(j, MEAN)[at], k.scale = coefficients<T>(j, SCALE)[at], k.bias = coefficients<T>(j, BIAS)[at];
  return k;
}

/* The numbers from, from + step, ... below `end` of what begins at `base`, `pitch` apart. */
template <class R>
HM_DEV pair_of<typename R::type> take(const channel_job &j, int64_t base, int64_t pitch, int64_t from, int64_t end,
                                      int64_t step, const channel_numbers<typename R::type> &k) {
  typedef typename R::type T;
  pair_of<T> s;
  s.n = s.a = s.b = (T)0;
  for (int64_t i = from; i < end; i += AHEAD * step) {
    int64_t at[AHEAD];
    T x[AHEAD], g[AHEAD];
    int n = 0;
#pragma unroll
    for (int q = 0; q < AHEAD; q++) {
      const bool here = i + q * step < end;
      at[q] = base + (here ? i + q * step : i) * pitch;
      n += here;
    }
    hm_load_many<AHEAD>(j.x, j.x_dtype, at, x);
    if constexpr (R::gradient) hm_load_many<AHEAD>(j.g, j.g_dtype, at, g);
    R::add(s, x, g, n, k, j.relu);
  }
  return s;
}

template <class T> HM_DEV void keep(const channel_job &j, int64_t unit, int64_t c, const pair_of<T> &s) {
  T *stat = static_cast<T *>(j.stat) + unit * 2 * j.p.c + c;
  stat[0] = s.a;
  stat[j.p.c] = s.b;
}

/* Rows of channels: `lanes` channels of a part by a block, its other threads every so many rows. */
template <class R> static __global__ void __launch_bounds__(HM_BLOCK, 2) part_rows(channel_job j) {
  typedef typename R::type T;
  HM_SHARED(pair_of<T>, part, [HM_BLOCK]);
  const hm_channel_plan &p = j.p;
  const uint32_t lanes = (uint32_t)j.lanes, tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes,
                 high = HM_BLOCK / lanes;
  const uint32_t tiles = (uint32_t)((p.c + lanes - 1) / lanes), parts = (uint32_t)p.parts;
  for (uint32_t u = blockIdx.x; u < (uint32_t)p.images * parts * tiles; u += gridDim.x) {
    const uint32_t unit = u / tiles, image = unit / parts, k = unit - image * parts;
    const int64_t c = (int64_t)(u - unit * tiles) * lanes + tx;
    const bool here = c < p.c;
    const int64_t first = (int64_t)image * p.pixels + k * p.part;
    const int64_t end = !here ? 0 : k + 1 < parts ? p.part : p.pixels - k * p.part;
    channel_numbers<T> numbers = {};
    if (R::gradient && here) numbers = numbers_of<T>(j, image, c);
    part[threadIdx.x] = take<R>(j, first * p.c + c, p.c, ty, end, high, numbers);
    HM_BARRIER();
    if (ty == 0 && here) {
      pair_of<T> all = part[tx];
      for (uint32_t r = 1; r < high; r++) all = R::join(all, part[r * lanes + tx]);
      keep(j, unit, c, all);
    }
    HM_BARRIER();
  }
}

/* Planes of pixels: one by a warp or a block. */
template <class R, int G> static __global__ void __launch_bounds__(HM_BLOCK, 2) part_planes(channel_job j) {
  typedef typename R::type T;
  const hm_channel_plan &p = j.p;
  const uint32_t groups = HM_BLOCK / G, c = (uint32_t)p.c, units = (uint32_t)p.images * c;
  for (uint32_t first = blockIdx.x * groups; first < units; first += gridDim.x * groups) {
    const uint32_t u = first + threadIdx.x / G, image = u / c, k = u - image * c;
    const bool here = u < units;
    channel_numbers<T> numbers = {};
    if (R::gradient && here) numbers = numbers_of<T>(j, image, k);
    const pair_of<T> mine = take<R>(j, (int64_t)u * p.pixels, 1, threadIdx.x % G, here ? p.pixels : 0, G, numbers);
    const pair_of<T> all = hm_group_join<R, G>(mine);
    if (here && threadIdx.x % G == 0) keep(j, image, k, all);
  }
}

/* ====== Statistics and coefficients: a warp for each statistic ====== */

/* Part `i` of those behind statistic s: its unit, channel and count. */
template <class T>
HM_DEV pair_of<double> part_of(const channel_job &j, uint32_t s, uint32_t i, uint32_t *c, uint32_t *image) {
  const hm_channel_plan &p = j.p;
  const uint32_t parts = (uint32_t)p.parts, wide = p.batch ? 1u : (uint32_t)(p.c / p.groups);
  uint32_t unit;
  if (p.batch) {
    unit = i;
    *c = s;
  } else {
    const uint32_t n = s / (uint32_t)p.groups, k = i / wide;
    unit = n * parts + k;
    *c = (s - n * (uint32_t)p.groups) * wide + (i - k * wide);
  }
  *image = unit / parts;
  const uint32_t k = unit - *image * parts;
  const T *stat = static_cast<const T *>(j.stat) + (int64_t)unit * 2 * p.c + *c;
  pair_of<double> x;
  x.n = (double)(k + 1 < parts ? p.part : p.pixels - k * p.part);
  x.a = (double)stat[0], x.b = (double)stat[p.c];
  return x;
}

HM_DEV uint32_t parts_behind(const hm_channel_plan &p) {
  return (uint32_t)(p.batch ? p.images * p.parts : p.parts * (p.c / p.groups));
}

HM_DEV void move_running(void *data, int dtype, int64_t at, double momentum, double batch) {
  hm_store<double>(data, dtype, at, (1 - momentum) * hm_load<double>(data, dtype, at) + momentum * batch);
}

/* mean, scale and bias of the channels behind statistic s. */
template <class T> HM_DEV void write_coefficients(const channel_job &j, uint32_t s, T mean, T rstd) {
  const hm_channel_plan &p = j.p;
  const uint32_t wide = (uint32_t)(p.c / p.groups), groups = (uint32_t)p.groups;
  const int64_t set = s / groups, first = (int64_t)(s - (uint32_t)set * groups) * wide;
  for (uint32_t i = hm_lane(); i < wide; i += HM_WARP) {
    const int64_t c = first + i, at = set * p.c + c;
    coefficients<T>(j, MEAN)[at] = mean;
    coefficients<T>(j, SCALE)[at] = j.weight ? rstd * hm_load<T>(j.weight, j.weight_dtype, c) : rstd;
    coefficients<T>(j, BIAS)[at] = j.bias ? hm_load<T>(j.bias, j.bias_dtype, c) : (T)0;
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) finish_moments(channel_job j) {
  const hm_channel_plan &p = j.p;
  const uint32_t statistics = (uint32_t)(p.sets * p.groups), behind = j.training ? parts_behind(p) : 0;
  for (uint32_t first = blockIdx.x * HM_WARPS; first < statistics; first += gridDim.x * HM_WARPS) {
    const uint32_t s = first + hm_warp();
    const bool here = s < statistics;
    pair_of<double> all;
    all.n = all.a = all.b = 0;
    for (uint32_t i = hm_lane(); here && i < behind; i += HM_WARP) {
      uint32_t c, image;
      all = join_moments::join(all, part_of<T>(j, s, i, &c, &image));
    }
    all = hm_group_join<join_moments, HM_WARP>(all);
    if (!here) continue;
    double variance = all.b < 0 ? 0 : all.b / all.n; /* of nothing: NaN */
    if (j.training && all.n == 0) all.a = variance;
    if (!j.training) {
      all.a = hm_load<double>(j.running_mean, j.running_dtype[0], s);
      variance = hm_load<double>(j.running_var, j.running_dtype[1], s);
    }
    const T mean = (T)all.a, rstd = (T)(1 / sqrt((variance < 0 ? 0 : variance) + j.eps));
    write_coefficients<T>(j, s, mean, rstd);
    if (hm_lane() != 0) continue;
    hm_store<T>(j.mean, j.mean_dtype, s, mean);
    hm_store<T>(j.rstd, j.rstd_dtype, s, rstd);
    if (!j.training || !j.running_mean || all.n == 0) continue;
    move_running(j.running_mean, j.running_dtype[0], s, j.momentum, all.a);
    move_running(j.running_var, j.running_dtype[1], s, j.momentum, (all.b < 0 ? 0 : all.b) / (all.n - 1));
  }
}

/* Backward: mean, scale and bias as forward had them. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) recall_coefficients(channel_job j) {
  const uint32_t statistics = (uint32_t)(j.p.sets * j.p.groups);
  for (uint32_t s = blockIdx.x * HM_WARPS + hm_warp(); s < statistics; s += gridDim.x * HM_WARPS)
    write_coefficients<T>(j, s, hm_load<T>(j.mean, j.mean_dtype, s), hm_load<T>(j.rstd, j.rstd_dtype, s));
}

/* less and tilt from the sums. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) finish_sums(channel_job j) {
  const hm_channel_plan &p = j.p;
  const uint32_t statistics = (uint32_t)(p.sets * p.groups), behind = parts_behind(p);
  const uint32_t wide = (uint32_t)(p.c / p.groups), groups = (uint32_t)p.groups;
  for (uint32_t first = blockIdx.x * HM_WARPS; first < statistics; first += gridDim.x * HM_WARPS) {
    const uint32_t s = first + hm_warp();
    const bool here = s < statistics;
    pair_of<double> all;
    all.n = all.a = all.b = 0;
    for (uint32_t i = hm_lane(); here && i < behind; i += HM_WARP) {
      uint32_t c, image;
      const pair_of<double> x = part_of<T>(j, s, i, &c, &image);
      const double w = j.weight ? (double)hm_load<T>(j.weight, j.weight_dtype, c) : 1;
      all.a += w * x.a;
      all.b += w * x.b;
    }
    all = hm_group_join<join_sums, HM_WARP>(all);
    if (!here) continue;
    const double rstd = (double)hm_load<T>(j.rstd, j.rstd_dtype, s), by = rstd / (double)p.count;
    const int64_t set = s / groups, c = (int64_t)(s - (uint32_t)set * groups) * wide;
    for (uint32_t i = hm_lane(); i < wide; i += HM_WARP) {
      coefficients<T>(j, LESS)[set * p.c + c + i] = (T)(by * all.a);
      coefficients<T>(j, TILT)[set * p.c + c + i] = (T)(by * all.b * rstd * rstd);
    }
  }
}

/* Gradients of weight and bias: a warp for each channel adds over all images. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) finish_weights(channel_job j) {
  const hm_channel_plan &p = j.p;
  const uint32_t c_count = (uint32_t)p.c, parts = (uint32_t)p.parts, units = (uint32_t)p.images * parts;
  for (uint32_t first = blockIdx.x * HM_WARPS; first < c_count; first += gridDim.x * HM_WARPS) {
    const uint32_t c = first + hm_warp();
    const bool here = c < c_count;
    pair_of<double> all;
    all.n = all.a = all.b = 0;
    for (uint32_t u = hm_lane(); here && u < units; u += HM_WARP) {
      const T *stat = static_cast<const T *>(j.stat) + (int64_t)u * 2 * p.c + c;
      const int64_t s = p.batch ? c : (int64_t)(u / parts) * p.groups + c / (p.c / p.groups);
      all.a += (double)stat[0];
      all.b += (double)stat[p.c] * (double)hm_load<T>(j.rstd, j.rstd_dtype, s);
    }
    all = hm_group_join<join_sums, HM_WARP>(all);
    if (!here || hm_lane() != 0) continue;
    hm_store<double>(j.dbias, j.stat_dtype, c, all.a);
    hm_store<double>(j.dweight, j.stat_dtype, c, all.b);
  }
}

/* ====== The result ====== */

template <class T, int V> struct channel_run { T k[COEFFICIENTS][V]; };

template <class T, int V> HM_DEV void load_run(const void *data, int dtype, int64_t at, T *x) {
  if constexpr (V == 1) x[0] = hm_load<T>(data, dtype, at);
  else hm_load_run<V>(data, dtype, at, x);
}

/* V numbers from `at` on; GRADIENT: of x by g. */
template <class T, int V, bool GRADIENT>
HM_DEV void finish_run(const channel_job &j, int64_t at, const channel_run<T, V> &r) {
  T x[V], g[V];
  load_run<T, V>(j.x, j.x_dtype, at, x);
  if constexpr (GRADIENT) load_run<T, V>(j.g, j.g_dtype, at, g);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const T d = x[i] - r.k[MEAN][i];
    if constexpr (GRADIENT) {
      const T y = passed(g[i], d, r.k[SCALE][i], r.k[BIAS][i], j.relu) * r.k[SCALE][i];
      x[i] = j.plain ? y : y - (r.k[LESS][i] + d * r.k[TILT][i]);
    } else {
      const T y = d * r.k[SCALE][i] + r.k[BIAS][i];
      x[i] = j.relu && y < (T)0 ? (T)0 : y;
    }
  }
  if constexpr (V == 1) hm_store<T>(j.out, j.out_dtype, at, x[0]);
  else hm_store_run<V>(j.out, j.out_dtype, at, x);
}

/* Coefficients of channels c, c + step, ... of an image. */
template <class T, int V, bool GRADIENT>
HM_DEV channel_run<T, V> run_of(const channel_job &j, int64_t image, int64_t c, int step) {
  channel_run<T, V> r;
  const int64_t at = set_of(j.p, image) * j.p.c + c;
#pragma unroll
  for (int k = 0; k < COEFFICIENTS; k++)
#pragma unroll
    for (int i = 0; i < V; i++)
      r.k[k][i] = k >= LESS && (!GRADIENT || j.plain) ? (T)0 : coefficients<T>(j, k)[at + i * step];
  return r;
}

template <class T, int V, bool GRADIENT>
static __global__ void __launch_bounds__(HM_BLOCK, 2) result_rows(channel_job j) {
  const hm_channel_plan &p = j.p;
  const uint32_t lanes = (uint32_t)j.lanes, tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes,
                 high = HM_BLOCK / lanes;
  const uint32_t tiles = (uint32_t)((p.c / V + lanes - 1) / lanes), parts = (uint32_t)p.parts;
  for (uint32_t u = blockIdx.x; u < (uint32_t)p.images * parts * tiles; u += gridDim.x) {
    const uint32_t unit = u / tiles, image = unit / parts, k = unit - image * parts;
    const int64_t c = ((int64_t)(u - unit * tiles) * lanes + tx) * V;
    if (c >= p.c) continue;
    const channel_run<T, V> r = run_of<T, V, GRADIENT>(j, image, c, 1);
    const int64_t base = ((int64_t)image * p.pixels + k * p.part) * p.c + c;
    const int64_t end = k + 1 < parts ? p.part : p.pixels - k * p.part;
    for (int64_t i = ty; i < end; i += high) finish_run<T, V, GRADIENT>(j, base + i * p.c, r);
  }
}

template <class T, int V, bool GRADIENT>
static __global__ void __launch_bounds__(HM_BLOCK, 2) result_planes(channel_job j) {
  const hm_channel_plan &p = j.p;
  const uint32_t lanes = (uint32_t)j.lanes, tx = threadIdx.x & (lanes - 1), c = (uint32_t)p.c;
  for (uint32_t u = blockIdx.x * (HM_BLOCK / lanes) + threadIdx.x / lanes; u < (uint32_t)p.images * c;
       u += gridDim.x * (HM_BLOCK / lanes)) {
    const uint32_t image = u / c;
    const channel_run<T, V> r = run_of<T, V, GRADIENT>(j, image, u - image * c, 0);
    for (int64_t i = (int64_t)tx * V; i < p.pixels; i += (int64_t)lanes * V)
      finish_run<T, V, GRADIENT>(j, (int64_t)u * p.pixels + i, r);
  }
}

/* ====== Launching ====== */

/* The smallest power of two that is not below n, at most `most`. */
static int32_t lanes_for(int64_t n, int32_t most) {
  int32_t lanes = 1;
  while (lanes < n && lanes < most) lanes *= 2;
  return lanes;
}

template <class R> static int launch_parts(channel_job &j, const char *name, void *stream) {
  const hm_channel_plan &p = j.p;
  if (p.rows) {
    j.lanes = lanes_for(p.c, HM_WARP);
    const unsigned blocks = hm_blocks(p.images * p.parts * ((p.c + j.lanes - 1) / j.lanes), 1);
    return HM_RUN(name, (part_rows<R>), blocks, HM_BLOCK, 0, stream, j);
  }
  if (p.pixels <= 256)
    return HM_RUN(name, (part_planes<R, HM_WARP>), hm_blocks(p.images * p.c, HM_WARPS), HM_BLOCK, 0, stream, j);
  return HM_RUN(name, (part_planes<R, HM_BLOCK>), hm_blocks(p.images * p.c, 1), HM_BLOCK, 0, stream, j);
}

template <class T, int V, bool GRADIENT> static int launch_result(channel_job &j, const char *name, void *stream) {
  const hm_channel_plan &p = j.p;
  j.lanes = lanes_for((p.rows ? p.c : p.pixels) / V, HM_BLOCK);
  if (p.rows) {
    const unsigned blocks = hm_blocks(p.images * p.parts * ((p.c / V + j.lanes - 1) / j.lanes), 1);
    return HM_RUN(name, (result_rows<T, V, GRADIENT>), blocks, HM_BLOCK, 0, stream, j);
  }
  const unsigned blocks = hm_blocks(p.images * p.c, HM_BLOCK / j.lanes);
  return HM_RUN(name, (result_planes<T, V, GRADIENT>), blocks, HM_BLOCK, 0, stream, j);
}

/* Four numbers at once where all of it allows. */
template <class T, bool GRADIENT> static int launch_result_of(channel_job &j, const char *name, void *stream) {
  if constexpr (sizeof(T) == 4) {
    const bool take = hm_runs_take(j.x_dtype) && hm_runs_take(j.out_dtype) && (!GRADIENT || hm_runs_take(j.g_dtype));
    const bool align = hm_runs_align(j.x, j.x_dtype, 4) && hm_runs_align(j.out, j.out_dtype, 4) &&
                       (!GRADIENT || hm_runs_align(j.g, j.g_dtype, 4));
    if (take && align && (j.p.rows ? j.p.c : j.p.pixels) % 4 == 0)
      return launch_result<T, 4, GRADIENT>(j, name, stream);
  }
  return launch_result<T, 1, GRADIENT>(j, name, stream);
}

static unsigned warps_for(int64_t n) { return hm_blocks(n, HM_WARPS); }

template <class T> static int forward(channel_job &j, const char *name, void *stream) {
  const hm_channel_plan &p = j.p;
  const int64_t units = p.images * p.parts;
  int status = HM_OK;
  if (p.sets * p.groups == 0 || p.c == 0) return HM_OK;
  if (j.training && units > 0) status = launch_parts<take_moments<T>>(j, name, stream);
  if (status == HM_OK) status = HM_RUN(name, (finish_moments<T>), warps_for(p.sets * p.groups), HM_BLOCK, 0, stream, j);
  return status || units == 0 ? status : launch_result_of<T, false>(j, name, stream);
}

template <class T> static int backward(channel_job &j, const char *name, void *stream) {
  const hm_channel_plan &p = j.p;
  const int64_t statistics = p.sets * p.groups;
  if (p.c == 0) return HM_OK;
  int status = HM_OK;
  if (p.images * p.parts > 0) {
    status = HM_RUN(name, (recall_coefficients<T>), warps_for(statistics), HM_BLOCK, 0, stream, j);
    if (status == HM_OK) status = launch_parts<take_sums<T>>(j, name, stream);
    if (status == HM_OK && !j.plain)
      status = HM_RUN(name, (finish_sums<T>), warps_for(statistics), HM_BLOCK, 0, stream, j);
  }
  if (status == HM_OK) status = HM_RUN(name, (finish_weights<T>), warps_for(p.c), HM_BLOCK, 0, stream, j);
  return status || p.images * p.parts == 0 ? status : launch_result_of<T, true>(j, name, stream);
}

/* ====== Entry ====== */

static bool is_batch(int op) { return op == HM_OP_BATCH_NORM || op == HM_OP_BATCH_NORM_BACKWARD; }
static bool is_backward(int op) { return op == HM_OP_BATCH_NORM_BACKWARD || op == HM_OP_GROUP_NORM_BACKWARD; }

static hm_channel_plan plan_of(const hm_kernel_call *call) {
  return hm__channel_plan(&call->in[is_backward(call->op)], call->attr[0].i, is_batch(call->op), 32768, 64, 1024);
}

static int64_t stat_numbers(const hm_channel_plan *p) { return p->images * p->parts * 2 * p->c; }

extern "C" int hm_cuda_channel_norm_workspace(const hm_kernel_call *call, size_t *bytes) {
  const hm_channel_plan p = plan_of(call);
  *bytes = (size_t)(stat_numbers(&p) + COEFFICIENTS * p.sets * p.c) * (call->compute == HM_F64 ? 8 : 4);
  return HM_OK;
}

static void give(const hm_view *v, const void **data, int32_t *dtype) {
  const bool absent = v->flags & HM_VIEW_ABSENT;
  *data = absent ? NULL : v->data;
  *dtype = absent ? (int32_t)HM_F32 : v->dtype;
}

/* Where inputs and outputs lie; forward: y, mean, rstd.  Backward: dx, dweight, dbias. */
static void fill_job(channel_job *j, const hm_kernel_call *call) {
  const bool back = is_backward(call->op), batch = is_batch(call->op);
  const hm_view *in = call->in, *out = call->out, *mean = back ? &in[batch ? 4 : 3] : &out[1];
  j->x = in[back].data, j->x_dtype = in[back].dtype;
  j->out = out[0].data, j->out_dtype = out[0].dtype;
  if (back) j->g = in[0].data, j->g_dtype = in[0].dtype;
  give(&in[back + 1], &j->weight, &j->weight_dtype);
  if (batch || !back) give(&in[back + 2], &j->bias, &j->bias_dtype);
  j->mean = mean[0].data, j->mean_dtype = mean[0].dtype;
  j->rstd = mean[1].data, j->rstd_dtype = mean[1].dtype;
  j->dweight = out[1].data, j->dbias = out[2].data, j->stat_dtype = out[1].dtype;
  j->training = true;
  if (!back && batch) {
    const void *data[2];
    for (int k = 0; k < 2; k++) give(&in[3 + k], &data[k], &j->running_dtype[k]);
    j->running_mean = const_cast<void *>(data[0]), j->running_var = const_cast<void *>(data[1]);
    j->training = call->attr[0].i != 0;
  }
  if (!back) j->eps = call->attr[batch ? 2 : 1].f;
  if (!back && batch) j->momentum = call->attr[1].f;
  j->relu = batch && call->attr[back ? 1 : 3].i != 0;
  j->plain = batch && back && call->attr[0].i == 0;
}

/* Kernels count their units of work in 32 bits. */
static bool is_too_large(const hm_channel_plan &p) {
  return (p.rows ? p.images * p.parts * ((p.c + HM_WARP - 1) / HM_WARP) : p.images * p.c) >= HM_CUDA_PIECE;
}

extern "C" int hm_cuda_channel_norm(const hm_kernel_call *call) {
  channel_job j;
  memset(&j, 0, sizeof j);
  j.p = plan_of(call);
  fill_job(&j, call);
  const int64_t size = call->compute == HM_F64 ? 8 : 4;
  char *at = static_cast<char *>(call->workspace);
  j.stat = at;
  at += stat_numbers(&j.p) * size;
  for (int k = 0; k < COEFFICIENTS; k++) j.coefficient[k] = at + k * j.p.sets * j.p.c * size;
  const char *name = is_batch(call->op) ? "batch_norm" : "group_norm";
  if (is_too_large(j.p)) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: 2^31 images times channels or more", name);
  if (call->compute == HM_F64)
    return is_backward(call->op) ? backward<double>(j, name, call->stream) : forward<double>(j, name, call->stream);
  return is_backward(call->op) ? backward<float>(j, name, call->stream) : forward<float>(j, name, call->stream);
}

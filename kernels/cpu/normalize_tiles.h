/*
 * normalize_tiles.h -- the arithmetic of the normalizations on dense tiles of one type.
 *
 * Included by normalize.c and rownorm.c, once for each type that is computed in, with HM_TYPE (float, double) and HM_TILE(name)
 * (name_f32, name_f64) defined.  Everything is static.
 *
 * A tile is `rows` rows of `width` numbers, `pitch` apart.  Every column has numbers of its own (mean, scale ...), and sums are kept by
 * column, so that the loops over columns become vectors in one order of additions for every instruction set.
 */

/* Rows that are taken together: four loads for one pass over the sums. */
#define HM_FOUR(at, pitch) at, at + (pitch), at + 2 * (pitch), at + 3 * (pitch)

/* sum += x - shift, square += (x - shift)^2, by column. */
static void HM_TILE(tile_moments)(const HM_TYPE *restrict x, int64_t pitch, int64_t rows, int64_t width,
                                  const HM_TYPE *restrict shift, HM_TYPE *restrict sum, HM_TYPE *restrict square) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const HM_TYPE *const row[4] = {HM_FOUR(x + r * pitch, pitch)};
    const HM_TYPE *restrict x0 = row[0], *restrict x1 = row[1], *restrict x2 = row[2], *restrict x3 = row[3];
    for (int64_t c = 0; c < width; c++) {
      const HM_TYPE k = shift[c], d0 = x0[c] - k, d1 = x1[c] - k, d2 = x2[c] - k, d3 = x3[c] - k;
      sum[c] += (d0 + d1) + (d2 + d3);
      square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < rows; r++)
    for (int64_t c = 0; c < width; c++) {
      const HM_TYPE d = x[r * pitch + c] - shift[c];
      sum[c] += d;
      square[c] += d * d;
    }
}

/* y = (x - mean) * scale + bias, with relu: y < 0 ? 0 : y.  y may be x. */
static void HM_TILE(tile_apply)(HM_TYPE *y, int64_t y_pitch, const HM_TYPE *x, int64_t pitch, int64_t rows,
                                int64_t width, const HM_TYPE *restrict mean, const HM_TYPE *restrict scale,
                                const HM_TYPE *restrict bias, bool relu) {
  for (int64_t r = 0; r < rows; r++) {
    const HM_TYPE *const from = x + r * pitch;
    HM_TYPE *const to = y + r * y_pitch;
    if (relu) {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        const HM_TYPE z = (from[c] - mean[c]) * scale[c] + bias[c];
        to[c] = z < 0 ? 0 : z;
      }
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) to[c] = (from[c] - mean[c]) * scale[c] + bias[c];
    }
  }
}

/* What of the gradient passes the relu of tile_apply. */
#define HM_PASSED(g, d, c) ((d)*scale[c] + bias[c] <= 0 ? 0 : (g))

/* sum += g, dot += g * (x - mean), by column; with relu g is 0 where the result was not above 0. */
static void HM_TILE(tile_sums)(const HM_TYPE *restrict g, int64_t g_pitch, const HM_TYPE *restrict x, int64_t pitch,
                               int64_t rows, int64_t width, const HM_TYPE *restrict mean, const HM_TYPE *restrict scale,
                               const HM_TYPE *restrict bias, bool relu, HM_TYPE *restrict sum, HM_TYPE *restrict dot) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const HM_TYPE *restrict x0 = x + r * pitch, *restrict x1 = x0 + pitch;
    const HM_TYPE *restrict g0 = g + r * g_pitch, *restrict g1 = g0 + g_pitch;
    if (relu)
      for (int64_t c = 0; c < width; c++) {
        const HM_TYPE d0 = x0[c] - mean[c], d1 = x1[c] - mean[c];
        const HM_TYPE a0 = g0[c], a1 = g1[c]; /* read in any case, so that the choice is one of registers */
        const HM_TYPE p0 = HM_PASSED(a0, d0, c), p1 = HM_PASSED(a1, d1, c);
        sum[c] += p0 + p1;
        dot[c] += p0 * d0 + p1 * d1;
      }
    else
      for (int64_t c = 0; c < width; c++) {
        const HM_TYPE d0 = x0[c] - mean[c], d1 = x1[c] - mean[c];
        sum[c] += g0[c] + g1[c];
        dot[c] += g0[c] * d0 + g1[c] * d1;
      }
  }
  for (; r < rows; r++)
    for (int64_t c = 0; c < width; c++) {
      const HM_TYPE d = x[r * pitch + c] - mean[c];
      const HM_TYPE p = relu ? HM_PASSED(g[r * g_pitch + c], d, c) : g[r * g_pitch + c];
      sum[c] += p;
      dot[c] += p * d;
    }
}

/* y = g * scale - (less + (x - mean) * tilt); plain: y = g * scale.  relu as in tile_sums.  y may be x or g. */
static void HM_TILE(tile_gradient)(HM_TYPE *y, int64_t y_pitch, const HM_TYPE *g, int64_t g_pitch, const HM_TYPE *x,
                                   int64_t pitch, int64_t rows, int64_t width, const HM_TYPE *restrict mean,
                                   const HM_TYPE *restrict scale, const HM_TYPE *restrict bias,
                                   const HM_TYPE *restrict less, const HM_TYPE *restrict tilt, bool relu, bool plain) {
  for (int64_t r = 0; r < rows; r++) {
    const HM_TYPE *const gr = g + r * g_pitch, *const xr = x + r * pitch;
    HM_TYPE *const to = y + r * y_pitch;
    if (relu && plain) {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        const HM_TYPE d = xr[c] - mean[c], a = gr[c];
        to[c] = HM_PASSED(a, d, c) * scale[c];
      }
    } else if (plain) {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) to[c] = gr[c] * scale[c];
    } else if (relu) {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        const HM_TYPE d = xr[c] - mean[c], a = gr[c];
        to[c] = HM_PASSED(a, d, c) * scale[c] - (less[c] + d * tilt[c]);
      }
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) to[c] = gr[c] * scale[c] - (less[c] + (xr[c] - mean[c]) * tilt[c]);
    }
  }
}

/* `n` more numbers behind shift (the mean of the `before` so far): shift becomes the mean of all, spread the sum of squares about it.
 * sum and square of the new ones are used up. */
static void HM_TILE(tile_join)(HM_TYPE *restrict shift, HM_TYPE *restrict spread, HM_TYPE *restrict sum,
                               HM_TYPE *restrict square, int64_t width, double before, double n) {
  const HM_TYPE one = (HM_TYPE)(1 / n), part = (HM_TYPE)(n / (before + n)), both = (HM_TYPE)(n * before / (before + n));
  for (int64_t c = 0; c < width; c++) {
    const HM_TYPE d = sum[c] * one;
    spread[c] += (square[c] - sum[c] * d) + d * d * both;
    shift[c] += d * part;
    sum[c] = square[c] = 0;
  }
}

#undef HM_FOUR
#undef HM_PASSED

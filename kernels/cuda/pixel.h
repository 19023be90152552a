/*
 * pixel.h -- one thread for each element of an image [N, C, H, W], in the order of its memory.
 *
 * Neighbouring threads then read and write neighbours in channels-last and in row-major alike.  Included by pool.cu and resample.cu.
 * Owns nothing.
 */
#ifndef HM_CUDA_PIXEL_H
#define HM_CUDA_PIXEL_H

#include "view.h"

/* A piece of an image. */
struct hm_pixels {
  hm_walk<4> walk; /* offsets are the coordinates n, c, y, x */
  int64_t first[4];
};

/* Coordinates of element u of the piece. */
HM_DEV void hm_pixel(const hm_pixels &p, uint32_t u, int64_t (&at)[4]) {
  hm_offsets(p.walk, u, at);
  for (int k = 0; k < 4; k++) at[k] += p.first[k];
}

HM_DEV int64_t hm_at(const int64_t *stride, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
}

/* Calls run() with *p set to one piece of the image after the other. */
template <class F> static int hm_each_pixels(const hm_view *image, hm_pixels *p, F run) {
  hm_view coordinate[4];
  for (int k = 0; k < 4; k++) { /* the coordinate along dim k as if it were memory */
    coordinate[k] = *image;
    for (int d = 0; d < 4; d++) coordinate[k].stride[d] = d == k;
  }
  hm_loop loop;
  if (hm__loop_make(&loop, image, 4, coordinate) == 0) return HM_OK;
  int64_t base[5] = {0};
  return hm_each_piece(&loop, 5, base, [&](const hm_loop &l, const int64_t *at) {
    hm_loop coordinates = l;
    for (int k = 0; k < 4; k++)
      memcpy(coordinates.stride[k], l.stride[k + 1], sizeof l.stride[k]), p->first[k] = at[k + 1];
    p->walk = hm_make_walk<4>(&coordinates);
    return run();
  });
}

#endif

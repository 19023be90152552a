/*
 * tiles.h -- the generated formulas as loops over contiguous elements (scripts/gen/emit_tiles.lua).
 *
 * Three types of loop for each elementwise op.  The float32 loops of first derivatives and values are hot: elementwise.c compiles them once
 * per instruction set.  The rest (float64, int64, second derivatives) is compiled once, in tiles.c.  All give the same bits.
 */
#ifndef HM_CPU_TILES_H
#define HM_CPU_TILES_H

#include "../kernels.h"

typedef void (*hm_tile_f32)(int64_t n, float *o, const float *const *a, const hm_attr *attr);
typedef void (*hm_tile_f64)(int64_t n, double *o, const double *const *a, const hm_attr *attr);
typedef void (*hm_tile_i64)(int64_t n, int64_t *o, const int64_t *const *a, const hm_attr *attr);

/* The loops of one op; NULL where there is none. */
typedef struct hm_tile {
  hm_tile_f32 f32;
  hm_tile_f64 f64;
  hm_tile_i64 i64;
} hm_tile;

/* By op; f32 is NULL where the loop is a hot one. */
extern const hm_tile hm_cold_tiles[HM_OP_COUNT];

#endif

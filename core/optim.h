/*
 * optim.h -- private to core: what scaler.c needs of an optimizer beyond halfmoon.h.
 *
 * The scaler works in two passes over all parameters at once.  It gathers the gradients (hm__optim_collect), lets the
 * backend check or unscale them (hm__optim_run), decides, and has the update made (hm__optim_apply).  All tables live
 * in the optimizer and are reused: a loop in its steady state allocates nothing here.
 */
#ifndef HM_CORE_OPTIM_H
#define HM_CORE_OPTIM_H

#include "op.h"

/* Checks every gradient of a parameter that wants one (shape, dtype, device), makes it dense in its parameter's element
 * order, and fills the item table.  *n is the number of items; 0: no parameter has a gradient.  On failure no
 * gradient's value has changed. */
int hm__optim_collect(hm_optim *o, int *n);
/* The parameter index of item i of the last collect. */
int hm__optim_item_param(const hm_optim *o, int i);
/* The gradient of item i of the last collect, borrowed. */
hm_tensor *hm__optim_item_grad(const hm_optim *o, int i);
/* Runs HM_MULTI_CHECK, HM_MULTI_UNSCALE or HM_MULTI_SCALE over the items of the last collect; *stat (may be NULL)
 * borrows one entry per item, valid until the next run.  UNSCALE and SCALE mark the gradients as written. */
int hm__optim_run(hm_optim *o, hm_multi_op op, double inv_scale, double grad_mul, const hm_multi_stat **stat);
/* hm__optim_run with CHECK or UNSCALE, which also counts exponents: *histogram borrows HM_HISTOGRAM counts per item,
 * valid until the next one. */
int hm__optim_count(hm_optim *o, hm_multi_op op, double inv_scale, const hm_multi_stat **stat,
                    const int64_t **histogram);
/* Pass 2: collects anew, makes missing state, and updates every parameter with a gradient: g = grad * inv_scale *
 * grad_mul, also written back to .grad.  Step counts advance, versions are bumped, a current low-precision shadow is
 * refreshed. */
int hm__optim_apply(hm_optim *o, double inv_scale, double grad_mul);
/* The device of all items of the last collect; -1 when they lie on several. */
int hm__optim_device(const hm_optim *o);
/* hm__optim_run with HM_MULTI_CHECK or HM_MULTI_UNSCALE, without a wait: what is found stays on the device. */
int hm__optim_late_run(hm_optim *o, hm_multi_op op, const hm_late *late);
/* hm__optim_apply without a wait.  late: cell, found, norm and max_norm; the rest is filled in.  Step counts stand still
 * on the host until hm_optim_settle. */
int hm__optim_late_apply(hm_optim *o, const hm_late *late);
/* The clipping coefficient for a total norm: max_norm / (norm + 1e-6), at most 1; NaN stays NaN. */
double hm__clip_coefficient(double norm, double max_norm);

#endif

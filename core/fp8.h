/*
 * fp8.h -- private to core: what fp8.c (products on 8-bit operands, emulated) offers dispatch.c and autocast.c.
 */
#ifndef HM_CORE_FP8_H
#define HM_CORE_FP8_H

#include "op.h"

/* Is the mode inside an enabled region of amp.autocast("fp8")? */
static inline bool hm__fp8_on(const hm_mode *mode) { return mode->autocast && mode->low == HM_F8_E4M3; }

/* Puts the rounded copy in the place of each factor of a product, which is float32 by now; c->fp8 is the product's site then (owned by the call).
 * Other ops are left alone.  HM_ERR_UNSUPPORTED on devices other than the CPU. */
int hm__fp8_operands(hm_opcall *c);
/* After the call was recorded: the gradient that arrives at the result will be rounded, too. */
int hm__fp8_gradient(hm_opcall *c);
/* Gives up the call's hold on its site; NULL is ignored. */
void hm__fp8_site_release(struct hm_fp8_site *site);

#endif

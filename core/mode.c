/*
 * mode.c -- which mode (gradients, autocast) the calling thread is in.
 *
 * A mode is plain data that the binding keeps, one for each coroutine; here lies only the pointer to the current one.
 * Each thread has a default mode of its own, so that code which never switches has gradients on and autocast off.
 */
#include "alloc.h"

static HM_FAST_TLS hm_mode
    own_mode = {.grad = true, .autocast = false, .cache = true, .low = HM_F16, .backward_dtype = HM_NONE, .cls = NULL};
static HM_FAST_TLS hm_mode *current; /* borrowed; NULL stands for own_mode */

hm_mode *hm_mode_current(void) { return current ? current : &own_mode; }

void hm_mode_switch(hm_mode *mode) { current = mode; }

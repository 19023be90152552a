/*
 * tiles.c -- the elementwise loops that are compiled once, for the plainest instruction set: float64, int64 and second derivatives.
 *
 * They serve gradient checks and counting, not training steps; three copies would be most of the library.  Called through elementwise.c.
 */
#include "../math.h"
#include "tiles.h"

#include "tiles_cold.h"

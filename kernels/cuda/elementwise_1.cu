/* elementwise_1.cu -- part 1 of the elementwise formulas; see elementwise_part.h. */
#define HM_TILES_PART 1
#include "elementwise_part.h"

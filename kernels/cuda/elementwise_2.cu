/* elementwise_2.cu -- part 2 of the elementwise formulas; see elementwise_part.h. */
#define HM_TILES_PART 2
#include "elementwise_part.h"

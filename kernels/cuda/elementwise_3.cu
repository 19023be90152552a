/* elementwise_3.cu -- part 3 of the elementwise formulas; see elementwise_part.h. */
#define HM_TILES_PART 3
#include "elementwise_part.h"

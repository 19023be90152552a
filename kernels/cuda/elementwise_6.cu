/* elementwise_6.cu -- part 6 of the elementwise formulas; see elementwise_part.h. */
#define HM_TILES_PART 6
#include "elementwise_part.h"

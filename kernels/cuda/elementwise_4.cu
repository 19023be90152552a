/* elementwise_4.cu -- part 4 of the elementwise formulas; see elementwise_part.h. */
#define HM_TILES_PART 4
#include "elementwise_part.h"

/* elementwise_5.cu -- part 5 of the elementwise formulas; see elementwise_part.h. */
#define HM_TILES_PART 5
#include "elementwise_part.h"

/*
 * isa.c -- the table of one instruction set's kernels.
 *
 * Compiled once per instruction set, with the flags of its variant.  backend.c picks one of the tables when it opens.
 */
#include "isa.h"

#define HM_ISA_TEXT_(isa) #isa
#define HM_ISA_TEXT(isa) HM_ISA_TEXT_(isa)

const hm_isa HM_ISA_FN(hm_isa) = {
    .name = HM_ISA_TEXT(HM_ISA),
    .convert = HM_ISA_FN(hm_cpu_convert),
    .elementwise = HM_ISA_FN(hm_cpu_elementwise),
    .expression = HM_ISA_FN(hm_cpu_expression),
    .copy = HM_ISA_FN(hm_cpu_copy),
    .fill = HM_ISA_FN(hm_cpu_fill),
    .random = HM_ISA_FN(hm_cpu_random),
    .reduce = HM_ISA_FN(hm_cpu_reduce),
    .norm = HM_ISA_FN(hm_cpu_norm),
    .loss = HM_ISA_FN(hm_cpu_loss),
    .attention = HM_ISA_FN(hm_cpu_attention),
    .pool = HM_ISA_FN(hm_cpu_pool),
    .multi_tensor = HM_ISA_FN(hm_cpu_multi_tensor),
};

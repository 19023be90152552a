/*
 * vector_types.h -- CUDA's small vectors and dim3, for the test double.
 *
 * Part of kernels/emu, a test double: it shows no speed, no memory model, no real cuBLAS.  Found on the include path in place of the
 * toolkit's header of that name.  Holds what our code uses and no more.
 */
#ifndef HM_EMU_VECTOR_TYPES_H
#define HM_EMU_VECTOR_TYPES_H

#define HM_EMU_VECTOR2(name, type, align)                                                                              \
  typedef struct __attribute__((aligned(align))) name {                                                                \
    type x, y;                                                                                                         \
  } name;
#define HM_EMU_VECTOR4(name, type, align)                                                                              \
  typedef struct __attribute__((aligned(align))) name {                                                                \
    type x, y, z, w;                                                                                                   \
  } name;

HM_EMU_VECTOR2(char2, signed char, 2)
HM_EMU_VECTOR4(char4, signed char, 4)
HM_EMU_VECTOR2(uchar2, unsigned char, 2)
HM_EMU_VECTOR4(uchar4, unsigned char, 4)
HM_EMU_VECTOR2(ushort2, unsigned short, 4)
HM_EMU_VECTOR4(ushort4, unsigned short, 8)
HM_EMU_VECTOR2(int2, int, 8)
HM_EMU_VECTOR4(int4, int, 16)
HM_EMU_VECTOR2(uint2, unsigned int, 8)
HM_EMU_VECTOR4(uint4, unsigned int, 16)
HM_EMU_VECTOR2(float2, float, 8)
HM_EMU_VECTOR4(float4, float, 16)
HM_EMU_VECTOR2(double2, double, 16)
HM_EMU_VECTOR2(longlong2, long long, 16)
HM_EMU_VECTOR2(ulonglong2, unsigned long long, 16)

typedef struct uint3 {
  unsigned int x, y, z;
} uint3;

typedef struct dim3 {
  unsigned int x, y, z;
#ifdef __cplusplus
  constexpr dim3(unsigned int vx = 1, unsigned int vy = 1, unsigned int vz = 1) : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
#endif
} dim3;

#undef HM_EMU_VECTOR2
#undef HM_EMU_VECTOR4

#endif

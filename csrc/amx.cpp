// AVX-512 with BF16 and AMX: avx512.inl, with bfloat16 products on tiles.
#include "kernels.h"

#if defined(ONECARD_HAS_AMX)
#define ONECARD_AVX512_BF16
#define ONECARD_AMX
#include "avx512.inl"
#endif

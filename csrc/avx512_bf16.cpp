// AVX-512 with BF16: avx512.cpp, with attention in bfloat16 on the dot-product instruction.
#define ONECARD_AVX512_BF16
#include "avx512.cpp"

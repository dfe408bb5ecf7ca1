// AVX-512 with BF16: avx512.inl, with products and attention in bfloat16 on the dot-product instruction.
#define ONECARD_AVX512_BF16
#include "avx512.inl"

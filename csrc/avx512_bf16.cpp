// AVX-512 with BF16: avx512.inl, with the dot-product instruction for bfloat16 products and attention.
#define ONECARD_AVX512_BF16
#include "avx512.inl"

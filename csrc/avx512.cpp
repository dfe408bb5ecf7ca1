// AVX-512 (F, BW, VL, DQ).
#include "avx512.inl"

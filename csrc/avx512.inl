// AVX-512: sixteen floats per register; a look-up in sixteen entries is one instruction. avx512.cpp, avx512_bf16.cpp
// and amx.cpp compile this file, each for its instruction set.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "parallel.h"

#if defined(ONECARD_AMX) && defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(ONECARD_AMX)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
#elif defined(ONECARD_AVX512_BF16) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(ONECARD_AVX512_BF16)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace onecard {
namespace {

#include "exp.inl"

struct Isa {
    using X = float;
    static constexpr int kRows = 4;

    using V = __m512;
    static constexpr int kLanes = 16, kColumns = 4;
    static V set1(float x) { return _mm512_set1_ps(x); }
    static void store(float* x, V v) { _mm512_storeu_ps(x, v); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    static V divide(V a, V b) { return _mm512_div_ps(a, b); }
    static V max(V a, V b) { return _mm512_max_ps(a, b); }
    static V fmadd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static float reduce_add(V v) { return _mm512_reduce_add_ps(v); }
    static float reduce_max(V v) { return _mm512_reduce_max_ps(v); }
    // 2^n 2^f with n the nearest integer to x log2(e). Below 2^-126 it is 0: a denormal result costs a hundred cycles.
    static V exp(V x) {
        V t = mul(x, set1(1.44269504f));
        __mmask16 normal = _mm512_cmp_ps_mask(t, set1(-126.0f), _CMP_NLT_UQ);
        t = max(set1(-126.0f), t);  // NaN is its second operand
        V n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_maskz_scalef_ps(normal, power_of_two<Isa>(_mm512_sub_ps(t, n)), n);
    }

    static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
    static __m512 load(const BFloat16* x) {
        __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static __m512 load(const Float16* x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }

    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        __m512i most = _mm512_setzero_si512(), mask = _mm512_set1_epi32(0x7FFFFFFF);
        for (int64_t i = 0; i < n; i += 16) {
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load(x + i)), mask));
        }
        return _mm512_reduce_max_epu32(most);
    }

    // Counts how many of the fifteen bounds are below each value: four steps of a binary search in one register.
    static __m512i intervals(__m512 scaled, __m512 bounds) {
        __m512i found = _mm512_setzero_si512();
        for (int step = 8; step > 0; step /= 2) {
            __m512 bound = _mm512_permutexvar_ps(_mm512_add_epi32(found, _mm512_set1_epi32(step - 1)), bounds);
            __mmask16 above = _mm512_cmp_ps_mask(scaled, bound, _CMP_GT_OQ);
            found = _mm512_mask_add_epi32(found, above, found, _mm512_set1_epi32(step));
        }
        return found;
    }

    template <class T>
    static void encode(const T* x, int64_t n, float inverse, const Quantization& q, uint8_t* out) {
        __m512 bounds = _mm512_maskz_loadu_ps(0x7FFF, q.bounds), by = _mm512_set1_ps(inverse);
        __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.order)), weights = _mm_set1_epi16(0x0110);
        for (int64_t i = 0; i < n; i += 16) {
            __m512i found = intervals(_mm512_mul_ps(load(x + i), by), bounds);
            __m128i codes = _mm_shuffle_epi8(order, _mm512_cvtepi32_epi8(found));
            __m128i pairs = _mm_maddubs_epi16(codes, weights);  // 16 * first + second
            _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm_packus_epi16(pairs, pairs));
        }
    }

    static void decode(const uint8_t* bytes, int64_t n, const float* levels, float scale, float* out, bool) {
        __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
        for (int64_t i = 0; i < n; i += 16) {
            __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i / 2));
            __m512i wide = _mm512_cvtepu8_epi64(eight);
            __m512i codes = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(codes, table));
        }
    }

    static __m256i narrow(__m512 x, BFloat16) {  // in integers: vcvtneps2bf16 would flush denormals
        __m512i bits = _mm512_castps_si512(x);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    }
    static __m256i narrow(__m512 x, Float16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

    template <class T>
    static void store_as(T* x, V v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(v, T{}));
    }
    static void store_as(float* x, V v) { _mm512_storeu_ps(x, v); }

    // The table is in the register twice, so that the fifth bit of an index does not matter. `stream`
    // bypasses the caches and needs out aligned to 64 bytes.
    template <class T>
    static void decode(const uint8_t* bytes, int64_t n, const float* levels, float scale, T* out, bool stream) {
        __m256i half = narrow(_mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale)), T{});
        __m512i table = _mm512_broadcast_i64x4(half);
        for (int64_t i = 0; i < n; i += 32) {
            __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i / 2)));
            __m512i codes = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
            __m512i values = _mm512_permutexvar_epi16(codes, table);
            if (stream) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), values);
            } else {
                _mm512_storeu_si512(out + i, values);
            }
        }
    }

    // The scales of a chunk's sixteen words, eight weights each.
    static __m512 chunk_scales(const float* scales, int64_t blocksize, int64_t chunk, int64_t left) {
        if (blocksize == 64) {
            const float* s = scales + 2 * chunk;  // no division: it would take as long as the chunk
            return left < 128 ? _mm512_set1_ps(s[0])
                              : _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(s[0]), _mm512_set1_ps(s[1]));
        }
        if (blocksize >= 128) return _mm512_set1_ps(scales[chunk * 128 / blocksize]);
        if (blocksize == 16) {
            __m512i half = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 1);
            return _mm512_permutexvar_ps(half, _mm512_maskz_loadu_ps(left < 128 ? 0x0F : 0xFF, scales + 8 * chunk));
        }
        const float* s = scales + 4 * chunk;
        __m512 low = _mm512_mask_blend_ps(0x00F0, _mm512_set1_ps(s[0]), _mm512_set1_ps(s[1]));
        if (left < 128) return low;
        low = _mm512_mask_blend_ps(0x0F00, low, _mm512_set1_ps(s[2]));
        return _mm512_mask_blend_ps(0xF000, low, _mm512_set1_ps(s[3]));
    }

    template <int R, int M>
    static void product_tile(const Weight& w, const uint8_t* row, const float* scales, const float* x, int64_t K,
                             float* y, int64_t y_stride) {
        int64_t x_stride = (K + 127) / 128 * 128, blocks = K / w.blocksize;
        __m512 table = _mm512_loadu_ps(w.quant_map), sums[R][M];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < K; k += 128, x += 128) {
            __mmask16 valid = K - k < 128 ? 0x00FF : 0xFFFF;
            __m512i words[R];
            __m512 scale[R], part = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                words[r] = _mm512_maskz_loadu_epi32(valid, row + (r * K + k) / 2);
                _mm_prefetch(reinterpret_cast<const char*>(row + (r * K + k) / 2 + kAhead), _MM_HINT_T0);
                scale[r] = chunk_scales(scales + r * blocks, w.blocksize, k / 128, K - k);
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                if (R * M == 1) {  // the scale is applied to the chunk's sum
                    __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words[0], 4 * j), table);
                    part = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + j * 16), part);
                    continue;
                }
                __m512 x_m[M];
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) x_m[m] = _mm512_loadu_ps(x + m * x_stride + j * 16);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words[r], 4 * j), table);
                    value = _mm512_mul_ps(value, scale[r]);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_fmadd_ps(value, x_m[m], sums[r][m]);
                }
            }
            if (R * M == 1) sums[0][0] = _mm512_fmadd_ps(part, scale[0], sums[0][0]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) y[m * y_stride + r] = _mm512_reduce_add_ps(sums[r][m]);
        }
    }
};

#include "blocks.inl"
#include "attention.inl"
#include "elementwise.inl"
#include "optimizer.inl"
#include "rounding.inl"
#if defined(ONECARD_AVX512_BF16)
#include "bf16.inl"
#endif

void dequantize_and_fence(const Weight& w, Dtype dtype, void* out, bool stream, int64_t begin, int64_t end) {
    dequantize(w, dtype, out, stream, begin, end);
    _mm_sfence();  // makes streamed stores visible before later stores
}

}  // namespace

#if defined(ONECARD_AMX)
const Kernels kAmx = {
    "amx", quantize, dequantize_and_fence, product_bf16, arrange_bf16, attention_forward_amx, attention_backward_amx,
    attention_reduce, cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope, dense_product, adamw_8bit,
    round_columns, choose_scales,
    linear_forward, linear_backward,
};
#elif defined(ONECARD_AVX512_BF16)
const Kernels kAvx512Bf16 = {
    "avx512_bf16", quantize, dequantize_and_fence, product_bf16, arrange_bf16, attention_forward_bf16,
    attention_backward_bf16, attention_reduce, cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward,
    rope, dense_product, adamw_8bit,
    round_columns, choose_scales,
};
#else
const Kernels kAvx512 = {
    "avx512", quantize, dequantize_and_fence, product, arrange, attention_forward, attention_backward,
    attention_reduce, cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope, dense_product, adamw_8bit,
    round_columns, choose_scales,
};
#endif

}  // namespace onecard

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif

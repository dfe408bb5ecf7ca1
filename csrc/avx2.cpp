// AVX2 with FMA and F16C: eight floats per register. A look-up in sixteen entries is one for each byte of an entry.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "convert.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace onecard {
namespace {

#include "exp.inl"

struct Isa {
    using X = float;
    static constexpr int kRows = 2;

    using V = __m256;
    static constexpr int kLanes = 8, kColumns = 2;
    static V set1(float x) { return _mm256_set1_ps(x); }
    static void store(float* x, V v) { _mm256_storeu_ps(x, v); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    static V divide(V a, V b) { return _mm256_div_ps(a, b); }
    static V max(V a, V b) { return _mm256_max_ps(a, b); }
    static V fmadd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce_add(V v) {
        float lanes[8];
        store(lanes, v);
        return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    }
    static float reduce_max(V v) {
        float lanes[8];
        store(lanes, v);
        return *std::max_element(lanes, lanes + 8);
    }
    // Same as in avx512.inl. A result below the smallest normal number is 0, and from 2^128 it is infinite.
    static V exp(V x) {
        V t = mul(x, set1(1.44269504f)), small = _mm256_cmp_ps(t, set1(-126.0f), _CMP_LT_OQ);
        t = _mm256_min_ps(set1(128.0f), max(set1(-126.0f), t));  // NaN is their second operand
        V n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        V result = mul(power_of_two<Isa>(_mm256_sub_ps(t, n)), _mm256_castsi256_ps(exponent));
        return _mm256_andnot_ps(small, result);
    }

    static __m256 load(const float* x) { return _mm256_loadu_ps(x); }
    static __m256 load(const BFloat16* x) {
        __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static __m256 load(const Float16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }

    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        __m256i most = _mm256_setzero_si256(), mask = _mm256_set1_epi32(0x7FFFFFFF);
        for (int64_t i = 0; i < n; i += 8) {
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(load(x + i)), mask));
        }
        uint32_t lanes[8], largest = 0;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
        for (uint32_t lane : lanes) largest = std::max(largest, lane);
        return largest;
    }

    // Counts how many of the fifteen bounds are below each value.
    static __m256i intervals(__m256 scaled, const float* bounds) {
        __m256i found = _mm256_setzero_si256();
        for (int i = 0; i < 15; ++i) {
            __m256 above = _mm256_cmp_ps(scaled, _mm256_broadcast_ss(bounds + i), _CMP_GT_OQ);
            found = _mm256_sub_epi32(found, _mm256_castps_si256(above));
        }
        return found;
    }

    template <class T>
    static void encode(const T* x, int64_t n, float inverse, const Quantization& q, uint8_t* out) {
        __m256 by = _mm256_set1_ps(inverse);
        __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.order)), weights = _mm_set1_epi16(0x0110);
        for (int64_t i = 0; i < n; i += 16) {
            __m256i low = intervals(_mm256_mul_ps(load(x + i), by), q.bounds);
            __m256i high = intervals(_mm256_mul_ps(load(x + i + 8), by), q.bounds);
            __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
            __m128i found = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(order, found), weights);  // 16 * first + second
            _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm_packus_epi16(pairs, pairs));
        }
    }

    // Splits entries of B bytes into B tables of sixteen bytes each.
    template <class T>
    struct Planes {
        __m128i plane[sizeof(T)];

        Planes(const float* levels, float scale) {
            alignas(16) uint8_t bytes[sizeof(T)][16];
            T entries[16];
            narrow(_mm256_mul_ps(_mm256_loadu_ps(levels), _mm256_set1_ps(scale)), entries);
            narrow(_mm256_mul_ps(_mm256_loadu_ps(levels + 8), _mm256_set1_ps(scale)), entries + 8);
            for (int i = 0; i < 16; ++i) {
                const uint8_t* entry = reinterpret_cast<const uint8_t*>(entries + i);
                for (size_t b = 0; b < sizeof(T); ++b) bytes[b][i] = entry[b];
            }
            for (size_t b = 0; b < sizeof(T); ++b) plane[b] = _mm_load_si128(reinterpret_cast<__m128i*>(bytes[b]));
        }
    };

    static void narrow(__m256 x, float* out) { _mm256_storeu_ps(out, x); }
    static void narrow(__m256 x, BFloat16* out) {
        __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(words));
    }
    static void narrow(__m256 x, Float16* out) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    template <class T>
    static void store_as(T* x, V v) {
        narrow(v, x);
    }

    static void look_up(const Planes<float>& table, __m128i codes, float* out) {
        __m128i b0 = _mm_shuffle_epi8(table.plane[0], codes), b1 = _mm_shuffle_epi8(table.plane[1], codes);
        __m128i b2 = _mm_shuffle_epi8(table.plane[2], codes), b3 = _mm_shuffle_epi8(table.plane[3], codes);
        __m128i low0 = _mm_unpacklo_epi8(b0, b1), low1 = _mm_unpackhi_epi8(b0, b1);
        __m128i high0 = _mm_unpacklo_epi8(b2, b3), high1 = _mm_unpackhi_epi8(b2, b3);
        __m128i* to = reinterpret_cast<__m128i*>(out);
        _mm_storeu_si128(to, _mm_unpacklo_epi16(low0, high0));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low0, high0));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(low1, high1));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(low1, high1));
    }
    template <class T>
    static void look_up(const Planes<T>& table, __m128i codes, T* out) {
        __m128i b0 = _mm_shuffle_epi8(table.plane[0], codes), b1 = _mm_shuffle_epi8(table.plane[1], codes);
        __m128i* to = reinterpret_cast<__m128i*>(out);
        _mm_storeu_si128(to, _mm_unpacklo_epi8(b0, b1));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(b0, b1));
    }

    template <class T>
    static void decode(const uint8_t* bytes, int64_t n, const float* levels, float scale, T* out, bool) {
        Planes<T> table(levels, scale);
        __m128i nibble = _mm_set1_epi8(15);
        for (int64_t i = 0; i < n; i += 32) {
            __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i / 2));
            __m128i first = _mm_and_si128(_mm_srli_epi16(both, 4), nibble), second = _mm_and_si128(both, nibble);
            look_up(table, _mm_unpacklo_epi8(first, second), out + i);
            look_up(table, _mm_unpackhi_epi8(first, second), out + i + 16);
        }
    }

    // The scales of half a chunk's eight words, eight weights each.
    static __m256 word_scales(const float* s, int64_t blocksize) {
        if (blocksize >= 64) return _mm256_set1_ps(s[0]);
        if (blocksize == 32) return _mm256_blend_ps(_mm256_set1_ps(s[0]), _mm256_set1_ps(s[1]), 0xF0);
        __m256 four = _mm256_castps128_ps256(_mm_loadu_ps(s));
        return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    }

    // Half a chunk, 64 weights in eight words, at a time.
    template <int R, int M>
    static void product_tile(const Weight& w, const uint8_t* row, const float* scales, const float* x, int64_t K,
                             float* y, int64_t y_stride) {
        int64_t x_stride = (K + 127) / 128 * 128, blocks = K / w.blocksize;
        __m256 low = _mm256_loadu_ps(w.quant_map), high = _mm256_loadu_ps(w.quant_map + 8), sums[R][M];
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = _mm256_setzero_ps();
        }
        for (int64_t k = 0; k < K; k += 64) {
            __m256i words[R];
            __m256 scale[R];
            for (int r = 0; r < R; ++r) {
                words[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + (r * K + k) / 2));
                _mm_prefetch(reinterpret_cast<const char*>(row + (r * K + k) / 2 + kAhead), _MM_HINT_T0);
                scale[r] = word_scales(scales + r * blocks + k / w.blocksize, w.blocksize);
            }
            const float* x_k = x + k / 128 * 128 + (k % 128 ? 8 : 0);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                for (int r = 0; r < R; ++r) {
                    __m256i code = _mm256_srli_epi32(words[r], 4 * j);
                    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(words[r], 28 - 4 * j));  // sign: code >= 8
                    __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                                    _mm256_permutevar8x32_ps(high, code), upper);
                    value = _mm256_mul_ps(value, scale[r]);
                    for (int m = 0; m < M; ++m) {
                        __m256 x_m = _mm256_loadu_ps(x_k + m * x_stride + j * 16);
                        sums[r][m] = _mm256_fmadd_ps(value, x_m, sums[r][m]);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) {
                float v[8];
                _mm256_storeu_ps(v, sums[r][m]);
                y[m * y_stride + r] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
            }
        }
    }
};

#include "blocks.inl"
#include "attention.inl"
#include "elementwise.inl"
#include "optimizer.inl"
#include "rounding.inl"

}  // namespace

const Kernels kAvx2 = {
    "avx2", quantize, dequantize, product, arrange, attention_forward, attention_backward, attention_reduce,
    cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope, dense_product, adamw_8bit,
    round_columns, choose_scales,
};

}  // namespace onecard

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif

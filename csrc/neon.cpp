// NEON, which every 64-bit Arm CPU has: four floats per register. A look-up in sixteen bytes is one instruction, so an
// entry of B bytes is looked up byte by byte and stored interleaved.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "convert.h"
#include "kernels.h"

namespace onecard {
namespace {

#include "exp.inl"

struct Isa {
    using X = float;
    static constexpr int kRows = 2;

    using V = float32x4_t;
    static constexpr int kLanes = 4, kColumns = 4;
    static V set1(float x) { return vdupq_n_f32(x); }
    static void store(float* x, V v) { vst1q_f32(x, v); }
    static V add(V a, V b) { return vaddq_f32(a, b); }
    static V mul(V a, V b) { return vmulq_f32(a, b); }
    static V divide(V a, V b) { return vdivq_f32(a, b); }
    static V max(V a, V b) { return vmaxq_f32(a, b); }
    static V fmadd(V a, V b, V c) { return vfmaq_f32(c, a, b); }
    static float reduce_add(V v) { return vaddvq_f32(v); }
    static float reduce_max(V v) { return vmaxvq_f32(v); }
    // Same as in avx512.inl. A result below the smallest normal number is 0, and from 2^128 it is infinite.
    static V exp(V x) {
        V t = mul(x, set1(1.44269504f));
        uint32x4_t small = vcltq_f32(t, set1(-126.0f));
        t = vminq_f32(max(t, set1(-126.0f)), set1(128.0f));
        V n = vrndnq_f32(t);
        int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
        V result = mul(power_of_two<Isa>(vsubq_f32(t, n)), vreinterpretq_f32_s32(exponent));
        return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(result), small));
    }

    static V load(const float* x) { return vld1q_f32(x); }
    static V load(const BFloat16* x) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x)), 16));
    }
    static V load(const Float16* x) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x))));
    }

    static void store_as(float* x, V v) { vst1q_f32(x, v); }
    static void store_as(BFloat16* x, V v) {
        uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        vst1_u16(reinterpret_cast<uint16_t*>(x), vshrn_n_u32(bits, 16));
    }
    static void store_as(Float16* x, V v) {
        vst1_u16(reinterpret_cast<uint16_t*>(x), vreinterpret_u16_f16(vcvt_f16_f32(v)));
    }

    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        uint32x4_t most = vdupq_n_u32(0), mask = vdupq_n_u32(0x7FFFFFFF);
        for (int64_t i = 0; i < n; i += 4) {
            most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(load(x + i)), mask));
        }
        return vmaxvq_u32(most);
    }

    // Counts how many of the fifteen bounds are below each value.
    static uint16x4_t intervals(V scaled, const float* bounds) {
        uint32x4_t found = vdupq_n_u32(0);
        for (int i = 0; i < 15; ++i) found = vsubq_u32(found, vcgtq_f32(scaled, vdupq_n_f32(bounds[i])));
        return vmovn_u32(found);
    }

    template <class T>
    static uint8x8_t eight_codes(const T* x, V by, const float* bounds, uint8x16_t order) {
        uint16x4_t low = intervals(mul(load(x), by), bounds), high = intervals(mul(load(x + 4), by), bounds);
        return vqtbl1_u8(order, vmovn_u16(vcombine_u16(low, high)));
    }

    template <class T>
    static void encode(const T* x, int64_t n, float inverse, const Quantization& q, uint8_t* out) {
        uint8x16_t order = vld1q_u8(q.order);
        for (int64_t i = 0; i < n; i += 16) {
            uint8x8_t low = eight_codes(x + i, set1(inverse), q.bounds, order);
            uint8x8_t high = eight_codes(x + i + 8, set1(inverse), q.bounds, order);
            vst1_u8(out + i / 2, vorr_u8(vshl_n_u8(vuzp1_u8(low, high), 4), vuzp2_u8(low, high)));
        }
    }

    // Splits sixteen entries of B bytes into B tables of sixteen bytes each.
    template <class T>
    struct Planes {
        uint8x16_t plane[sizeof(T)];

        Planes(const float* levels, float scale) {
            T entries[16];
            uint8_t bytes[16];
            for (int i = 0; i < 16; i += 4) store_as(entries + i, mul(load(levels + i), set1(scale)));
            for (size_t b = 0; b < sizeof(T); ++b) {
                for (int i = 0; i < 16; ++i) bytes[i] = reinterpret_cast<const uint8_t*>(entries + i)[b];
                plane[b] = vld1q_u8(bytes);
            }
        }
    };

    static void look_up(const Planes<float>& table, uint8x16_t codes, float* out) {
        uint8x16x4_t bytes = {{vqtbl1q_u8(table.plane[0], codes), vqtbl1q_u8(table.plane[1], codes),
                               vqtbl1q_u8(table.plane[2], codes), vqtbl1q_u8(table.plane[3], codes)}};
        vst4q_u8(reinterpret_cast<uint8_t*>(out), bytes);
    }
    template <class T>
    static void look_up(const Planes<T>& table, uint8x16_t codes, T* out) {
        uint8x16x2_t bytes = {{vqtbl1q_u8(table.plane[0], codes), vqtbl1q_u8(table.plane[1], codes)}};
        vst2q_u8(reinterpret_cast<uint8_t*>(out), bytes);
    }

    template <class T>
    static void decode(const uint8_t* bytes, int64_t n, const float* levels, float scale, T* out, bool) {
        Planes<T> table(levels, scale);
        for (int64_t i = 0; i < n; i += 32) {
            uint8x16_t both = vld1q_u8(bytes + i / 2);
            uint8x16_t first = vshrq_n_u8(both, 4), second = vandq_u8(both, vdupq_n_u8(15));
            look_up(table, vzip1q_u8(first, second), out + i);
            look_up(table, vzip2q_u8(first, second), out + i + 16);
        }
    }

    // The levels of sixteen codes, four per register, in order.
    static void values(const Planes<float>& table, uint8x16_t codes, V* out) {
        uint8x16_t b0 = vqtbl1q_u8(table.plane[0], codes), b1 = vqtbl1q_u8(table.plane[1], codes);
        uint8x16_t b2 = vqtbl1q_u8(table.plane[2], codes), b3 = vqtbl1q_u8(table.plane[3], codes);
        uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
        uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3)), high1 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
        out[0] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
        out[1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
        out[2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
        out[3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
    }

    // A chunk's 64 bytes as four registers: byte b of each of its sixteen words. Zeros past the row's end.
    static uint8x16x4_t chunk_bytes(const uint8_t* at, int64_t left) {
        if (left >= 128) return vld4q_u8(at);
        uint8_t padded[64] = {};
        std::copy(at, at + left / 2, padded);
        return vld4q_u8(padded);
    }

    template <int R, int M>
    static void product_tile(const Weight& w, const uint8_t* row, const float* scales, const float* x, int64_t K,
                             float* y, int64_t y_stride) {
        constexpr int kParts = R * M == 1 ? 4 : 1;  // separate sums, which do not wait for each other
        int64_t x_stride = (K + 127) / 128 * 128, blocks = K / w.blocksize;
        Planes<float> table(w.quant_map, 1.0f);
        V sums[R][M][kParts];
        for (auto& of_row : sums) {
            for (auto& parts : of_row) std::fill(parts, parts + kParts, set1(0.0f));
        }
        for (int64_t k = 0; k < K; k += 128, x += 128) {
            for (int r = 0; r < R; ++r) {
                const uint8_t* at = row + (r * K + k) / 2;
                __builtin_prefetch(at + kAhead);
                uint8x16x4_t words = chunk_bytes(at, K - k);
                V scale[4];  // of 32 weights each
                for (int q = 0; q < 4; ++q) {
                    int64_t first = k + 32 * q;
                    const float* s = scales + r * blocks + first / w.blocksize;
                    scale[q] = set1(first < K ? s[0] : 0.0f);
                    if (w.blocksize == 16 && first < K) scale[q] = vcombine_f32(vdup_n_f32(s[0]), vdup_n_f32(s[1]));
                }
                for (int j = 0; j < 8; ++j) {
                    uint8x16_t byte = words.val[j / 2];
                    V value[4];
                    values(table, j % 2 ? vshrq_n_u8(byte, 4) : vandq_u8(byte, vdupq_n_u8(15)), value);
                    for (int q = 0; q < 4; ++q) {
                        value[q] = mul(value[q], scale[q]);
                        for (int m = 0; m < M; ++m) {
                            V& sum = sums[r][m][q % kParts];
                            sum = fmadd(value[q], load(x + m * x_stride + j * 16 + 4 * q), sum);
                        }
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) {
                V sum = sums[r][m][0];
                for (int part = 1; part < kParts; ++part) sum = add(sum, sums[r][m][part]);
                y[m * y_stride + r] = reduce_add(sum);
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

const Kernels kNeon = {
    "neon", quantize, dequantize, product, arrange, attention_forward, attention_backward, attention_reduce,
    cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope, dense_product, adamw_8bit,
    round_columns, choose_scales,
};

}  // namespace onecard
#endif

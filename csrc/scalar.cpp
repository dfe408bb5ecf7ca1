// Plain C++: the path for any CPU, and the reference for the other paths.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "convert.h"
#include "kernels.h"

namespace onecard {
namespace {

template <class T>
uint32_t plain_max_abs_bits(const T* x, int64_t n);
inline uint8_t plain_code(float scaled, const Quantization& q);

struct Isa {
    using X = float;
    static constexpr int kRows = 1;

    using V = float;
    static constexpr int kLanes = 1, kColumns = 4;
    static V set1(float x) { return x; }
    template <class T>
    static V load(const T* x) {
        return to_float(*x);
    }
    template <class T>
    static void store_as(T* x, V v) {
        convert(v, *x);
    }
    static void store(float* x, V v) { *x = v; }
    static V add(V a, V b) { return a + b; }
    static V mul(V a, V b) { return a * b; }
    static V divide(V a, V b) { return a / b; }
    static V max(V a, V b) { return std::max(a, b); }
    static V fmadd(V a, V b, V c) { return a * b + c; }
    static V exp(V x) { return std::exp(x); }
    static float reduce_add(V v) { return v; }
    static float reduce_max(V v) { return v; }

    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        return plain_max_abs_bits(x, n);
    }

    template <class T>
    static void encode(const T* x, int64_t n, float inverse, const Quantization& q, uint8_t* out) {
        for (int64_t i = 0; i < n; i += 2) {
            uint8_t high = plain_code(to_float(x[i]) * inverse, q), low = plain_code(to_float(x[i + 1]) * inverse, q);
            out[i / 2] = static_cast<uint8_t>(high << 4 | low);
        }
    }

    template <class T>
    static void decode(const uint8_t* bytes, int64_t n, const float* levels, float scale, T* out, bool) {
        T table[16];
        for (int i = 0; i < 16; ++i) convert(levels[i] * scale, table[i]);
        for (int64_t i = 0; i < n; i += 2) {
            out[i] = table[bytes[i / 2] >> 4];
            out[i + 1] = table[bytes[i / 2] & 15];
        }
    }

    template <int R, int M>
    static void product_tile(const Weight& w, const uint8_t* row, const float* scales, const float* x, int64_t K,
                             float* y, int64_t y_stride) {
        static_assert(R == 1, "one row at a time");
        int64_t x_stride = (K + 127) / 128 * 128;
        float sums[M] = {};
        for (int64_t k = 0; k < K; ++k) {
            uint8_t code = k % 2 ? row[k / 2] & 15 : row[k / 2] >> 4;
            float value = w.quant_map[code] * scales[k / w.blocksize];
            int64_t at = k / 128 * 128 + (k % 8 ^ 1) * 16 + k % 128 / 8;
            for (int m = 0; m < M; ++m) sums[m] += value * x[m * x_stride + at];
        }
        for (int m = 0; m < M; ++m) y[m * y_stride] = sums[m];
    }
};

#include "blocks.inl"
#include "attention.inl"
#include "elementwise.inl"
#include "optimizer.inl"
#include "rounding.inl"

}  // namespace

const Kernels kScalar = {
    "scalar", quantize, dequantize, product, arrange, attention_forward, attention_backward, attention_reduce,
    cross_entropy, rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope, dense_product, adamw_8bit,
    round_columns, choose_scales,
};

}  // namespace onecard

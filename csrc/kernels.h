// The kernels of one instruction set, as a table of functions. Codes, scales, dequantized weights and AdamW's 8-bit
// states have the same bits in every set. Sums differ by their order, within the bounds that tests/kernels/ state.
#pragma once

#include <cstdint>

namespace onecard {

constexpr int64_t kNestedBlock = 256;  // scales that share a scale of double quantization
constexpr int64_t kStateBlock = 256;   // codes of AdamW's 8-bit states that share a scale
constexpr int64_t kTiledRows = 512;    // rows of x that `linear_forward` and `linear_backward` copy at a time

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A 4-bit weight: two codes per byte (the first in the high nibble) and one scale per block. The scale of block b is
// absmax[b], or if nested dynamic_map[codes8[b]] * nested_absmax[b / kNestedBlock] + offset with the product rounded
// first (everything here is compiled without contraction to fused multiply-adds). A shifted weight has two values of
// absmax a block, the scale and a shift that is added to each product; no product reads its codes but that of tiles.
struct Weight {
    const uint8_t* packed;
    const float* absmax;         // null if nested
    const uint8_t* codes8;       // null if not nested
    const float* nested_absmax;
    const float* dynamic_map;    // 256 values
    float offset;
    const float* quant_map;      // 16 values
    int64_t num_weights;
    int64_t blocksize;           // a power of two, at least 16
    const uint16_t* dense;       // if not null, a bfloat16 weight; the other fields are not set
    bool shifted = false;

    float shift(int64_t block) const { return shifted ? absmax[2 * block + 1] : 0.0f; }
    void scales(int64_t block, int64_t count, float* out) const {
        if (absmax) {
            int64_t stride = shifted ? 2 : 1;
            for (int64_t i = 0; i < count; ++i) out[i] = absmax[(block + i) * stride];
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            out[i] = dynamic_map[codes8[block + i]] * nested_absmax[static_cast<uint64_t>(block + i) / kNestedBlock] + offset;
        }
    }
};

constexpr int64_t kAhead = 4096;  // bytes of codes that a product prefetches

struct Quantization {
    const float* bounds;   // 15 midpoints between neighbouring levels, ascending
    const uint8_t* order;  // 16 codes, one per interval
    int64_t num_weights;
    int64_t blocksize;
};

// Causal attention of H query heads over H_kv key heads; a document's tokens attend only to each other. Strides are in
// elements. out, grad_out and grad_q are (T, H, D), lse (H, T), grad_k and grad_v (H, T, D) float32. Their sums over
// the query heads of a key head are sum_k and sum_v, (H_kv, T, D).
struct Attention {
    Dtype dtype;
    int64_t T, H, H_kv, D;
    int64_t window;  // tokens that a query sees, itself included; 0: itself and all before it
    float scale;
    const void *q, *k, *v;
    int64_t q_head, q_token, k_head, k_token, v_head, v_token;
    void* out;
    float* lse;
    const void* grad_out;
    void* grad_q;
    float *grad_k, *grad_v;
    void *sum_k, *sum_v;
};

// One parameter's update with 8-bit states: one scale per block of kStateBlock codes. A map has 256 levels. Its bounds
// are the 255 midpoints between them. The numbers are Rates of onecard/kernels/reference.py.
struct AdamW8bit {
    int64_t size;
    float* w;
    const float* grad;
    uint8_t* m_codes;
    float* m_absmax;
    uint8_t* v_codes;
    float* v_absmax;
    const float *m_map, *m_bounds, *v_map, *v_bounds;
    float decay, rate, root, beta1, rest1, beta2, rest2, eps;
};

// A linear of bfloat16 x (M, K) with its LoRA term, and its backward from grad_y (M, N). All are contiguous:
//     y = x W^T + bias + (x_lora A^T) B^T scaling
// A (R, K) and B (N, R) are of lora_dtype; xA (M, R) is bfloat16; the forward writes it and the backward reads it.
// grad_A and grad_B are float32. A missing or unneeded tensor is null, and R is 0 without an adapter. If grad_x_lora is
// null, grad_x includes the LoRA term's part.
struct Linear {
    int64_t M, N, K, R;
    const void *x, *x_lora;
    const float* bias;
    Dtype lora_dtype;
    const void *A, *B;
    float scaling;
    void *xA, *y;
    const void* grad_y;
    void *grad_x, *grad_x_lora;
    float *grad_A, *grad_B;
};

// The values that a weight may have, ascending, and the midpoints between neighbours.
struct Levels {
    int count;  // at most 16
    const float *levels, *bounds;
};

// P columns of a weight, the last one first: each of N values becomes the level nearest to target + sum over the later
// columns j of U[p][j] D[j], divided by its scale. D is W minus the level times the scale. All are (P, N), U is (P, P).
struct Columns {
    int64_t P, N;
    const float *target, *W, *scale, *U;
    float* D;
    uint8_t* number;
};

// Blocks of float32 values: their scale is the share of the largest value with the least sum of weight times squared
// error.
struct Blocks {
    int64_t blocksize;
    const float *x, *weight;
    int64_t num_shares;
    const float* shares;
    float* scale;
};

struct Kernels {
    const char* name;
    // Quantizes blocks [begin, end) of W to codes and scales. Returns false if a weight is not finite.
    bool (*quantize)(const void* W, Dtype dtype, const Quantization& q, uint8_t* packed, float* absmax, int64_t begin,
                     int64_t end);
    // Dequantizes blocks [begin, end), rounded once to dtype, into out (the whole weight's buffer). `stream` bypasses
    // the caches and needs out aligned to 64 bytes.
    void (*dequantize)(const Weight& w, Dtype dtype, void* out, bool stream, int64_t begin, int64_t end);
    // y[m][n] = sum_k x[m][k] W[n][k], float32, for rows n in [begin, end); x as `arrange` writes it for this dtype.
    void (*product)(const Weight& w, const void* x, Dtype dtype, int64_t M, int64_t K, float* y, int64_t y_stride,
                    int64_t begin, int64_t end);
    // Arranges x (M, K) in the order in which `product` reads it: at most (M, round_up(K, 128)) times four bytes.
    void (*arrange)(const void* x, Dtype dtype, int64_t M, int64_t K, void* out);
    // Attention of one head over tokens [start, end); D is a multiple of 16.
    void (*attention_forward)(const Attention& a, int64_t head, int64_t start, int64_t end);
    void (*attention_backward)(const Attention& a, int64_t head, int64_t start, int64_t end);
    // Computes rows [begin, end), of H_kv T rows, of sum_k and sum_v.
    void (*attention_reduce)(const Attention& a, int64_t begin, int64_t end);
    // Rows [begin, end) of logits (rows, V): losses logsumexp(z) - z[target]. Sets z to softmax(z) - onehot(target).
    void (*cross_entropy)(void* logits, Dtype dtype, int64_t V, const int64_t* target, float* losses, int64_t begin,
                          int64_t end);
    // Rows [begin, end) of x (rows, D): y = w * round(x * rstd) with rstd = (mean(x^2) + eps)^-1/2, written to rstd; if
    // delta is not null, of total = x + delta instead of x.
    void (*rms_norm)(const void* x, const void* delta, const void* w, void* total, void* y, float* rstd, Dtype dtype,
                     int64_t D, float eps, int64_t begin, int64_t end);
    // grad_x of the same, with w constant. Adds grad_total, the gradient of x or total itself, if that is not null.
    void (*rms_norm_backward)(const void* grad_y, const void* x, const void* w, const float* rstd,
                              const void* grad_total, void* grad_x, Dtype dtype, int64_t D, int64_t begin, int64_t end);
    // y = gate sigmoid(gate) up, elements [begin, end).
    void (*swiglu)(const void* gate, const void* up, void* y, Dtype dtype, int64_t begin, int64_t end);
    void (*swiglu_backward)(const void* grad_y, const void* gate, const void* up, void* grad_gate, void* grad_up,
                            Dtype dtype, int64_t begin, int64_t end);
    // Rotates tokens [begin, end) of x (tokens, H, D) by cos and sin (period, D), or back.
    void (*rope)(const void* x, const void* cos, const void* sin, void* y, Dtype dtype, int64_t H, int64_t D,
                 int64_t period, bool back, int64_t begin, int64_t end);
    // y[m][n] = sum_k x[m][k] W[n][k], float32, for a W that is not quantized, rows n in [begin, end).
    void (*dense_product)(const void* W, const void* x, Dtype dtype, int64_t M, int64_t K, float* y, int64_t y_stride,
                          int64_t begin, int64_t end);
    // Updates blocks [begin, end) of a parameter.
    void (*adamw_8bit)(const AdamW8bit& a, int64_t begin, int64_t end);
    // Rounds the values [begin, end) of N of each column.
    void (*round_columns)(const Columns& c, const Levels& l, int64_t begin, int64_t end);
    // Chooses the scales of blocks [begin, end).
    void (*choose_scales)(const Blocks& b, const Levels& l, int64_t begin, int64_t end);
    // Computes a whole linear on num_threads threads, N and K multiples of 32. Null if torch's own product is as fast.
    void (*linear_forward)(const Weight& w, const Linear& l, int num_threads) = nullptr;
    void (*linear_backward)(const Weight& w, const Linear& l, int num_threads) = nullptr;
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define ONECARD_HAS_AMX
extern const Kernels kAmx;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace onecard

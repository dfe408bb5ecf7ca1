// Faster versions with BF16 instructions: the product directly from the codes, and attention, both for bfloat16.

// Products of bfloat16 x: 32 codes become 32 levels in one look-up, and vdpbf16ps adds two products to each of sixteen
// sums. The levels are rounded to bfloat16 and scaled after the sum of a block, so a weight has one rounding to
// bfloat16, the same as when it is dequantized. In a chunk of 128 weights, nibble j of 16-bit word i is weight
// 4 i + (j ^ 1). Two neighbouring words, eight weights of one block, share a sum.
struct Bf16Tile {
    using X = uint16_t;
    static constexpr int kRows = 2;

    template <int R, int M>
    static void product_tile(const Weight& w, const uint8_t* row, const float* scales, const uint16_t* x, int64_t K,
                             float* y, int64_t y_stride) {
        int64_t x_stride = (K + 127) / 128 * 128, blocks = K / w.blocksize;
        __m512i table = _mm512_broadcast_i64x4(Isa::narrow(_mm512_loadu_ps(w.quant_map), BFloat16{}));
        __m512 sums[R][M];
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < K; k += 128, x += 128) {
            __mmask16 valid = K - k < 128 ? 0x00FF : 0xFFFF;
            __m512i words[R];
            __m512 parts[R][M];
            for (int r = 0; r < R; ++r) {
                words[r] = _mm512_maskz_loadu_epi32(valid, row + (r * K + k) / 2);
                _mm_prefetch(reinterpret_cast<const char*>(row + (r * K + k) / 2 + kAhead), _MM_HINT_T1);
                for (int m = 0; m < M; ++m) parts[r][m] = _mm512_setzero_ps();
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                __m512bh x_m[M];
                for (int m = 0; m < M; ++m) x_m[m] = (__m512bh)_mm512_loadu_si512(x + m * x_stride + j * 32);
                for (int r = 0; r < R; ++r) {
                    __m512bh level = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words[r], 4 * j), table);
                    for (int m = 0; m < M; ++m) parts[r][m] = _mm512_dpbf16_ps(parts[r][m], level, x_m[m]);
                }
            }
            for (int r = 0; r < R; ++r) {
                __m512 scale = Isa::chunk_scales(scales + r * blocks, w.blocksize, k / 128, K - k);
                for (int m = 0; m < M; ++m) sums[r][m] = _mm512_fmadd_ps(parts[r][m], scale, sums[r][m]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) y[m * y_stride + r] = _mm512_reduce_add_ps(sums[r][m]);
        }
    }
};

void product_bf16(const Weight& w, const void* x, Dtype dtype, int64_t M, int64_t K, float* y, int64_t y_stride,
                  int64_t begin, int64_t end) {
    if (dtype != kBFloat16) return product(w, x, dtype, M, K, y, y_stride, begin, end);
    product_tiled<Bf16Tile>(w, static_cast<const uint16_t*>(x), M, K, y, y_stride, begin, end);
}

void arrange_bf16(const void* x, Dtype dtype, int64_t M, int64_t K, void* out) {
    if (dtype != kBFloat16) return arrange(x, dtype, M, K, out);
    const uint16_t* from = static_cast<const uint16_t*>(x);
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t m = 0; m < M; ++m, from += K) {
        for (int64_t c = 0; c < K; c += 128, to += 128) {
            for (int64_t j = 0; j < 4; ++j) {
                for (int64_t i = 0; i < 32; ++i) {
                    int64_t k = c + 4 * i + (j ^ 1);
                    to[j * 32 + i] = k < K ? from[k] : 0;
                }
            }
        }
    }
}

// Attention in bfloat16 with vdpbf16ps, which adds two products to each float32. The steps are those of attention.inl,
// with Q, K, V, dO, P and dS in bfloat16 and every sum in float32.
//
// A product C (+)= A B needs A as words of two values that are neighbours along the depth, and B as rows of words that
// pair two depths. K's and V's rows, transposed word by word, are B of Q K^T and dO V^T. Two neighbouring rows of P,
// interleaved, are B of dV^T = dO^T P, without a transposition of P.

using Word = uint32_t;

#if defined(ONECARD_AMX)
constexpr int64_t kRowTile = 16;  // rows of C that a product computes at once
#include "amx_tiles.inl"
#include "amx_packing.inl"
#include "amx_linear.inl"
#else
constexpr int64_t kRowTile = 4;

template <int C>
inline void multiply_words_tile(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c, int64_t c_row,
                                int64_t depth, bool add) {
    __m512 sums[4][C];
    for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < C; ++i) sums[r][i] = add ? _mm512_loadu_ps(c + r * c_row + 16 * i) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        __m512bh columns[C];
        for (int i = 0; i < C; ++i) columns[i] = (__m512bh)_mm512_loadu_si512(b + 16 * i);
        for (int r = 0; r < 4; ++r) {
            __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_row + k]));
            for (int i = 0; i < C; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], value, columns[i]);
        }
    }
    for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < C; ++i) _mm512_storeu_ps(c + r * c_row + 16 * i, sums[r][i]);
    }
}

// C (rows, columns) (+)= A B, depth in words; rows a multiple of kRowTile, columns of 16.
inline void multiply_words(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c, int64_t c_row,
                           int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (int64_t r = 0; r < rows; r += 4) {
        int64_t j = 0;
        for (; j + 64 <= columns; j += 64) {
            multiply_words_tile<4>(a + r * a_row, a_row, b + j, b_row, c + r * c_row + j, c_row, depth, add);
        }
        for (; j < columns; j += 16) {
            multiply_words_tile<1>(a + r * a_row, a_row, b + j, b_row, c + r * c_row + j, c_row, depth, add);
        }
    }
}
#endif

// Copies rows [0, n) of x unchanged, with rows [n, padded) zero: (padded, D / 2) words.
inline void copy_rows(const BFloat16* x, int64_t stride, int64_t n, int64_t padded, int64_t D, Word* out) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * D / 2, x + i * stride, static_cast<size_t>(2 * D));
    std::fill(out + n * D / 2, out + padded * D / 2, 0);
}

// Transposes (64, width) words to (width, 64) for each block of 64 rows.
inline void transpose_words(const Word* rows, int64_t padded, int64_t width, Word* out) {
    for (int64_t block = 0; block < padded; block += kBlock, rows += kBlock * width, out += kBlock * width) {
        for (int64_t i = 0; i < kBlock; i += 16) {
            for (int64_t d = 0; d < width; ++d) {
                for (int64_t k = i; k < i + 16; ++k) out[d * kBlock + k] = rows[k * width + d];
            }
        }
    }
}

// Interleaves rows 2 i and 2 i + 1, D values each: (padded / 2, D) words.
inline void zip_rows(const Word* rows, int64_t padded, int64_t D, Word* out) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(rows);
    for (int64_t i = 0; i < padded; i += 2, out += D) {
        for (int64_t d = 0; d < D; ++d) out[d] = x[i * D + d] | static_cast<Word>(x[(i + 1) * D + d]) << 16;
    }
}

// Transposes a block of 64 rows value by value, to words along the rows: (D, 32).
inline void transpose_block(const Word* rows, int64_t D, Word* out) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(rows);
    for (int64_t i = 0; i < kBlock; i += 2) {
        for (int64_t d = 0; d < D; ++d) out[d * 32 + i / 2] = x[i * D + d] | static_cast<Word>(x[(i + 1) * D + d]) << 16;
    }
}

inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Converts rows of 64 floats to bfloat16, in the same order.
inline void round_rows(const float* x, int64_t rows, Word* out) {
    for (int64_t i = 0; i < rows * kBlock; i += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), rounded(_mm512_loadu_ps(x + i)));
    }
}

// Converts rows of 64 floats to bfloat16 and interleaves neighbours: (rows / 2, 64) words.
inline void round_zipped(const float* x, int64_t rows, Word* out) {
    for (int64_t r = 0; r < rows; r += 2, out += kBlock) {
        for (int64_t k = 0; k < kBlock; k += 16) {
            __m512i low = _mm512_cvtepu16_epi32(rounded(_mm512_loadu_ps(x + r * kBlock + k)));
            __m512i high = _mm512_cvtepu16_epi32(rounded(_mm512_loadu_ps(x + (r + 1) * kBlock + k)));
            _mm512_storeu_si512(out + k, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

void attention_forward_bf16(const Attention& a, int64_t head, int64_t start, int64_t end) {
    if (a.dtype != kBFloat16) return attention_forward(a, head, start, end);
    int64_t n = end - start, padded = round_up(n), D = a.D, W = D / 2, kv = head / (a.H / a.H_kv);
    thread_local std::vector<Word> words;
    thread_local std::vector<float> floats;
    words.resize(static_cast<size_t>(3 * padded * W + kBlock * W + kBlock * 32));
    floats.resize(static_cast<size_t>(kBlock * D + kBlock * kBlock));
    Word *rows_kv = words.data(), *KT = rows_kv + padded * W, *V = KT + padded * W, *Q = V + padded * W, *P = Q + kBlock * W;
    float *O = floats.data(), *S = O + kBlock * D;
    copy_rows(static_cast<const BFloat16*>(a.k) + kv * a.k_head + start * a.k_token, a.k_token, n, padded, D, rows_kv);
    transpose_words(rows_kv, padded, W, KT);
    copy_rows(static_cast<const BFloat16*>(a.v) + kv * a.v_head + start * a.v_token, a.v_token, n, padded, D, rows_kv);
    zip_rows(rows_kv, padded, D, V);
    for (int64_t i = 0; i < n; i += kBlock) {
        int64_t rows = std::min(kBlock, n - i), filled = (rows + kRowTile - 1) / kRowTile * kRowTile;
        float most[kBlock], sum[kBlock];
        std::fill(most, most + kBlock, -INFINITY);
        std::fill(sum, sum + kBlock, 0.0f);
        std::fill(O, O + kBlock * D, 0.0f);
        const BFloat16* q = static_cast<const BFloat16*>(a.q) + head * a.q_head + (start + i) * a.q_token;
        copy_rows(q, a.q_token, rows, filled, D, Q);
        for (int64_t j = first_block(a, i); j < i + rows; j += kBlock) {
            multiply_words(Q, W, KT + j * W, kBlock, S, kBlock, filled, kBlock, W, false);
            for (int64_t r = 0; r < rows; ++r) {
                softmax_row(S + r * kBlock, visible(a, i + r, j), a.scale, most[r], sum[r], O + r * D, D);
            }
            round_rows(S, filled, P);
            multiply_words(P, 32, V + j * W, D, O, D, filled, D, 32, true);
        }
        for (int64_t r = 0; r < rows; ++r) {
            BFloat16* out = static_cast<BFloat16*>(a.out) + ((start + i + r) * a.H + head) * D;
            scale_row(O + r * D, D, 1.0f / sum[r]);
            for (int64_t d = 0; d < D; d += 16) Isa::store_as(out + d, Isa::load(O + r * D + d));
            a.lse[head * a.T + start + i + r] = most[r] + std::log(sum[r]);
        }
    }
}

void attention_backward_bf16(const Attention& a, int64_t head, int64_t start, int64_t end) {
    if (a.dtype != kBFloat16) return attention_backward(a, head, start, end);
    int64_t n = end - start, padded = round_up(n), D = a.D, W = D / 2, kv = head / (a.H / a.H_kv), size = padded * D;
    thread_local std::vector<Word> words;
    thread_local std::vector<float> floats;
    words.resize(static_cast<size_t>(4 * padded * W + 4 * kBlock * W + 3 * kBlock * 32));
    floats.resize(static_cast<size_t>(2 * size + kBlock * D + 2 * kBlock * kBlock));
    Word *rows_kv = words.data(), *KT = rows_kv + padded * W, *VT = KT + padded * W, *K = VT + padded * W,
         *Q = K + padded * W, *QT = Q + kBlock * W, *dO = QT + kBlock * W, *dOT = dO + kBlock * W,
         *P_zipped = dOT + kBlock * W, *dS_zipped = P_zipped + kBlock * 32, *dS_rows = dS_zipped + kBlock * 32;
    float *dKT = floats.data(), *dVT = dKT + size, *dQ = dVT + size, *P = dQ + kBlock * D, *dS = P + kBlock * kBlock;
    copy_rows(static_cast<const BFloat16*>(a.v) + kv * a.v_head + start * a.v_token, a.v_token, n, padded, D, rows_kv);
    transpose_words(rows_kv, padded, W, VT);
    copy_rows(static_cast<const BFloat16*>(a.k) + kv * a.k_head + start * a.k_token, a.k_token, n, padded, D, rows_kv);
    transpose_words(rows_kv, padded, W, KT);
    zip_rows(rows_kv, padded, D, K);
    std::fill(dKT, dKT + 2 * size, 0.0f);
    for (int64_t i = 0; i < n; i += kBlock) {
        int64_t rows = std::min(kBlock, n - i), first = start + i;
        copy_rows(static_cast<const BFloat16*>(a.q) + head * a.q_head + first * a.q_token, a.q_token, rows, kBlock, D, Q);
        const BFloat16* grad = static_cast<const BFloat16*>(a.grad_out) + (first * a.H + head) * D;
        copy_rows(grad, a.H * D, rows, kBlock, D, dO);
        transpose_block(Q, D, QT);
        transpose_block(dO, D, dOT);
        std::fill(dQ, dQ + kBlock * D, 0.0f);
        float delta[kBlock] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const BFloat16* out = static_cast<const BFloat16*>(a.out) + ((first + r) * a.H + head) * D;
            __m512 sums = _mm512_setzero_ps();
            for (int64_t d = 0; d < D; d += 16) {
                sums = _mm512_fmadd_ps(Isa::load(grad + r * a.H * D + d), Isa::load(out + d), sums);
            }
            delta[r] = _mm512_reduce_add_ps(sums);
        }
        for (int64_t j = first_block(a, i); j < i + rows; j += kBlock) {
            multiply_words(Q, W, KT + j * W, kBlock, P, kBlock, kBlock, kBlock, W, false);
            multiply_words(dO, W, VT + j * W, kBlock, dS, kBlock, kBlock, kBlock, W, false);
            for (int64_t r = 0; r < kBlock; ++r) {
                float *p = P + r * kBlock, *ds = dS + r * kBlock;
                Range range = r < rows ? visible(a, i + r, j) : Range{0, 0};
                scale_row(p, kBlock, a.scale);
                exponentials(p, range, r < rows ? a.lse[head * a.T + first + r] : 0.0f);
                __m512 minus = _mm512_set1_ps(-delta[r]), factor = _mm512_set1_ps(a.scale);
                for (int64_t k = 0; k < kBlock; k += 16) {
                    __m512 part = _mm512_mul_ps(_mm512_loadu_ps(p + k), _mm512_add_ps(_mm512_loadu_ps(ds + k), minus));
                    _mm512_storeu_ps(ds + k, _mm512_mul_ps(part, factor));
                }
            }
            round_zipped(P, kBlock, P_zipped);
            round_zipped(dS, kBlock, dS_zipped);
            round_rows(dS, kBlock, dS_rows);
            multiply_words(dOT, 32, P_zipped, kBlock, dVT + j * D, kBlock, D, kBlock, 32, true);
            multiply_words(QT, 32, dS_zipped, kBlock, dKT + j * D, kBlock, D, kBlock, 32, true);
            multiply_words(dS_rows, 32, K + j * W, D, dQ, D, kBlock, D, 32, true);
        }
        for (int64_t r = 0; r < rows; ++r) {
            BFloat16* out = static_cast<BFloat16*>(a.grad_q) + ((first + r) * a.H + head) * D;
            for (int64_t d = 0; d < D; d += 16) Isa::store_as(out + d, Isa::load(dQ + r * D + d));
        }
    }
    float *grad_k = a.grad_k + (head * a.T + start) * D, *grad_v = a.grad_v + (head * a.T + start) * D;
    for (int64_t j = 0; j < n; j += kBlock) {
        for (int64_t k = 0; k < std::min(kBlock, n - j); ++k) {
            for (int64_t d = 0; d < D; ++d) {
                grad_k[(j + k) * D + d] = dKT[j * D + d * kBlock + k];
                grad_v[(j + k) * D + d] = dVT[j * D + d * kBlock + k];
            }
        }
    }
}

#if defined(ONECARD_AMX)
void attention_forward_amx(const Attention& a, int64_t head, int64_t start, int64_t end) {
    if (a.dtype != kBFloat16 || a.D % 32 != 0) return kAvx512Bf16.attention_forward(a, head, start, end);
    Tiles tiles;
    attention_forward_bf16(a, head, start, end);
}

void attention_backward_amx(const Attention& a, int64_t head, int64_t start, int64_t end) {
    if (a.dtype != kBFloat16 || a.D % 32 != 0) return kAvx512Bf16.attention_backward(a, head, start, end);
    Tiles tiles;
    attention_backward_bf16(a, head, start, end);
}
#endif

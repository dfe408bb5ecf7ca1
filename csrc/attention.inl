// Causal attention of one head over one document, forward and backward, in blocks of 64 queries by 64 keys with a
// running softmax (FlashAttention, arXiv 2205.14135). All values between the loads and stores are float32.
// Included after blocks.inl. An instruction set's Isa also has
//     V, kLanes, set1, load(float*), store, add, mul, max, fmadd, exp, reduce_add, reduce_max
//     kColumns                                    registers of columns in a tile of `multiply_add`

constexpr int64_t kBlock = 64;

inline int64_t round_up(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// C[4][C lanes] (+)= A[4][depth] B[depth][C lanes]. A's strides are free, so that A can be a transpose.
template <int C>
inline void multiply_add_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                              int64_t c_row, int64_t depth, bool add) {
    typename Isa::V sums[4][C];
    for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < C; ++i) {
            sums[r][i] = add ? Isa::load(c + r * c_row + i * Isa::kLanes) : Isa::set1(0.0f);
        }
    }
    for (int64_t k = 0; k < depth; ++k, a += a_column, b += b_row) {
        typename Isa::V columns[C];
        for (int i = 0; i < C; ++i) columns[i] = Isa::load(b + i * Isa::kLanes);
        for (int r = 0; r < 4; ++r) {
            typename Isa::V value = Isa::set1(a[r * a_row]);
            for (int i = 0; i < C; ++i) sums[r][i] = Isa::fmadd(value, columns[i], sums[r][i]);
        }
    }
    for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < C; ++i) Isa::store(c + r * c_row + i * Isa::kLanes, sums[r][i]);
    }
}

// C (rows, columns) (+)= A (rows, depth) B (depth, columns); rows a multiple of 4, columns of 16.
inline void multiply_add(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (int64_t r = 0; r < rows; r += 4) {
        int64_t j = 0;
        for (; j + Isa::kColumns * Isa::kLanes <= columns; j += Isa::kColumns * Isa::kLanes) {
            multiply_add_tile<Isa::kColumns>(a + r * a_row, a_row, a_column, b + j, b_row, c + r * c_row + j, c_row,
                                             depth, add);
        }
        for (; j < columns; j += Isa::kLanes) {
            multiply_add_tile<1>(a + r * a_row, a_row, a_column, b + j, b_row, c + r * c_row + j, c_row, depth, add);
        }
    }
}

// Loads rows [0, n) of x (row stride `stride`) as float32 times factor. Rows [n, padded) are zero.
template <class T>
void load_rows(const T* x, int64_t stride, int64_t n, int64_t padded, int64_t D, float factor, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t d = 0; d < D; ++d) out[i * D + d] = to_float(x[i * stride + d]) * factor;
    }
    std::fill(out + n * D, out + padded * D, 0.0f);
}

// The same in blocks of 64 rows, each transposed to (D, 64).
inline void transpose_blocks(const float* rows, int64_t padded, int64_t D, float* out) {
    for (int64_t block = 0; block < padded; block += kBlock, rows += kBlock * D, out += kBlock * D) {
        for (int64_t i = 0; i < kBlock; i += 16) {
            for (int64_t d = 0; d < D; ++d) {
                for (int64_t k = i; k < i + 16; ++k) out[d * kBlock + k] = rows[k * D + d];
            }
        }
    }
}

struct Range {
    int64_t low, high;
};

// Returns the keys of block `first` that query i sees: key i and the keys before it within the window.
inline Range visible(const Attention& a, int64_t i, int64_t first) {
    int64_t low = a.window > 0 ? i - a.window + 1 - first : 0;
    return {std::min(std::max<int64_t>(low, 0), kBlock), std::min(std::max<int64_t>(i - first + 1, 0), kBlock)};
}

inline int64_t first_block(const Attention& a, int64_t query) {
    return a.window > 0 ? std::max<int64_t>(query - a.window + 1, 0) / kBlock * kBlock : 0;
}

// Replaces a row of 64 scores with exp(x - shift), zero outside the range. Returns the sum.
inline float exponentials(float* x, Range range, float shift) {
    typename Isa::V sum = Isa::set1(0.0f), minus = Isa::set1(-shift);
    for (int64_t j = 0; j < kBlock; j += Isa::kLanes) {
        Isa::store(x + j, Isa::exp(Isa::add(Isa::load(x + j), minus)));
    }
    std::fill(x, x + range.low, 0.0f);
    std::fill(x + range.high, x + kBlock, 0.0f);
    for (int64_t j = 0; j < kBlock; j += Isa::kLanes) sum = Isa::add(sum, Isa::load(x + j));
    return Isa::reduce_add(sum);
}

inline void scale_row(float* x, int64_t n, float factor) {
    for (int64_t d = 0; d < n; d += Isa::kLanes) Isa::store(x + d, Isa::mul(Isa::load(x + d), Isa::set1(factor)));
}

// One step of a row's running softmax: scores times factor become exponentials, and the earlier sums are rescaled.
inline void softmax_row(float* row, Range range, float factor, float& most, float& sum, float* out, int64_t D) {
    if (factor != 1.0f) scale_row(row, kBlock, factor);
    std::fill(row, row + range.low, -INFINITY);
    std::fill(row + range.high, row + kBlock, -INFINITY);
    typename Isa::V largest = Isa::load(row);
    for (int64_t k = Isa::kLanes; k < kBlock; k += Isa::kLanes) largest = Isa::max(largest, Isa::load(row + k));
    float now = std::max(most, Isa::reduce_max(largest));
    if (now == -INFINITY) {
        std::fill(row, row + kBlock, 0.0f);
        return;
    }
    float kept = most == -INFINITY ? 0.0f : std::exp(most - now);
    if (kept != 1.0f) scale_row(out, D, kept);
    sum = sum * kept + exponentials(row, range, now);
    most = now;
}

template <class T>
void attention_forward_typed(const Attention& a, int64_t head, int64_t start, int64_t end) {
    int64_t n = end - start, padded = round_up(n), D = a.D, kv = head / (a.H / a.H_kv);
    thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>(3 * padded * D + 2 * kBlock * D + kBlock * kBlock));
    float *K = memory.data(), *KT = K + padded * D, *V = KT + padded * D, *Q = V + padded * D, *O = Q + kBlock * D,
          *S = O + kBlock * D;
    load_rows(static_cast<const T*>(a.k) + kv * a.k_head + start * a.k_token, a.k_token, n, padded, D, 1.0f, K);
    load_rows(static_cast<const T*>(a.v) + kv * a.v_head + start * a.v_token, a.v_token, n, padded, D, 1.0f, V);
    transpose_blocks(K, padded, D, KT);
    for (int64_t i = 0; i < n; i += kBlock) {
        int64_t rows = std::min(kBlock, n - i), rows4 = (rows + 3) / 4 * 4;
        float most[kBlock], sum[kBlock];
        std::fill(most, most + kBlock, -INFINITY);
        std::fill(sum, sum + kBlock, 0.0f);
        std::fill(O, O + kBlock * D, 0.0f);
        const T* q = static_cast<const T*>(a.q) + head * a.q_head + (start + i) * a.q_token;
        load_rows(q, a.q_token, rows, rows4, D, a.scale, Q);
        for (int64_t j = first_block(a, i); j < i + rows; j += kBlock) {
            multiply_add(Q, D, 1, KT + j * D, kBlock, S, kBlock, rows4, kBlock, D, false);
            for (int64_t r = 0; r < rows; ++r) {
                softmax_row(S + r * kBlock, visible(a, i + r, j), 1.0f, most[r], sum[r], O + r * D, D);
            }
            multiply_add(S, kBlock, 1, V + j * D, D, O, D, rows4, D, kBlock, true);
        }
        for (int64_t r = 0; r < rows; ++r) {
            T* out = static_cast<T*>(a.out) + ((start + i + r) * a.H + head) * D;
            for (int64_t d = 0; d < D; ++d) convert(O[r * D + d] / sum[r], out[d]);
            a.lse[head * a.T + start + i + r] = most[r] + std::log(sum[r]);
        }
    }
}

// P = exp(s q k - lse), dV = P^T dO, dP = dO V^T, dS = s P (dP - rowsum(dO O)), dQ = dS K, dK = dS^T Q
template <class T>
void attention_backward_typed(const Attention& a, int64_t head, int64_t start, int64_t end) {
    int64_t n = end - start, padded = round_up(n), D = a.D, kv = head / (a.H / a.H_kv), size = padded * D;
    thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>(5 * size + 3 * kBlock * D + 2 * kBlock * kBlock));
    float *K = memory.data(), *KT = K + size, *VT = KT + size, *dK = VT + size, *dV = dK + size, *Q = dV + size,
          *dO = Q + kBlock * D, *dQ = dO + kBlock * D, *P = dQ + kBlock * D, *dS = P + kBlock * kBlock;
    load_rows(static_cast<const T*>(a.v) + kv * a.v_head + start * a.v_token, a.v_token, n, padded, D, 1.0f, K);
    transpose_blocks(K, padded, D, VT);
    load_rows(static_cast<const T*>(a.k) + kv * a.k_head + start * a.k_token, a.k_token, n, padded, D, 1.0f, K);
    transpose_blocks(K, padded, D, KT);
    std::fill(dK, dK + 2 * size, 0.0f);
    for (int64_t i = 0; i < n; i += kBlock) {
        int64_t rows = std::min(kBlock, n - i), rows4 = (rows + 3) / 4 * 4, first = start + i;
        const T* q = static_cast<const T*>(a.q) + head * a.q_head + first * a.q_token;
        load_rows(q, a.q_token, rows, rows4, D, a.scale, Q);
        load_rows(static_cast<const T*>(a.grad_out) + (first * a.H + head) * D, a.H * D, rows, rows4, D, 1.0f, dO);
        std::fill(dQ, dQ + kBlock * D, 0.0f);
        float delta[kBlock] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const T* out = static_cast<const T*>(a.out) + ((first + r) * a.H + head) * D;
            for (int64_t d = 0; d < D; ++d) delta[r] += dO[r * D + d] * to_float(out[d]);
        }
        for (int64_t j = first_block(a, i); j < i + rows; j += kBlock) {
            multiply_add(Q, D, 1, KT + j * D, kBlock, P, kBlock, rows4, kBlock, D, false);
            multiply_add(dO, D, 1, VT + j * D, kBlock, dS, kBlock, rows4, kBlock, D, false);
            for (int64_t r = 0; r < rows4; ++r) {
                float *p = P + r * kBlock, *ds = dS + r * kBlock;
                Range range = r < rows ? visible(a, i + r, j) : Range{0, 0};
                exponentials(p, range, r < rows ? a.lse[head * a.T + first + r] : 0.0f);
                typename Isa::V minus = Isa::set1(-delta[r]);
                for (int64_t k = 0; k < kBlock; k += Isa::kLanes) {
                    Isa::store(ds + k, Isa::mul(Isa::load(p + k), Isa::add(Isa::load(ds + k), minus)));
                }
            }
            multiply_add(P, 1, kBlock, dO, D, dV + j * D, D, kBlock, D, rows4, true);
            multiply_add(dS, 1, kBlock, Q, D, dK + j * D, D, kBlock, D, rows4, true);  // Q includes the scale
            multiply_add(dS, kBlock, 1, K + j * D, D, dQ, D, rows4, D, kBlock, true);
        }
        for (int64_t r = 0; r < rows; ++r) {
            T* out = static_cast<T*>(a.grad_q) + ((first + r) * a.H + head) * D;
            for (int64_t d = 0; d < D; ++d) convert(dQ[r * D + d] * a.scale, out[d]);
        }
    }
    std::copy(dK, dK + n * D, a.grad_k + (head * a.T + start) * D);
    std::copy(dV, dV + n * D, a.grad_v + (head * a.T + start) * D);
}

void attention_forward(const Attention& a, int64_t head, int64_t start, int64_t end) {
    if (a.dtype == kFloat32) return attention_forward_typed<float>(a, head, start, end);
    if (a.dtype == kBFloat16) return attention_forward_typed<BFloat16>(a, head, start, end);
    attention_forward_typed<Float16>(a, head, start, end);
}

void attention_backward(const Attention& a, int64_t head, int64_t start, int64_t end) {
    if (a.dtype == kFloat32) return attention_backward_typed<float>(a, head, start, end);
    if (a.dtype == kBFloat16) return attention_backward_typed<BFloat16>(a, head, start, end);
    attention_backward_typed<Float16>(a, head, start, end);
}

template <class T>
void attention_reduce_typed(const Attention& a, int64_t begin, int64_t end) {
    int64_t group = a.H / a.H_kv, part = a.T * a.D;
    for (int64_t row = begin; row < end; ++row) {
        int64_t from = row / a.T * group * part + row % a.T * a.D;
        for (int64_t d = 0; d < a.D; ++d) {
            float k = 0.0f, v = 0.0f;
            for (int64_t h = 0; h < group; ++h) {
                k += a.grad_k[from + h * part + d];
                v += a.grad_v[from + h * part + d];
            }
            convert(k, static_cast<T*>(a.sum_k)[row * a.D + d]);
            convert(v, static_cast<T*>(a.sum_v)[row * a.D + d]);
        }
    }
}

void attention_reduce(const Attention& a, int64_t begin, int64_t end) {
    if (a.dtype == kFloat32) return attention_reduce_typed<float>(a, begin, end);
    if (a.dtype == kBFloat16) return attention_reduce_typed<BFloat16>(a, begin, end);
    attention_reduce_typed<Float16>(a, begin, end);
}

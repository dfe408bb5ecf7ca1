// Kernels over rows of values. Included after attention.inl. An Isa also has load and store_as for 16-bit types.

template <class T>
void cross_entropy_typed(T* logits, int64_t V, const int64_t* target, float* losses, int64_t begin, int64_t end) {
    int64_t whole = V / Isa::kLanes * Isa::kLanes;
    for (int64_t row = begin; row < end; ++row) {
        T* z = logits + row * V;
        typename Isa::V largest = Isa::set1(-INFINITY), sums = Isa::set1(0.0f);
        for (int64_t i = 0; i < whole; i += Isa::kLanes) largest = Isa::max(largest, Isa::load(z + i));
        float most = Isa::reduce_max(largest);
        for (int64_t i = whole; i < V; ++i) most = std::max(most, to_float(z[i]));
        typename Isa::V minus = Isa::set1(-most);
        for (int64_t i = 0; i < whole; i += Isa::kLanes) sums = Isa::add(sums, Isa::exp(Isa::add(Isa::load(z + i), minus)));
        float sum = Isa::reduce_add(sums);
        for (int64_t i = whole; i < V; ++i) sum += std::exp(to_float(z[i]) - most);
        float at_target = to_float(z[target[row]]), share = 1.0f / sum;
        losses[row] = std::log(sum) + most - at_target;
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            typename Isa::V p = Isa::exp(Isa::add(Isa::load(z + i), minus));
            Isa::store_as(z + i, Isa::mul(p, Isa::set1(share)));
        }
        for (int64_t i = whole; i < V; ++i) convert(std::exp(to_float(z[i]) - most) * share, z[i]);
        convert(std::exp(at_target - most) * share - 1.0f, z[target[row]]);
    }
}

template <class T>
void rms_norm_typed(const T* x, const T* delta, const T* w, T* total, T* y, float* rstd, int64_t D, float eps,
                    int64_t begin, int64_t end) {
    int64_t whole = D / Isa::kLanes * Isa::kLanes;
    for (int64_t row = begin; row < end; ++row) {
        const T* x_row = x + row * D;
        T* y_row = y + row * D;
        if (delta) {
            const T* delta_row = delta + row * D;
            T* total_row = total + row * D;
            for (int64_t i = 0; i < whole; i += Isa::kLanes) {
                Isa::store_as(total_row + i, Isa::add(Isa::load(x_row + i), Isa::load(delta_row + i)));
            }
            for (int64_t i = whole; i < D; ++i) convert(to_float(x_row[i]) + to_float(delta_row[i]), total_row[i]);
            x_row = total_row;
        }
        typename Isa::V sums = Isa::set1(0.0f);
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            typename Isa::V v = Isa::load(x_row + i);
            sums = Isa::fmadd(v, v, sums);
        }
        float sum = Isa::reduce_add(sums);
        for (int64_t i = whole; i < D; ++i) sum += to_float(x_row[i]) * to_float(x_row[i]);
        float r = 1.0f / std::sqrt(sum / static_cast<float>(D) + eps);
        rstd[row] = r;
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            Isa::store_as(y_row + i, Isa::mul(Isa::load(x_row + i), Isa::set1(r)));
            Isa::store_as(y_row + i, Isa::mul(Isa::load(y_row + i), Isa::load(w + i)));
        }
        for (int64_t i = whole; i < D; ++i) {
            convert(to_float(x_row[i]) * r, y_row[i]);
            convert(to_float(y_row[i]) * to_float(w[i]), y_row[i]);
        }
    }
}

// dx = r (g - n mean(g n)) with n = r x, g = w dy; plus grad_total if that is not null
template <class T>
void rms_norm_backward_typed(const T* grad_y, const T* x, const T* w, const float* rstd, const T* grad_total, T* grad_x,
                             int64_t D, int64_t begin, int64_t end) {
    int64_t whole = D / Isa::kLanes * Isa::kLanes;
    for (int64_t row = begin; row < end; ++row) {
        const T *dy = grad_y + row * D, *x_row = x + row * D;
        T* dx = grad_x + row * D;
        typename Isa::V sums = Isa::set1(0.0f);
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            typename Isa::V g = Isa::mul(Isa::load(dy + i), Isa::load(w + i));
            sums = Isa::fmadd(g, Isa::load(x_row + i), sums);
        }
        float sum = Isa::reduce_add(sums), r = rstd[row];
        for (int64_t i = whole; i < D; ++i) sum += to_float(dy[i]) * to_float(w[i]) * to_float(x_row[i]);
        float back = -sum * r * r * r / static_cast<float>(D);
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            typename Isa::V g = Isa::mul(Isa::load(dy + i), Isa::load(w + i));
            typename Isa::V part = Isa::mul(Isa::load(x_row + i), Isa::set1(back));
            if (grad_total) part = Isa::add(part, Isa::load(grad_total + row * D + i));
            Isa::store_as(dx + i, Isa::fmadd(g, Isa::set1(r), part));
        }
        for (int64_t i = whole; i < D; ++i) {
            float part = to_float(x_row[i]) * back + (grad_total ? to_float(grad_total[row * D + i]) : 0.0f);
            convert(to_float(dy[i]) * to_float(w[i]) * r + part, dx[i]);
        }
    }
}

inline typename Isa::V sigmoid(typename Isa::V x) {
    typename Isa::V one = Isa::set1(1.0f);
    return Isa::divide(one, Isa::add(one, Isa::exp(Isa::mul(x, Isa::set1(-1.0f)))));
}

inline float sigmoid(float x, int) { return 1.0f / (1.0f + std::exp(-x)); }

template <class T>
void swiglu_typed(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + Isa::kLanes <= end; i += Isa::kLanes) {
        typename Isa::V g = Isa::load(gate + i);
        Isa::store_as(y + i, Isa::mul(Isa::mul(g, sigmoid(g)), Isa::load(up + i)));
    }
    for (; i < end; ++i) convert(to_float(gate[i]) * sigmoid(to_float(gate[i]), 0) * to_float(up[i]), y[i]);
}

// s = sigmoid(g): d gate = dy up s (1 + g (1 - s)), d up = dy g s
template <class T>
void swiglu_backward_typed(const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t begin,
                           int64_t end) {
    int64_t i = begin;
    typename Isa::V one = Isa::set1(1.0f), minus = Isa::set1(-1.0f);
    for (; i + Isa::kLanes <= end; i += Isa::kLanes) {
        typename Isa::V g = Isa::load(gate + i), dy = Isa::load(grad_y + i), s = sigmoid(g);
        typename Isa::V slope = Isa::mul(s, Isa::fmadd(g, Isa::fmadd(s, minus, one), one));
        Isa::store_as(grad_gate + i, Isa::mul(Isa::mul(dy, Isa::load(up + i)), slope));
        Isa::store_as(grad_up + i, Isa::mul(dy, Isa::mul(g, s)));
    }
    for (; i < end; ++i) {
        float g = to_float(gate[i]), dy = to_float(grad_y[i]), s = sigmoid(g, 0);
        convert(dy * to_float(up[i]) * s * (1.0f + g * (1.0f - s)), grad_gate[i]);
        convert(dy * g * s, grad_up[i]);
    }
}

// Rotary positions (arXiv 2104.09864) of heads of D = 2 h values. Token t's angles are in row t modulo `period`:
//     y_i = x_i cos_i - x_{i+h} sin_i,   y_{i+h} = x_{i+h} cos_{i+h} + x_i sin_{i+h};   `back`: the transpose.
template <class T>
void rope_typed(const T* x, const T* cos, const T* sin, T* y, int64_t H, int64_t D, int64_t period, bool back,
                int64_t begin, int64_t end) {
    int64_t half = D / 2, whole = half / Isa::kLanes * Isa::kLanes;
    for (int64_t row = begin * H; row < end * H; ++row) {
        const T *a = x + row * D, *b = a + half, *c = cos + row / H % period * D, *s = sin + row / H % period * D;
        const T *s_a = back ? s + half : s, *s_b = back ? s : s + half;
        T *y_a = y + row * D, *y_b = y_a + half;
        typename Isa::V plus = Isa::set1(back ? -1.0f : 1.0f), minus = Isa::set1(back ? 1.0f : -1.0f);
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            typename Isa::V va = Isa::load(a + i), vb = Isa::load(b + i);
            typename Isa::V turned = Isa::mul(Isa::mul(vb, Isa::load(s_a + i)), minus);
            Isa::store_as(y_a + i, Isa::fmadd(va, Isa::load(c + i), turned));
            turned = Isa::mul(Isa::mul(va, Isa::load(s_b + i)), plus);
            Isa::store_as(y_b + i, Isa::fmadd(vb, Isa::load(c + half + i), turned));
        }
        float sign = back ? -1.0f : 1.0f;
        for (int64_t i = whole; i < half; ++i) {
            float fa = to_float(a[i]), fb = to_float(b[i]);
            convert(fa * to_float(c[i]) - sign * fb * to_float(s_a[i]), y_a[i]);
            convert(fb * to_float(c[half + i]) + sign * fa * to_float(s_b[i]), y_b[i]);
        }
    }
}

// y[r] = sum_k x[k] W[r][k] for R rows of a W that is not quantized. R rows at a time use more of the memory bandwidth
// than one row at a time.
template <int R, class T>
void dense_rows(const T* W, const T* x, int64_t K, float* y) {
    int64_t whole = K / Isa::kLanes * Isa::kLanes;
    typename Isa::V sums[R];
    for (int r = 0; r < R; ++r) sums[r] = Isa::set1(0.0f);
    for (int64_t k = 0; k < whole; k += Isa::kLanes) {
        typename Isa::V x_k = Isa::load(x + k);
        for (int r = 0; r < R; ++r) sums[r] = Isa::fmadd(Isa::load(W + r * K + k), x_k, sums[r]);
    }
    for (int r = 0; r < R; ++r) {
        y[r] = Isa::reduce_add(sums[r]);
        for (int64_t k = whole; k < K; ++k) y[r] += to_float(W[r * K + k]) * to_float(x[k]);
    }
}

// Rows n in [begin, end) for every row of x (M, K).
template <class T>
void dense_product_typed(const T* W, const T* x, int64_t M, int64_t K, float* y, int64_t y_stride, int64_t begin,
                         int64_t end) {
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
        for (int64_t m = 0; m < M; ++m) dense_rows<4>(W + n * K, x + m * K, K, y + m * y_stride + n);
    }
    for (; n < end; ++n) {
        for (int64_t m = 0; m < M; ++m) dense_rows<1>(W + n * K, x + m * K, K, y + m * y_stride + n);
    }
}

// Calls f with a null pointer of the type that dtype names.
template <class F>
void with_type(Dtype dtype, F f) {
    if (dtype == kFloat32) return f(static_cast<float*>(nullptr));
    if (dtype == kBFloat16) return f(static_cast<BFloat16*>(nullptr));
    f(static_cast<Float16*>(nullptr));
}

#define TYPED(x) static_cast<decltype(type)>(const_cast<void*>(x))

void cross_entropy(void* logits, Dtype dtype, int64_t V, const int64_t* target, float* losses, int64_t begin,
                   int64_t end) {
    with_type(dtype, [&](auto type) { cross_entropy_typed(TYPED(logits), V, target, losses, begin, end); });
}

void rms_norm(const void* x, const void* delta, const void* w, void* total, void* y, float* rstd, Dtype dtype, int64_t D,
              float eps, int64_t begin, int64_t end) {
    with_type(dtype, [&](auto type) {
        rms_norm_typed(TYPED(x), TYPED(delta), TYPED(w), TYPED(total), TYPED(y), rstd, D, eps, begin, end);
    });
}

void rms_norm_backward(const void* grad_y, const void* x, const void* w, const float* rstd, const void* grad_total,
                       void* grad_x, Dtype dtype, int64_t D, int64_t begin, int64_t end) {
    with_type(dtype, [&](auto type) {
        rms_norm_backward_typed(TYPED(grad_y), TYPED(x), TYPED(w), rstd, TYPED(grad_total), TYPED(grad_x), D, begin, end);
    });
}

void swiglu(const void* gate, const void* up, void* y, Dtype dtype, int64_t begin, int64_t end) {
    with_type(dtype, [&](auto type) { swiglu_typed(TYPED(gate), TYPED(up), TYPED(y), begin, end); });
}

void swiglu_backward(const void* grad_y, const void* gate, const void* up, void* grad_gate, void* grad_up, Dtype dtype,
                     int64_t begin, int64_t end) {
    with_type(dtype, [&](auto type) {
        swiglu_backward_typed(TYPED(grad_y), TYPED(gate), TYPED(up), TYPED(grad_gate), TYPED(grad_up), begin, end);
    });
}

void rope(const void* x, const void* cos, const void* sin, void* y, Dtype dtype, int64_t H, int64_t D, int64_t period,
          bool back, int64_t begin, int64_t end) {
    with_type(dtype, [&](auto type) {
        rope_typed(TYPED(x), TYPED(cos), TYPED(sin), TYPED(y), H, D, period, back, begin, end);
    });
}

void dense_product(const void* W, const void* x, Dtype dtype, int64_t M, int64_t K, float* y, int64_t y_stride,
                   int64_t begin, int64_t end) {
    with_type(dtype, [&](auto type) { dense_product_typed(TYPED(W), TYPED(x), M, K, y, y_stride, begin, end); });
}

#undef TYPED

// NEON beside the scalar path, for test_neon.py: quantize, dequantize and 8-bit AdamW bit for bit, products within the
// rounding of their sums, rows and attention to a few roundings. Prints what differs; exits with how many.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/convert.h"
#include "../../csrc/kernels.h"

using namespace onecard;

namespace {

int failures = 0;
std::mt19937 generator(0);

void check(bool holds, const std::string& what) {
    if (holds) return;
    std::printf("differs: %s\n", what.c_str());
    ++failures;
}

std::vector<float> normal(size_t n, float size = 1.0f) {
    std::normal_distribution<float> draw(0.0f, size);
    std::vector<float> x(n);
    for (float& value : x) value = draw(generator);
    return x;
}

template <class T>
std::vector<T> as(const std::vector<float>& x) {
    std::vector<T> out(x.size());
    for (size_t i = 0; i < x.size(); ++i) convert(x[i], out[i]);
    return out;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// |a - b| <= bound in the Euclidean norm, relative to b.
template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b, double bound) {
    double gap = 0, size = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        double x = to_float(a[i]), y = to_float(b[i]);
        gap += (x - y) * (x - y);
        size += y * y;
    }
    return gap <= bound * bound * size;
}

struct Book {  // sixteen uneven levels, in an order of codes of their own
    std::vector<float> levels, bounds;
    std::vector<uint8_t> order;

    Book() : levels(16), bounds(15), order(16) {
        std::vector<float> ascending(16);
        for (int i = 0; i < 16; ++i) ascending[i] = std::copysign(std::pow(std::fabs(i - 7) / 8.0f, 1.3f), i - 7.0f);
        for (int i = 0; i < 15; ++i) bounds[i] = (ascending[i] + ascending[i + 1]) / 2;
        for (int i = 0; i < 16; ++i) {
            order[i] = static_cast<uint8_t>(i * 5 % 16);
            levels[order[i]] = ascending[i];
        }
    }
};

std::vector<float> even_map(float lowest) {
    std::vector<float> map(256);
    for (int i = 0; i < 256; ++i) map[i] = lowest + (1.0f - lowest) * static_cast<float>(i) / 255.0f;
    return map;
}

const Book book;
const std::vector<float> dynamic_map = even_map(-1.0f);

template <class T>
void blocks(Dtype dtype, const std::string& name) {
    for (int64_t blocksize : {16, 32, 64, 256}) {
        for (size_t size : {1u, 33u, 64u, 1000u, 4097u}) {
            std::vector<float> W = normal(size);
            for (size_t i = 0; i < std::min<size_t>(size, 40); ++i) W[i] *= i % 3 ? 1e-39f : 0.0f;
            if (size > 500) W[500] = 300.0f;
            std::vector<T> typed = as<T>(W);
            int64_t count = (static_cast<int64_t>(size) + blocksize - 1) / blocksize;
            Quantization q{book.bounds.data(), book.order.data(), static_cast<int64_t>(size), blocksize};
            std::vector<uint8_t> packed[2];
            std::vector<float> absmax[2];
            std::vector<T> back[2];
            const Kernels* paths[2] = {&kScalar, &kNeon};
            for (int i = 0; i < 2; ++i) {
                packed[i].resize((size + 1) / 2);
                absmax[i].resize(count);
                back[i].resize(size);
                paths[i]->quantize(typed.data(), dtype, q, packed[i].data(), absmax[i].data(), 0, count);
                Weight w{packed[i].data(), absmax[i].data(), nullptr, nullptr, nullptr, 0.0f, book.levels.data(), q.num_weights,
                         blocksize};
                paths[i]->dequantize(w, dtype, back[i].data(), false, 0, count);
            }
            std::string at = name + ", " + std::to_string(size) + " by " + std::to_string(blocksize);
            check(same_bits(packed[0], packed[1]) && same_bits(absmax[0], absmax[1]), "quantize " + at);
            check(same_bits(back[0], back[1]), "dequantize " + at);
        }
    }
}

void products() {
    for (int64_t K : {64, 192, 576, 2048}) {
        for (int64_t blocksize : {16, 32, 64}) {
            for (int64_t M : {1, 2, 3, 7}) {
                constexpr int64_t N = 5;
                std::vector<uint8_t> packed(N * K / 2), codes(N * K / blocksize);
                for (uint8_t& byte : packed) byte = static_cast<uint8_t>(generator());
                for (uint8_t& code : codes) code = static_cast<uint8_t>(generator());
                std::vector<float> outer = normal(codes.size() / 256 + 1), x = normal(M * K), W(N * K), y(M * N);
                Weight w{packed.data(), nullptr, codes.data(), outer.data(), dynamic_map.data(), 0.3f, book.levels.data(),
                         N * K, blocksize};
                kScalar.dequantize(w, kFloat32, W.data(), false, 0, N * K / blocksize);
                std::vector<float> arranged(M * ((K + 127) / 128 * 128));
                kNeon.arrange(x.data(), kFloat32, M, K, arranged.data());
                kNeon.product(w, arranged.data(), kFloat32, M, K, y.data(), N, 0, N);
                bool holds = true;
                for (int64_t i = 0; i < M * N; ++i) {
                    double sum = 0, magnitude = 0;
                    for (int64_t k = 0; k < K; ++k) {
                        double term = double(x[i / N * K + k]) * W[i % N * K + k];
                        sum += term;
                        magnitude += std::fabs(term);
                    }
                    holds &= std::fabs(y[i] - sum) <= static_cast<double>(K + 2) * 0x1p-24 * magnitude;
                }
                check(holds, "product " + std::to_string(M) + " x " + std::to_string(K));
            }
        }
    }
}

void optimizer() {
    constexpr int64_t size = 1000, count = 4;
    std::vector<float> maps[2] = {even_map(-0.99f), even_map(0.0f)}, bounds[2], g = normal(size), w[2];
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 255; ++j) bounds[i].push_back((maps[i][j] + maps[i][j + 1]) / 2);
    }
    w[0] = w[1] = normal(size);
    std::vector<uint8_t> m(size), v(size), m2, v2;
    for (uint8_t& code : m) code = static_cast<uint8_t>(generator());
    for (uint8_t& code : v) code = static_cast<uint8_t>(generator());
    std::vector<float> m_absmax{1, 2, 0, 4}, v_absmax{0.1f, 0.2f, 0, 0.4f}, m_absmax2 = m_absmax, v_absmax2 = v_absmax;
    m2 = m, v2 = v;
    AdamW8bit a{size, w[0].data(), g.data(), m.data(), m_absmax.data(), v.data(), v_absmax.data(), maps[0].data(),
                bounds[0].data(), maps[1].data(), bounds[1].data(), 0.999f, 0.01f, 1.5f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-8f};
    kScalar.adamw_8bit(a, 0, count);
    a.w = w[1].data(), a.m_codes = m2.data(), a.v_codes = v2.data();
    a.m_absmax = m_absmax2.data(), a.v_absmax = v_absmax2.data();
    kNeon.adamw_8bit(a, 0, count);
    check(same_bits(w[0], w[1]) && same_bits(m, m2) && same_bits(v, v2) && same_bits(m_absmax, m_absmax2) &&
              same_bits(v_absmax, v_absmax2), "8-bit AdamW");
}

template <class T>
void rows(Dtype dtype, const std::string& name, double grain) {
    constexpr int64_t D = 70, count = 3;
    std::vector<T> x = as<T>(normal(count * D)), w = as<T>(normal(D)), g = as<T>(normal(count * D)), out[2][6];
    std::vector<T> gates = as<T>(normal(count * D, 100.0f));  // past the largest exp, too
    std::vector<float> rstd[2], losses[2], dense[2];
    std::vector<int64_t> target{3, 69, 0};
    const Kernels* paths[2] = {&kScalar, &kNeon};
    for (int i = 0; i < 2; ++i) {
        for (auto& y : out[i]) y.resize(count * D);
        rstd[i].resize(count), losses[i].resize(count), dense[i].resize(count);
        paths[i]->rms_norm(x.data(), g.data(), w.data(), out[i][2].data(), out[i][0].data(), rstd[i].data(), dtype, D, 1e-5f, 0, count);
        paths[i]->rms_norm_backward(g.data(), out[i][2].data(), w.data(), rstd[i].data(), x.data(), out[i][1].data(), dtype, D, 0, count);
        paths[i]->swiglu(gates.data(), g.data(), out[i][2].data(), dtype, 0, count * D);
        paths[i]->swiglu_backward(g.data(), gates.data(), g.data(), out[i][3].data(), out[i][4].data(), dtype, 0,
                                  count * D);
        out[i][5] = x;
        paths[i]->cross_entropy(out[i][5].data(), dtype, D, target.data(), losses[i].data(), 0, count);
        paths[i]->dense_product(x.data(), w.data(), dtype, 1, D, dense[i].data(), count, 0, count);
    }
    for (int k = 0; k < 6; ++k) check(close(out[1][k], out[0][k], grain), "rows " + std::to_string(k) + " " + name);
    check(close(losses[1], losses[0], 1e-6) && close(dense[1], dense[0], 1e-6), "losses, dense product " + name);
}

template <class T>
void attention(Dtype dtype, const std::string& name, double grain) {
    constexpr int64_t T_ = 150, H = 4, G = 2, D = 32;
    std::vector<T> q = as<T>(normal(H * T_ * D)), k = as<T>(normal(G * T_ * D)), v = as<T>(normal(G * T_ * D));
    std::vector<T> grad = as<T>(normal(T_ * H * D)), out[2], grad_q[2];
    std::vector<float> lse[2], grad_k[2], grad_v[2];
    const Kernels* paths[2] = {&kScalar, &kNeon};
    for (int i = 0; i < 2; ++i) {
        out[i].resize(T_ * H * D), grad_q[i] = out[i];
        lse[i].resize(H * T_), grad_k[i].resize(H * T_ * D), grad_v[i] = grad_k[i];
        Attention a{dtype, T_, H, G, D, 0, 0.2f, q.data(), k.data(), v.data(), T_ * D, D, T_ * D, D, T_ * D, D,
                    out[i].data(), lse[i].data(), nullptr, nullptr, nullptr, nullptr};
        for (int64_t head = 0; head < H; ++head) paths[i]->attention_forward(a, head, 0, T_);
        a.grad_out = grad.data(), a.grad_q = grad_q[i].data(), a.grad_k = grad_k[i].data(), a.grad_v = grad_v[i].data();
        for (int64_t head = 0; head < H; ++head) paths[i]->attention_backward(a, head, 0, T_);
    }
    check(close(out[1], out[0], grain) && close(lse[1], lse[0], 1e-6), "attention " + name);
    check(close(grad_q[1], grad_q[0], 4 * grain) && close(grad_k[1], grad_k[0], 4 * grain) &&
              close(grad_v[1], grad_v[0], 4 * grain), "attention's gradients " + name);
}

}  // namespace

int main() {
    blocks<float>(kFloat32, "float32");
    blocks<BFloat16>(kBFloat16, "bfloat16");
    blocks<Float16>(kFloat16, "float16");
    products();
    optimizer();
    rows<float>(kFloat32, "float32", 1e-6);
    rows<BFloat16>(kBFloat16, "bfloat16", 0x1p-9);
    rows<Float16>(kFloat16, "float16", 0x1p-12);
    attention<float>(kFloat32, "float32", 1e-6);
    attention<BFloat16>(kBFloat16, "bfloat16", 0x1p-9);
    std::printf("%d failures\n", failures);
    return failures;
}

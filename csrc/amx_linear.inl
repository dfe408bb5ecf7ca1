// qlora_linear on AMX tiles. A panel of 32 of the weight's columns (rows in the forward) is decoded from its codes into
// a buffer that stays in the second-level cache, in B's order. There it is multiplied with all tokens. No 16-bit weight
// is written to memory. The LoRA term extends the depth of the same float32 sums, so y and dx are rounded once.

// Computes panels [begin, end) of C = A B. decode(panel, panels, step, count, out) makes squares of B, [panel][step],
// and finish(panel, panels, c) receives the complete C: rows of 32 floats, panels kPanel apart. A, up to kTall squares,
// is already packed, or (words null) each thread packs one stretch of the depth at a time from the rows of x (M,
// columns), because a copy of the whole depth would be large.
template <class Decode, class Finish>
void multiply_panels(const Rows& a, const BFloat16* x, int64_t M, int64_t begin, int64_t end, const Decode& decode,
                     const Finish& finish) {
    thread_local Buffer memory;
    int64_t own = a.words ? 0 : kTall * kDepth * kSquare;
    Word* b = memory.words(kPair * kDepth * kSquare + kWide * kPanel + own);
    float* c = reinterpret_cast<float*>(b + kPair * kDepth * kSquare);
    Word* copy = b + kPair * kDepth * kSquare + kWide * kPanel;
    for (int64_t left = begin; left < end; left += kWide) {
        int64_t wide = std::min(kWide, end - left);
        for (int64_t step = 0; step < a.steps; step += a.depth) {
            int64_t count = std::min(a.depth, a.steps - step);
            const Word* rows = a.words ? a.square(0, step) : copy;
            for (int64_t i = 0; i < a.num_squares * count && !a.words; ++i) {
                pack_square(x, M, a.steps * 32, i / count, step + i % count, copy + i * kSquare);
            }
            for (int64_t p = 0; p < wide; ++p) {
                if (p % kPair == 0) decode(left + p, std::min(kPair, wide - p), step, count, b);
                for (int64_t i = 0; i < a.num_squares; ++i) {
                    multiply_squares(rows + i * count * kSquare, b + p % kPair * count * kSquare, count,
                                     c + p * kPanel + i * 1024, step > 0);
                }
            }
        }
        finish(left, wide, c);
    }
}

// Packs up to 32 rows of x, columns k to k + 32, into a square of B. The rows are its depth.
inline void zip_square(const BFloat16* x, int64_t rows, int64_t stride, int64_t k, Word* out) {
    auto row = [&](int64_t r) {
        return r < rows ? split(_mm512_loadu_si512(x + r * stride + k)) : _mm512_setzero_si512();
    };
    for (int64_t r = 0; r < 32; r += 2, out += 16) store_zipped(row(r), row(r + 1), out);
}

// Transposes a square of A, 32 rows of 32 values, into another.
inline void transpose_square(const Word* from, Word* out) {
    alignas(64) Word zipped[kSquare];
    for (int64_t i = 0; i < 16; ++i) {
        __m512i even = _mm512_load_si512(from + 32 * i), odd = _mm512_load_si512(from + 32 * i + 16);
        store_zipped(split(even), split(odd), zipped + 16 * i);
    }
    for (int64_t half = 0; half < 2; ++half, out += kTile) {
        __m512i rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(zipped + half * kTile + 16 * i);
        store_transposed(rows, out);
    }
}

// Converts a float32 square to bfloat16, in A's order.
inline void round_square(const float* c, Word* out) {
    for (int64_t r = 0; r < 32; ++r, c += 32, out += 16) {
        _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + 16), _mm512_loadu_ps(c)));
    }
}

// Writes C to rows of bfloat16, aligned to 64 bytes, with a bias if there is one. The stores bypass the caches, because
// to read the lines first would take longer than the product.
struct Rounded {
    BFloat16* out;
    const float* bias;
    int64_t M, columns;

    void operator()(int64_t panel, int64_t panels, const float* c) const {
        for (int64_t m = 0; m < M; ++m, c += 32) {
            for (int64_t p = 0; p < panels; ++p) {
                int64_t column = (panel + p) * 32;
                __m512 low = _mm512_load_ps(c + p * kPanel), high = _mm512_load_ps(c + p * kPanel + 16);
                if (bias) {
                    low = _mm512_add_ps(low, _mm512_loadu_ps(bias + column));
                    high = _mm512_add_ps(high, _mm512_loadu_ps(bias + column + 16));
                }
                __m512i row = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out + m * columns + column), row);
            }
        }
        _mm_sfence();
    }
};

thread_local Buffer linear_memory;  // of the calling thread; its helper threads share it

void forward_slice(const Weight& w, const Linear& l, int num_threads) {
    int64_t M = l.M, N = l.N, K = l.K, R = l.R, tall = squares(M), steps = K / 32, ranks = squares(R);
    bool separate = R && l.x_lora != l.x;
    Word* words = linear_memory.words((tall * (steps + ranks) + ranks * steps + (separate ? tall * steps : 0)) * kSquare);
    Rows x{words, tall, steps + ranks};  // and x_lora A^T after it
    Word* A = words + tall * (steps + ranks) * kSquare;
    Rows seen = separate ? Rows{A + ranks * steps * kSquare, tall, steps} : x;
    parallel_for(ranks * steps, 64, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            transpose_values(l.A, l.lora_dtype, R, K, i / steps * 32, i % steps * 32, 1.0f, A + i * kSquare);
        }
    });
    parallel_for(tall, 1, num_threads, [&](int64_t begin, int64_t end) {
        Tiles tiles;
        alignas(64) float c[1024];
        for (int64_t i = begin; i < end; ++i) {
            pack_rows(static_cast<const BFloat16*>(l.x), M, K, i, x);
            if (separate) pack_rows(static_cast<const BFloat16*>(l.x_lora), M, K, i, seen);
            for (int64_t r = 0; r < ranks; ++r) {
                Word* to = x.square(i, steps + r);
                multiply_rows(seen, i, steps, A + r * steps * kSquare, c);
                round_square(c, to);
                for (int64_t m = i * 32; m < std::min(M, i * 32 + 32); ++m, to += 16) {
                    BFloat16* out = static_cast<BFloat16*>(l.xA) + m * R + r * 32;
                    std::memcpy(out, to, static_cast<size_t>(2 * std::min<int64_t>(32, R - r * 32)));
                }
            }
        }
    });
    auto decode = [&](int64_t panel, int64_t panels, int64_t step, int64_t count, Word* out) {
        int64_t weights = std::min(count, std::max<int64_t>(steps - step, 0));
        for (int64_t n = panel * 32; n < (panel + panels) * 32; n += 32, out += count * kSquare) {
            decode_transposed(w, K, n, step * 32, weights, out);
            for (int64_t s = weights; s < count; ++s) {
                transpose_values(l.B, l.lora_dtype, N, R, n, (step + s - steps) * 32, l.scaling, out + s * kSquare);
            }
        }
    };
    Rounded finish{static_cast<BFloat16*>(l.y), l.bias, M, N};
    parallel_for(N / 32, 1, num_threads, [&](int64_t begin, int64_t end) {
        Tiles tiles;
        multiply_panels(x, nullptr, M, begin, end, decode, finish);
    });
}

// If `add`, adds to grad_A and grad_B.
void backward_slice(const Weight& w, const Linear& l, bool add, int num_threads) {
    int64_t M = l.M, N = l.N, K = l.K, R = l.R, tall = squares(M), steps = N / 32, ranks = squares(R);
    const BFloat16 *grad = static_cast<const BFloat16*>(l.grad_y), *seen = static_cast<const BFloat16*>(l.x_lora);
    bool large = R == 0 && tall * steps * kSquare > kLargeCopy;  // for a head's logits
    Word* words = large ? nullptr : linear_memory.words((tall * (steps + 3 * ranks) + ranks * steps) * kSquare);
    Word *gBT = words + tall * (steps + ranks) * kSquare, *xAT = gBT + tall * ranks * kSquare,
         *B = xAT + tall * ranks * kSquare;
    bool joined = l.grad_x_lora == nullptr;
    Rows g{words, tall, joined ? steps + ranks : steps};  // and g B after it, in the same sum or its own
    Rows gB = joined ? g : Rows{words + tall * steps * kSquare, tall, ranks};
    int64_t first = joined ? steps : 0;
    parallel_for(ranks * steps, 64, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            zip_values(l.B, l.lora_dtype, N, R, i % steps * 32, i / steps * 32, l.scaling, B + i * kSquare);
        }
    });
    parallel_for(large ? 0 : tall, 1, num_threads, [&](int64_t begin, int64_t end) {
        Tiles tiles;
        alignas(64) float c[1024];
        alignas(64) Word part[kSquare];
        for (int64_t i = begin; i < end; ++i) {
            pack_rows(grad, M, N, i, g);
            for (int64_t r = 0; r < ranks; ++r) {
                Word* to = gB.square(i, first + r);
                multiply_rows(g, i, steps, B + r * steps * kSquare, c);
                round_square(c, to);
                transpose_square(to, gBT + (r * tall + i) * kSquare);
                for (int64_t m = 0; m < 32; ++m) {
                    const BFloat16* from = static_cast<const BFloat16*>(l.xA) + (i * 32 + m) * R + r * 32;
                    _mm512_store_si512(part + 16 * m, load_values(from, i * 32 + m < M ? R - r * 32 : 0));
                }
                transpose_square(part, xAT + (r * tall + i) * kSquare);
            }
        }
    });
    auto decode_lora = [&](int64_t k, int64_t step, int64_t count, Word* out) {
        for (int64_t s = 0; s < count; ++s) {
            zip_values(l.A, l.lora_dtype, R, K, (step + s) * 32, k, 1.0f, out + s * kSquare);
        }
    };
    auto decode = [&](int64_t panel, int64_t panels, int64_t step, int64_t count, Word* out) {
        int64_t weights = std::min(count, std::max<int64_t>(steps - step, 0));
        decode_zipped(w, K, step * 32, weights, panel * 32, panels, out, count * kSquare);
        for (int64_t p = 0; p < panels; ++p) {
            decode_lora((panel + p) * 32, step + weights - steps, count - weights, out + (p * count + weights) * kSquare);
        }
    };
    auto decode_only = [&](int64_t panel, int64_t panels, int64_t step, int64_t count, Word* out) {
        for (int64_t p = 0; p < panels; ++p) decode_lora((panel + p) * 32, step, count, out + p * count * kSquare);
    };
    // Panels of small^T big: small^T (R, M) as squares of A, big (M, columns). take(r, column, c) receives 32 x 32.
    auto reduce = [&](const Word* small, const BFloat16* big, int64_t columns, Range panels, const auto& take) {
        thread_local Buffer memory;
        Word* b = memory.words(tall * kSquare);
        alignas(64) float c[1024];
        for (int64_t panel = panels.low; panel < panels.high; ++panel) {
            for (int64_t i = 0; i < tall; ++i) {
                zip_square(big + i * 32 * columns, M - i * 32, columns, panel * 32, b + i * kSquare);
            }
            for (int64_t r = 0; r < ranks; ++r) {
                multiply_squares(small + r * tall * kSquare, b, tall, c, false);
                take(r * 32, panel * 32, c);
            }
        }
    };
    auto take_A = [&](int64_t r, int64_t k, const float* c) {
        for (int64_t i = 0; i < std::min<int64_t>(32, R - r); ++i) {
            float* out = l.grad_A + (r + i) * K + k;
            for (int64_t j = 0; j < 32; ++j) out[j] = (add ? out[j] : 0.0f) + c[32 * i + j];
        }
    };
    auto take_B = [&](int64_t r, int64_t n, const float* c) {
        for (int64_t j = 0; j < 32; ++j) {
            for (int64_t i = 0; i < std::min<int64_t>(32, R - r); ++i) {
                float& out = l.grad_B[(n + j) * R + r + i];
                out = (add ? out : 0.0f) + l.scaling * c[32 * i + j];
            }
        }
    };
    Rounded grad_x{static_cast<BFloat16*>(l.grad_x), nullptr, M, K};
    Rounded grad_x_lora{static_cast<BFloat16*>(l.grad_x_lora), nullptr, M, K};
    parallel_for(num_threads, 1, num_threads, [&](int64_t begin, int64_t end) {
        Tiles tiles;
        auto share = [&](int64_t columns) {  // of the panels, for these threads
            return Range{columns / 32 * begin / num_threads, columns / 32 * end / num_threads};
        };
        Range inputs = share(K), outputs = share(N);
        if (l.grad_x) multiply_panels(g, grad, M, inputs.low, inputs.high, decode, grad_x);
        if (!joined) multiply_panels(gB, nullptr, M, inputs.low, inputs.high, decode_only, grad_x_lora);
        if (l.grad_A) reduce(gBT, seen, K, inputs, take_A);
        if (l.grad_B) reduce(xAT, grad, N, outputs, take_B);
    });
}

// Returns the part of a linear from row m, with as many rows as are copied at a time.
inline Linear slice(const Linear& l, int64_t m) {
    Linear part = l;
    part.M = std::min(kTiledRows, l.M - m);
    auto move = [&](auto& pointer, int64_t columns) {
        if (pointer) pointer = const_cast<char*>(static_cast<const char*>(pointer)) + 2 * m * columns;
    };
    for (const void** each : {&part.x, &part.x_lora}) move(*each, l.K);
    for (void** each : {&part.grad_x, &part.grad_x_lora}) move(*each, l.K);
    move(part.xA, l.R);
    move(part.y, l.N);
    move(part.grad_y, l.N);
    return part;
}

void linear_forward(const Weight& w, const Linear& l, int num_threads) {
    for (int64_t m = 0; m < l.M; m += kTiledRows) forward_slice(w, slice(l, m), num_threads);
}

void linear_backward(const Weight& w, const Linear& l, int num_threads) {
    for (int64_t m = 0; m < l.M; m += kTiledRows) backward_slice(w, slice(l, m), m > 0, num_threads);
}

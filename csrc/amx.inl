// Products on AMX: a tile is 16 rows of 64 bytes, and one instruction adds to a tile C of 16 x 16 float32 the product of
// A, 16 rows of 16 words, and B, 16 rows of 16 words; a word is two bfloat16 that follow each other along the depth.
//
// qlora_linear on them: a panel of 32 of the weight's columns (rows in the forward) is decoded from its codes into a
// buffer that stays in the second-level cache, in B's order, and meets all tokens there; no 16-bit weight is written to
// memory. The LoRA term is one more stretch of the depth, in the same float32 sums, so y and dx are rounded once.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All eight tiles at their full size while it lives. The fence keeps the compiler from moving stores past tile loads.
struct Tiles {
    Tiles() {
        TileConfig config;
        std::atomic_signal_fence(std::memory_order_seq_cst);
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// C (16 R, 16 S) (+)= A B, with depth a multiple of 16 words and strides in elements.
template <int R, int S>
inline void multiply_tiles(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c, int64_t c_row,
                           int64_t depth, bool add) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (add) {
        _tile_loadd(0, c, c_row * 4);
        if (S > 1) _tile_loadd(1, c + 16, c_row * 4);
        if (R > 1) _tile_loadd(2, c + 16 * c_row, c_row * 4);
        if (R > 1 && S > 1) _tile_loadd(3, c + 16 * c_row + 16, c_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 16, a += 16, b += 16 * b_row) {
        _tile_loadd(4, a, a_row * 4);
        _tile_loadd(6, b, b_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (S > 1) _tile_loadd(7, b + 16, b_row * 4);
        if (S > 1) _tile_dpbf16ps(1, 4, 7);
        if (R > 1) _tile_loadd(5, a + 16 * a_row, a_row * 4);
        if (R > 1) _tile_dpbf16ps(2, 5, 6);
        if (R > 1 && S > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * 4);
    if (S > 1) _tile_stored(1, c + 16, c_row * 4);
    if (R > 1) _tile_stored(2, c + 16 * c_row, c_row * 4);
    if (R > 1 && S > 1) _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
}

// What bf16.inl's attention multiplies with; rows and columns are multiples of 16.
inline void multiply_words(const Word* a, int64_t a_row, const Word* b, int64_t b_row, float* c, int64_t c_row,
                           int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (int64_t r = 0; r < rows; r += 32) {
        for (int64_t j = 0; j < columns; j += 32) {
            auto tiles = r + 32 <= rows ? (j + 32 <= columns ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                        : (j + 32 <= columns ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
            tiles(a + r * a_row, a_row, b + j, b_row, c + r * c_row + j, c_row, depth, add);
        }
    }
}

// ---- qlora_linear ----------------------------------------------------------------------------------------------------
//
// Everything goes in squares of 32 x 32: 32 rows or columns, and 32 values of the depth, a step. An operand A is stored
// [32 rows][step][2 tiles], an operand B [32 columns][step][2 tiles]; kSquare words hold either's square.

constexpr int64_t kSquare = 512, kTile = 256;
constexpr int64_t kDepth = 20;  // steps of a panel that are multiplied together: 40 KB, which the first-level cache holds
constexpr int64_t kPair = 2;    // panels that are decoded together: a block of 64 weights has one look-up table
constexpr int64_t kTall = 16;   // squares of A and panels of C that are worked on together: 640 KB of A and 1 MB of
constexpr int64_t kWide = 16;   // sums, which the second-level cache holds
constexpr int64_t kPanel = kTall * 1024;  // sums of a panel
constexpr int64_t kLargeCopy = int64_t{2} << 20;  // words of A that are not copied whole

inline int64_t squares(int64_t n) { return (n + 31) / 32; }

// Memory that grows and never shrinks, aligned for tiles.
class Buffer {
public:
    ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
    Word* words(int64_t size) {
        if (size > size_) {
            ::operator delete(data_, std::align_val_t(64));
            data_ = nullptr;
            size_ = 0;
            data_ = static_cast<Word*>(::operator new(static_cast<size_t>(size) * sizeof(Word), std::align_val_t(64)));
            size_ = size;
        }
        return data_;
    }

private:
    Word* data_ = nullptr;
    int64_t size_ = 0;
};

// C (32, 32) (+)= A B over some steps.
inline void multiply_squares(const Word* a, const Word* b, int64_t steps, float* c, bool add) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (add) {
        _tile_loadd(0, c, 128);
        _tile_loadd(1, c + 16, 128);
        _tile_loadd(2, c + 512, 128);
        _tile_loadd(3, c + 528, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; ++s, a += kSquare, b += kSquare) {
        _tile_loadd(6, b, 64);
        _tile_stream_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, a + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
}

// Sixteen rows of sixteen words, transposed.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

// Up to 32 values as bfloat16, times a factor; what lies beyond n is zero.
inline __m512i load_values(const BFloat16* x, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1, x);
}

inline __m512i load_values(const void* x, Dtype dtype, int64_t first, int64_t n, float factor) {
    __mmask16 low = n >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << n) - 1);
    __mmask16 high = n >= 32 ? 0xFFFF : n > 16 ? static_cast<__mmask16>((1 << (n - 16)) - 1) : 0;
    __m512 a, b;
    if (dtype == kFloat32) {
        const float* from = static_cast<const float*>(x) + first;
        a = _mm512_maskz_loadu_ps(low, from);
        b = _mm512_maskz_loadu_ps(high, from + 16);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x) + first;
        __m256i first_half = _mm256_maskz_loadu_epi16(low, from), second_half = _mm256_maskz_loadu_epi16(high, from + 16);
        if (dtype == kFloat16) {
            a = _mm512_cvtph_ps(first_half);
            b = _mm512_cvtph_ps(second_half);
        } else {
            a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first_half), 16));
            b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(second_half), 16));
        }
    }
    __m512 by = _mm512_set1_ps(factor);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, by), _mm512_mul_ps(a, by));
}

// Rows 2 i and 2 i + 1 of a square, zipped into row i of B's two tiles; given in the order of `split`.
inline void store_zipped(__m512i even, __m512i odd, Word* out) {
    _mm512_store_si512(out, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(out + kTile, _mm512_unpackhi_epi16(even, odd));
}

// The order that makes zipping within 128 bits give columns 0 to 15 and 16 to 31.
inline __m512i split(__m512i row) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), row); }

// Sixteen rows, transposed word by word into half a square of B.
inline void store_transposed(__m512i (&rows)[16], Word* out) {
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 16 * i, rows[i]);
}

// A square of B from rows and columns of x (rows, columns) on, times a factor and zero beyond its ends: its transpose,
inline void transpose_values(const void* x, Dtype dtype, int64_t rows, int64_t columns, int64_t row, int64_t column,
                             float factor, Word* out) {
    for (int64_t half = 0; half < 2; ++half, row += 16, out += kTile) {
        __m512i values[16];
        for (int i = 0; i < 16; ++i) {
            int64_t n = row + i < rows ? columns - column : 0;
            values[i] = load_values(x, dtype, (row + i) * columns + column, n, factor);
        }
        store_transposed(values, out);
    }
}

// or itself.
inline void zip_values(const void* x, Dtype dtype, int64_t rows, int64_t columns, int64_t row, int64_t column,
                       float factor, Word* out) {
    auto values = [&](int64_t i) {
        return split(load_values(x, dtype, i * columns + column, i < rows ? columns - column : 0, factor));
    };
    for (int64_t i = row; i < row + 32; i += 2, out += 16) store_zipped(values(i), values(i + 1), out);
}

// Reads 32 weights of a row at a time, with a look-up table a row that is made again where the row enters a block.
struct Reader {
    const Weight& w;
    __m512i levels[16];

    void enter(int row, int64_t first, bool begin) {
        if (!begin && (first & (w.blocksize - 1)) != 0) return;
        float scale;
        w.scales(first / w.blocksize, 1, &scale);
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(w.quant_map), _mm512_set1_ps(scale));
        levels[row] = _mm512_broadcast_i64x4(Isa::narrow(scaled, BFloat16{}));
    }
    __m512i look_up(int row, __m128i bytes) const {
        __m512i wide = _mm512_cvtepu8_epi32(bytes);
        __m512i codes = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
        return _mm512_permutexvar_epi16(codes, levels[row]);
    }
    __m128i bytes(int64_t first) const {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.packed + first / 2));
    }
    // Weights first to first + 32; `begin` where the one before them was not read.
    __m512i read(int row, int64_t first, bool begin) {
        if (w.dense) return _mm512_loadu_si512(w.dense + first);
        enter(row, first, begin);
        return look_up(row, bytes(first));
    }
    // The same in the order of `split`.
    __m512i read_split(int row, int64_t first, bool begin) {
        if (w.dense) return split(_mm512_loadu_si512(w.dense + first));
        enter(row, first, begin);
        __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        return look_up(row, _mm_shuffle_epi8(bytes(first), order));
    }
};

// W^T as B: rows n to n + 32 of W, `count` steps of K from k on.
inline void decode_transposed(const Weight& w, int64_t K, int64_t n, int64_t k, int64_t count, Word* out) {
    Reader reader{w, {}};
    for (int64_t half = 0; half < 2; ++half, n += 16, out += kTile) {
        for (int64_t s = 0; s < count; ++s) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) rows[i] = reader.read(i, (n + i) * K + k + 32 * s, s == 0);
            store_transposed(rows, out + s * kSquare);
        }
    }
}

// W as B: `count` steps of N from row n on, `panels` times 32 columns from k on, `stride` words apart.
inline void decode_zipped(const Weight& w, int64_t K, int64_t n, int64_t count, int64_t k, int64_t panels, Word* out,
                          int64_t stride) {
    Reader reader{w, {}};
    for (int64_t s = 0; s < count; ++s, n += 32) {
        for (int64_t i = 0; i < 16; ++i) {
            for (int64_t p = 0; p < panels; ++p) {
                int64_t first = (n + 2 * i) * K + k + 32 * p;
                store_zipped(reader.read_split(0, first, p == 0), reader.read_split(1, first + K, p == 0),
                             out + p * stride + s * kSquare + 16 * i);
            }
        }
    }
}

// Operand A: squares of rows, each `steps` deep. A stretch of the depth lies together for all rows, so that what is
// multiplied in turn is contiguous and spreads over the sets of the cache.
struct Rows {
    Word* words;
    int64_t num_squares, steps;
    int64_t depth = stretch(steps);  // of a stretch, but for a shorter last one

    static int64_t stretch(int64_t steps) {
        int64_t stretches = (steps + kDepth - 1) / kDepth;
        return stretches ? (steps + stretches - 1) / stretches : 1;
    }
    Word* square(int64_t i, int64_t step) const {
        int64_t first = step / depth * depth;
        return words + (first * num_squares + i * std::min(depth, steps - first) + step - first) * kSquare;
    }
};

// C (32, 32) = A B for the square of rows i, over the first `steps` steps.
inline void multiply_rows(const Rows& a, int64_t i, int64_t steps, const Word* b, float* c) {
    for (int64_t step = 0; step < steps; step += a.depth) {
        multiply_squares(a.square(i, step), b + step * kSquare, std::min(a.depth, steps - step), c, step > 0);
    }
}

// Rows of x (M, depth) of square i, step s, as a square of A.
inline void pack_square(const BFloat16* x, int64_t M, int64_t depth, int64_t i, int64_t s, Word* out) {
    for (int64_t m = i * 32; m < i * 32 + 32; ++m, out += 16) {
        _mm512_store_si512(out, m < M ? _mm512_loadu_si512(x + m * depth + 32 * s) : _mm512_setzero_si512());
    }
}

// All steps of those rows.
inline void pack_rows(const BFloat16* x, int64_t M, int64_t depth, int64_t i, const Rows& a) {
    for (int64_t s = 0; s < depth / 32; ++s) pack_square(x, M, depth, i, s, a.square(i, s));
}

// Panels [begin, end) of C = A B; decode(panel, panels, step, count, out) makes squares of B, [panel][step], and
// finish(panel, panels, c) takes C when it is whole: rows of 32 floats, panels kPanel apart. A, up to kTall squares, is packed
// already, or (words null) a stretch at a time from the rows of x (M, columns): each thread for itself, for a depth whose
// copy would be large.
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

// Up to 32 rows of x, columns k to k + 32, as a square of B whose depth they are.
inline void zip_square(const BFloat16* x, int64_t rows, int64_t stride, int64_t k, Word* out) {
    auto row = [&](int64_t r) {
        return r < rows ? split(_mm512_loadu_si512(x + r * stride + k)) : _mm512_setzero_si512();
    };
    for (int64_t r = 0; r < 32; r += 2, out += 16) store_zipped(row(r), row(r + 1), out);
}

// A square of A, 32 rows of 32 values, transposed into another.
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

// A float32 square as bfloat16, in A's order.
inline void round_square(const float* c, Word* out) {
    for (int64_t r = 0; r < 32; ++r, c += 32, out += 16) {
        _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + 16), _mm512_loadu_ps(c)));
    }
}

// C to rows of bfloat16, aligned to 64 bytes, with a bias if there is one; written past the caches, since to read the
// lines first would take longer than to multiply.
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

thread_local Buffer linear_memory;  // of the thread that calls; its helpers share it

void forward_slice(const Weight& w, const Linear& l, int num_threads) {
    int64_t M = l.M, N = l.N, K = l.K, R = l.R, tall = squares(M), steps = K / 32, ranks = squares(R);
    bool separate = R && l.x_lora != l.x;
    Word* words = linear_memory.words((tall * (steps + ranks) + ranks * steps + (separate ? tall * steps : 0)) * kSquare);
    Rows x{words, tall, steps + ranks};  // and x_lora A^T behind it
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

// grad_A and grad_B are added to if `add`.
void backward_slice(const Weight& w, const Linear& l, bool add, int num_threads) {
    int64_t M = l.M, N = l.N, K = l.K, R = l.R, tall = squares(M), steps = N / 32, ranks = squares(R);
    const BFloat16 *grad = static_cast<const BFloat16*>(l.grad_y), *seen = static_cast<const BFloat16*>(l.x_lora);
    bool large = R == 0 && tall * steps * kSquare > kLargeCopy;  // a head's logits
    Word* words = large ? nullptr : linear_memory.words((tall * (steps + 3 * ranks) + ranks * steps) * kSquare);
    Word *gBT = words + tall * (steps + ranks) * kSquare, *xAT = gBT + tall * ranks * kSquare,
         *B = xAT + tall * ranks * kSquare;
    bool joined = l.grad_x_lora == nullptr;
    Rows g{words, tall, joined ? steps + ranks : steps};  // and g B behind it, in one sum or in one of its own
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
    // Panels of small^T big, small^T (R, M) as squares of A and big (M, columns): take(r, column, c) gets 32 x 32.
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

// Rows m and on of a linear, as many as are copied at a time.
inline Linear slice(const Linear& l, int64_t m) {
    Linear part = l;
    part.M = std::min(kTall * 32, l.M - m);
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
    for (int64_t m = 0; m < l.M; m += kTall * 32) forward_slice(w, slice(l, m), num_threads);
}

void linear_backward(const Weight& w, const Linear& l, int num_threads) {
    for (int64_t m = 0; m < l.M; m += kTall * 32) backward_slice(w, slice(l, m), m > 0, num_threads);
}

// Operands of products on AMX tiles: their order in memory, and the packing of codes, rows and gradients.
//
// Operands consist of squares of 32 x 32: 32 rows or columns by one step, 32 values of the depth. An operand A is
// stored as [32 rows][step][2 tiles], an operand B as [32 columns][step][2 tiles]. A square has kSquare words.

constexpr int64_t kSquare = 512, kTile = 256;
constexpr int64_t kDepth = 20;  // steps of a panel that are multiplied together: 40 KB, to fit in the first-level cache
constexpr int64_t kPair = 2;    // panels that are decoded together: a block of 64 weights has one look-up table
// Squares of A and panels of C that are processed together: 640 KB of A and 1 MB of sums, to fit in the second-level
// cache.
constexpr int64_t kTall = kTiledRows / 32, kWide = 16;
constexpr int64_t kPanel = kTall * 1024;          // sums of a panel
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

// Transposes sixteen rows of sixteen words.
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

// Loads up to 32 values as bfloat16, times a factor. Values beyond n are zero.
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

// Interleaves rows 2 i and 2 i + 1 of a square into row i of B's two tiles. The rows have the order of `split`.
inline void store_zipped(__m512i even, __m512i odd, Word* out) {
    _mm512_store_si512(out, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(out + kTile, _mm512_unpackhi_epi16(even, odd));
}

// With this order, interleaving within 128 bits results in columns 0 to 15 and 16 to 31.
inline __m512i split(__m512i row) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), row); }

// Transposes sixteen rows, word by word, into half a square of B.
inline void store_transposed(__m512i (&rows)[16], Word* out) {
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 16 * i, rows[i]);
}

// Packs a square of x (rows, columns), transposed, into a square of B, times a factor and zero beyond the ends of x.
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

// The same, not transposed.
inline void zip_values(const void* x, Dtype dtype, int64_t rows, int64_t columns, int64_t row, int64_t column,
                       float factor, Word* out) {
    auto values = [&](int64_t i) {
        return split(load_values(x, dtype, i * columns + column, i < rows ? columns - column : 0, factor));
    };
    for (int64_t i = row; i < row + 32; i += 2, out += 16) store_zipped(values(i), values(i + 1), out);
}

// Reads 32 weights of a row at a time. Each row has a look-up table, which is made again when the row enters a block. It
// holds the levels of two blocks of 16, or twice those of a larger one.
struct Reader {
    const Weight& w;
    __m512i levels[16];

    void enter(int row, int64_t first, bool begin) {
        if (w.blocksize > 32 && !begin && (first & (w.blocksize - 1)) != 0) return;
        float scale[2];
        w.scales(first / w.blocksize, w.blocksize == 16 ? 2 : 1, scale);
        __m256i low = scaled(scale[0], w.shift(first / w.blocksize)), high = w.blocksize == 16 ? scaled(scale[1], 0.0f) : low;
        levels[row] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    __m256i scaled(float scale, float shift) const {
        __m512 values = _mm512_mul_ps(_mm512_loadu_ps(w.quant_map), _mm512_set1_ps(scale));
        return Isa::narrow(w.shifted ? _mm512_add_ps(values, _mm512_set1_ps(shift)) : values, BFloat16{});
    }
    // `second`: in each of 16 pairs of weights, 16 if it is in the second block of 16.
    __m512i look_up(int row, __m128i bytes, __m128i second) const {
        __m512i wide = _mm512_cvtepu8_epi32(bytes);
        __m512i codes = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
        if (w.blocksize == 16) {
            __m512i half = _mm512_cvtepu8_epi32(second);
            half = _mm512_or_si512(half, _mm512_slli_epi32(half, 16));
            codes = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi16(15)), half);
        }
        return _mm512_permutexvar_epi16(codes, levels[row]);
    }
    static __m128i second_pairs() { return _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16); }
    __m128i bytes(int64_t first) const {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.packed + first / 2));
    }
    // Reads weights first to first + 32; `begin` if the weight before them was not read.
    __m512i read(int row, int64_t first, bool begin) {
        if (w.dense) return _mm512_loadu_si512(w.dense + first);
        enter(row, first, begin);
        return look_up(row, bytes(first), second_pairs());
    }
    // The same in the order of `split`.
    __m512i read_split(int row, int64_t first, bool begin) {
        if (w.dense) return split(_mm512_loadu_si512(w.dense + first));
        enter(row, first, begin);
        __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        return look_up(row, _mm_shuffle_epi8(bytes(first), order), _mm_shuffle_epi8(second_pairs(), order));
    }
};

// Decodes W^T as B: rows n to n + 32 of W, `count` steps of K from k.
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

// Decodes W as B: `count` steps of N from row n, `panels` times 32 columns from k, `stride` words apart.
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

// Operand A: squares of rows, each `steps` deep. A stretch of the depth is contiguous for all rows, so that consecutive
// products read contiguous memory, which is spread over the sets of the cache.
struct Rows {
    Word* words;
    int64_t num_squares, steps;
    int64_t depth = stretch(steps);  // of a stretch; the last one may be shorter

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

// Packs the rows of x (M, depth) of square i, step s, into a square of A.
inline void pack_square(const BFloat16* x, int64_t M, int64_t depth, int64_t i, int64_t s, Word* out) {
    for (int64_t m = i * 32; m < i * 32 + 32; ++m, out += 16) {
        _mm512_store_si512(out, m < M ? _mm512_loadu_si512(x + m * depth + 32 * s) : _mm512_setzero_si512());
    }
}

// Packs all steps of these rows.
inline void pack_rows(const BFloat16* x, int64_t M, int64_t depth, int64_t i, const Rows& a) {
    for (int64_t s = 0; s < depth / 32; ++s) pack_square(x, M, depth, i, s, a.square(i, s));
}

// The loops over blocks, for any instruction set. An instruction set's file includes this inside its own namespace,
// after it defines a struct Isa with
//     max_abs_bits(x, n)                          the largest |x| as bits (NaN and Inf are larger than any number)
//     encode(x, n, inverse, q, out)               n weights, a multiple of 32, to n / 2 bytes
//     decode(bytes, n, levels, scale, out, stream)   the inverse, n a multiple of 32; stream bypasses the caches
//     product_tile<R, M>(w, row, scales, x, K, y, y_stride)   R rows of W against M rows of arranged x
//     kRows                                       the R that fits its registers
//     X                                           float, the element type of arranged x

constexpr uint32_t kLargestFinite = 0x7F7FFFFF;
constexpr float kSmallestAbsmax = 1e-38f;

template <class T>
uint32_t plain_max_abs_bits(const T* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, bits_of(to_float(x[i])) & 0x7FFFFFFF);
    return most;
}

inline uint8_t plain_code(float scaled, const Quantization& q) {
    int interval = 0;
    for (int i = 0; i < 15; ++i) interval += scaled > q.bounds[i];
    return q.order[interval];
}

// The last, short block divides by its absmax, the same as in bitsandbytes. A spare nibble encodes 0.
template <class T>
void encode_tail(const T* x, int64_t n, float absmax, const Quantization& q, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 2) {
        uint8_t high = plain_code(to_float(x[i]) / absmax, q);
        uint8_t low = plain_code(i + 1 < n ? to_float(x[i + 1]) / absmax : 0.0f, q);
        out[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
}

template <class T>
bool quantize_typed(const T* W, const Quantization& q, uint8_t* packed, float* absmax, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        int64_t first = block * q.blocksize, n = std::min(q.blocksize, q.num_weights - first);
        const T* x = W + first;
        bool whole = n == q.blocksize;
        uint32_t most = whole ? Isa::max_abs_bits(x, n) : plain_max_abs_bits(x, n);
        if (most > kLargestFinite) return false;
        float largest = from_bits(most), floor = std::max(largest, kSmallestAbsmax);
        absmax[block] = whole ? largest : floor;
        if (whole) {
            Isa::encode(x, n, 1.0f / floor, q, packed + first / 2);
        } else {
            encode_tail(x, n, floor, q, packed + first / 2);
        }
    }
    return true;
}

bool quantize(const void* W, Dtype dtype, const Quantization& q, uint8_t* packed, float* absmax, int64_t begin,
              int64_t end) {
    if (dtype == kFloat32) return quantize_typed(static_cast<const float*>(W), q, packed, absmax, begin, end);
    if (dtype == kBFloat16) return quantize_typed(static_cast<const BFloat16*>(W), q, packed, absmax, begin, end);
    return quantize_typed(static_cast<const Float16*>(W), q, packed, absmax, begin, end);
}

// Blocks of 16, half a step of `decode`: the levels of several blocks are looked up together and then scaled.
template <class T>
void dequantize_halves(const Weight& w, T* out, int64_t begin, int64_t end) {
    constexpr int64_t kBatch = 64;
    float scales[kBatch], levels[kBatch * 16];
    for (int64_t block = begin; block < end; block += kBatch) {
        int64_t count = std::min(kBatch, end - block), first = block * 16;
        int64_t n = std::min(count * 16, w.num_weights - first), even = n & ~int64_t{31}, whole = n & ~int64_t{15};
        w.scales(block, count, scales);
        Isa::decode(w.packed + first / 2, even, w.quant_map, 1.0f, levels, false);
        for (int64_t i = even; i < n; ++i) {
            uint8_t byte = w.packed[(first + i) / 2];
            levels[i] = w.quant_map[i % 2 ? byte & 15 : byte >> 4];
        }
        for (int64_t i = 0; i < whole; i += Isa::kLanes) {
            Isa::store_as(out + first + i, Isa::mul(Isa::load(levels + i), Isa::set1(scales[i / 16])));
        }
        for (int64_t i = whole; i < n; ++i) convert(levels[i] * scales[i / 16], out[first + i]);
    }
}

template <class T>
void dequantize_typed(const Weight& w, T* out, bool stream, int64_t begin, int64_t end) {
    if (w.blocksize == 16) return dequantize_halves(w, out, begin, end);
    constexpr int64_t kBatch = 64;
    float scales[kBatch];
    for (int64_t block = begin; block < end; ++block) {
        if ((block - begin) % kBatch == 0) w.scales(block, std::min(kBatch, end - block), scales);
        float scale = scales[(block - begin) % kBatch];
        int64_t first = block * w.blocksize, n = std::min(w.blocksize, w.num_weights - first), even = n & ~int64_t{31};
        const float* levels = w.quant_map;
        float own[16];
        if (w.shifted) {  // exact: an integer times 16 bits, twice
            for (int i = 0; i < 16; ++i) own[i] = w.quant_map[i] * scale + w.shift(block);
            levels = own, scale = 1.0f;
        }
        Isa::decode(w.packed + first / 2, even, levels, scale, out + first, stream);
        for (int64_t i = even; i < n; ++i) {
            uint8_t byte = w.packed[(first + i) / 2];
            convert(levels[i % 2 ? byte & 15 : byte >> 4] * scale, out[first + i]);
        }
    }
}

void dequantize(const Weight& w, Dtype dtype, void* out, bool stream, int64_t begin, int64_t end) {
    if (dtype == kFloat32) return dequantize_typed(w, static_cast<float*>(out), stream, begin, end);
    if (dtype == kBFloat16) return dequantize_typed(w, static_cast<BFloat16*>(out), stream, begin, end);
    return dequantize_typed(w, static_cast<Float16*>(out), stream, begin, end);
}

// In a chunk of 128 weights, 64 bytes, nibble j of 32-bit word i (counted from the low end) is weight 8 i + (j ^ 1).
// `arrange` puts that weight's x at [j][i], so that words are shifted and looked up in memory order.
template <class T>
void arrange_typed(const T* x, int64_t M, int64_t K, float* out) {
    int64_t chunks = (K + 127) / 128;
    for (int64_t m = 0; m < M; ++m, x += K) {
        for (int64_t c = 0; c < chunks; ++c, out += 128) {
            for (int64_t j = 0; j < 8; ++j) {
                for (int64_t i = 0; i < 16; ++i) {
                    int64_t k = c * 128 + i * 8 + (j ^ 1);
                    out[j * 16 + i] = k < K ? to_float(x[k]) : 0.0f;
                }
            }
        }
    }
}

void arrange(const void* x, Dtype dtype, int64_t M, int64_t K, void* out) {
    float* to = static_cast<float*>(out);
    if (dtype == kFloat32) return arrange_typed(static_cast<const float*>(x), M, K, to);
    if (dtype == kBFloat16) return arrange_typed(static_cast<const BFloat16*>(x), M, K, to);
    arrange_typed(static_cast<const Float16*>(x), M, K, to);
}

// K is a multiple of 64 and of the blocksize. R rows of W and M rows of x are used at a time: a look-up for M sums,
// a load of x for R sums. A Tile is Isa, or another struct with its product_tile, kRows and type of arranged x.
template <class Tile, int R>
void product_rows(const Weight& w, float* scales, const typename Tile::X* x, int64_t M, int64_t K, float* y,
                  int64_t y_stride, int64_t n) {
    int64_t x_stride = (K + 127) / 128 * 128;
    const uint8_t* row = w.packed + n * K / 2;
    w.scales(n * K / w.blocksize, R * K / w.blocksize, scales);
    for (y += n; M >= 4; M -= 4, x += 4 * x_stride, y += 4 * y_stride) {
        Tile::template product_tile<R, 4>(w, row, scales, x, K, y, y_stride);
    }
    if (M == 3) Tile::template product_tile<R, 3>(w, row, scales, x, K, y, y_stride);
    if (M == 2) Tile::template product_tile<R, 2>(w, row, scales, x, K, y, y_stride);
    if (M == 1) Tile::template product_tile<R, 1>(w, row, scales, x, K, y, y_stride);
}

template <class Tile>
void product_tiled(const Weight& w, const typename Tile::X* x, int64_t M, int64_t K, float* y, int64_t y_stride,
                   int64_t begin, int64_t end) {
    thread_local std::vector<float> scales;
    scales.resize(static_cast<size_t>(Tile::kRows * K / w.blocksize));
    int64_t n = begin;
    if (M > 1) {
        for (; end - n >= Tile::kRows; n += Tile::kRows) {
            product_rows<Tile, Tile::kRows>(w, scales.data(), x, M, K, y, y_stride, n);
        }
    }
    for (; n < end; ++n) product_rows<Tile, 1>(w, scales.data(), x, M, K, y, y_stride, n);
}

void product(const Weight& w, const void* x, Dtype, int64_t M, int64_t K, float* y, int64_t y_stride, int64_t begin,
             int64_t end) {
    product_tiled<Isa>(w, static_cast<const float*>(x), M, K, y, y_stride, begin, end);
}

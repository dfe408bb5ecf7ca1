// Products on AMX. A tile is 16 rows of 64 bytes. One instruction adds the product of A and B, 16 rows of 16 words
// each, to a tile C of 16 x 16 float32. A word is two bfloat16 that are neighbours along the depth.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures all eight tiles at full size. The fence stops the compiler from moving stores past tile loads.
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

// The products of bf16.inl's attention. Rows and columns are multiples of 16.
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

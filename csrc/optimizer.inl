// AdamW with 8-bit states, one block of 256 weights at a time. Included after elementwise.inl. The compiler vectorizes
// these plain loops. Every operation is rounded the same as in onecard/kernels/reference.py.

// Decode a block of n values, absmax[block] map[code], and encode it as the nearest levels' codes (ties go low).
inline void decode_state(const uint8_t* codes, float absmax, const float* map, int64_t n, float* x) {
    for (int64_t i = 0; i < n; ++i) x[i] = map[codes[i]] * absmax;
}

inline void encode_state(const float* x, const float* bounds, int64_t n, uint8_t* codes, float* absmax) {
    float most = 0.0f, scaled[kStateBlock];
    int32_t found[kStateBlock];
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    *absmax = most;
    float divisor = std::max(most, std::numeric_limits<float>::min());
    for (int64_t i = 0; i < n; ++i) {
        scaled[i] = x[i] / divisor;
        found[i] = 0;
    }
    for (int32_t step = kStateBlock / 2; step > 0; step /= 2) {  // counts how many of the 255 bounds are below
        for (int64_t i = 0; i < n; ++i) found[i] += scaled[i] > bounds[found[i] + step - 1] ? step : 0;
    }
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(found[i]);
}

void adamw_8bit(const AdamW8bit& a, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        int64_t first = block * kStateBlock, n = std::min(kStateBlock, a.size - first);
        float *w = a.w + first, m[kStateBlock], v[kStateBlock];
        const float* g = a.grad + first;
        decode_state(a.m_codes + first, a.m_absmax[block], a.m_map, n, m);
        decode_state(a.v_codes + first, a.v_absmax[block], a.v_map, n, v);
        for (int64_t i = 0; i < n; ++i) {
            m[i] = m[i] * a.beta1 + g[i] * a.rest1;
            v[i] = v[i] * a.beta2 + g[i] * g[i] * a.rest2;
            float update = m[i] / (std::sqrt(v[i]) * a.root + a.eps) * a.rate;
            w[i] = w[i] * a.decay - update;
        }
        encode_state(m, a.m_bounds, n, a.m_codes + first, a.m_absmax + block);
        encode_state(v, a.v_bounds, n, a.v_codes + first, a.v_absmax + block);
    }
}

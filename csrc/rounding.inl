// Weights rounded to levels with least error, for onecard/kernels/rounding.py. Included after optimizer.inl. The compiler
// vectorizes these plain loops over lanes. Every operation is rounded on its own and sums have one order, so that all
// instruction sets choose the same.

constexpr int64_t kLanesAtATime = 64;

// The level of each of 64 values, and its number: how many bounds are below the value.
inline void nearest_levels(const float* x, const Levels& l, float* value, int32_t* number) {
    for (int64_t i = 0; i < kLanesAtATime; ++i) {
        value[i] = l.levels[0];
        number[i] = 0;
    }
    for (int b = 0; b + 1 < l.count; ++b) {
        float bound = l.bounds[b], next = l.levels[b + 1];
        for (int64_t i = 0; i < kLanesAtATime; ++i) {
            bool above = x[i] > bound;
            value[i] = above ? next : value[i];
            number[i] += above;
        }
    }
}

void round_columns(const Columns& c, const Levels& l, int64_t begin, int64_t end) {
    float x[kLanesAtATime], scaled[kLanesAtATime], value[kLanesAtATime];
    int32_t number[kLanesAtATime];
    for (int64_t first = begin; first < end; first += kLanesAtATime) {
        int64_t n = std::min(kLanesAtATime, end - first);
        for (int64_t p = c.P - 1; p >= 0; --p) {
            int64_t at = p * c.N + first;
            for (int64_t i = 0; i < n; ++i) x[i] = c.target[at + i];
            for (int64_t i = n; i < kLanesAtATime; ++i) x[i] = 0.0f;
            for (int64_t j = p + 1; j < c.P; ++j) {
                float u = c.U[p * c.P + j];
                const float* D = c.D + j * c.N + first;
                if (n == kLanesAtATime) {
                    for (int64_t i = 0; i < kLanesAtATime; ++i) x[i] += u * D[i];
                } else {
                    for (int64_t i = 0; i < n; ++i) x[i] += u * D[i];
                }
            }
            for (int64_t i = 0; i < kLanesAtATime; ++i) {
                float scale = i < n ? c.scale[at + i] : 0.0f;
                scaled[i] = scale == 0.0f ? 0.0f : x[i] * (1.0f / scale);
            }
            nearest_levels(scaled, l, value, number);
            for (int64_t i = 0; i < n; ++i) {
                c.D[at + i] = c.W[at + i] - value[i] * c.scale[at + i];
                c.number[at + i] = static_cast<uint8_t>(number[i]);
            }
        }
    }
}

void choose_scales(const Blocks& b, const Levels& l, int64_t begin, int64_t end) {
    float scaled[kLanesAtATime], value[kLanesAtATime];
    int32_t number[kLanesAtATime];
    for (int64_t block = begin; block < end; ++block) {
        const float *x = b.x + block * b.blocksize, *weight = b.weight + block * b.blocksize;
        float largest = 0.0f, least = INFINITY;
        for (int64_t i = 0; i < b.blocksize; ++i) largest = std::max(largest, std::fabs(x[i]));
        b.scale[block] = largest;
        for (int64_t s = 0; s < b.num_shares; ++s) {
            float limit = b.shares[s] * largest, inverse = 1.0f / std::max(limit, kSmallestAbsmax), total = 0.0f;
            float sums[kLanesAtATime] = {};
            for (int64_t first = 0; first < b.blocksize; first += kLanesAtATime) {
                int64_t n = std::min(kLanesAtATime, b.blocksize - first);
                for (int64_t i = 0; i < kLanesAtATime; ++i) {
                    float own = i < n ? x[first + i] : 0.0f;
                    scaled[i] = std::min(std::max(own, -limit), limit) * inverse;
                }
                nearest_levels(scaled, l, value, number);
                for (int64_t i = 0; i < n; ++i) {
                    float error = value[i] * limit - x[first + i];
                    sums[i] += error * error * weight[first + i];
                }
            }
            for (int64_t i = 0; i < kLanesAtATime; ++i) total += sums[i];
            if (total < least) {
                least = total;
                b.scale[block] = limit;
            }
        }
    }
}

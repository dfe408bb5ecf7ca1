// Kernels that go over rows of numbers; included after attention.inl. An Isa also has load and store_as for 16-bit types.

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

void cross_entropy(void* logits, Dtype dtype, int64_t V, const int64_t* target, float* losses, int64_t begin,
                   int64_t end) {
    if (dtype == kFloat32) return cross_entropy_typed(static_cast<float*>(logits), V, target, losses, begin, end);
    if (dtype == kBFloat16) return cross_entropy_typed(static_cast<BFloat16*>(logits), V, target, losses, begin, end);
    cross_entropy_typed(static_cast<Float16*>(logits), V, target, losses, begin, end);
}

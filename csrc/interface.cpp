// The plain C interface that onecard/kernels/cpu/library.py loads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "kernels.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(ONECARD_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace onecard;

// Ends the body of a kernel that allocates: no exception may reach ctypes.
#define OR_OUT_OF_MEMORY           \
    catch (const std::bad_alloc&) { \
        return -1;                  \
    }

namespace {

#if defined(ONECARD_HAS_AMX)
// Whether the CPU has AMX for bfloat16 and Linux lets this process use its registers (requested once per process).
bool amx() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    bool tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 1) && (edx >> 22 & 1);
    return tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels* best() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        if (!__builtin_cpu_supports("avx512bf16")) return &kAvx512;
#if defined(ONECARD_HAS_AMX)
        if (amx()) return &kAmx;
#endif
        return &kAvx512Bf16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
#elif defined(__aarch64__)
    return &kNeon;
#endif
    return &kScalar;
}

const Kernels* current = best();

Weight make_weight(const uint8_t* packed, const void* absmax, const float* nested_absmax, const float* dynamic_map,
                   const float* offset, const float* quant_map, int shifted, int64_t num_weights, int64_t blocksize) {
    bool nested = nested_absmax != nullptr;
    return {packed,
            nested ? nullptr : static_cast<const float*>(absmax),
            nested ? static_cast<const uint8_t*>(absmax) : nullptr,
            nested_absmax,
            dynamic_map,
            offset ? *offset : 0.0f,
            quant_map,
            num_weights,
            blocksize,
            nullptr,
            shifted != 0};
}

// Whether an output is too large for the cache and its memory is already allocated: a page that the kernel must still
// allocate is in the cache afterwards.
bool worth_streaming(const void* out, int64_t num_bytes) {
    constexpr int64_t kLarge = int64_t{64} << 20;
    if (num_bytes < kLarge || reinterpret_cast<uintptr_t>(out) % 64 != 0) return false;
#if defined(__linux__)
    uintptr_t size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), last = reinterpret_cast<uintptr_t>(out) + num_bytes - 1;
    unsigned char resident = 0;
    return mincore(reinterpret_cast<void*>(last / size * size), 1, &resident) == 0 && (resident & 1);
#else
    return false;
#endif
}

}  // namespace

EXPORT const char* onecard_isa() { return current->name; }

// Selects an instruction set by name. Returns 0 if this CPU or build does not have it.
EXPORT int onecard_set_isa(const char* name) {
    const Kernels* widest = best();
    const Kernels* known[] = {
        &kScalar,
#if defined(__x86_64__)
        &kAvx2, &kAvx512, &kAvx512Bf16,
#if defined(ONECARD_HAS_AMX)
        &kAmx,
#endif
#elif defined(__aarch64__)
        &kNeon,
#endif
    };
    for (const Kernels* kernels : known) {
        if (std::strcmp(kernels->name, name) == 0) {
            current = kernels;
            return 1;
        }
        if (kernels == widest) break;
    }
    return 0;
}

// Returns a value that Python must share, by name: a structure's size, or a constant; -1 for another name.
EXPORT int64_t onecard_constant(const char* name) {
    const std::pair<const char*, int64_t> known[] = {
        {"interface", 3},  // raise it with any change of a function's arguments or of a structure's fields
        {"sizeof Attention", sizeof(Attention)}, {"sizeof AdamW8bit", sizeof(AdamW8bit)}, {"sizeof Linear", sizeof(Linear)},
        {"nested block", kNestedBlock}, {"state block", kStateBlock}, {"tiled rows", kTiledRows},
    };
    for (auto [own, value] : known) {
        if (std::strcmp(own, name) == 0) return value;
    }
    return -1;
}

EXPORT void onecard_set_gomp(void* gomp_parallel) { set_gomp_parallel(gomp_parallel); }

EXPORT void onecard_watch_contention() { watch_contention(get_gomp_parallel()); }
EXPORT void onecard_set_contended(int contended) { set_contended(contended != 0, get_gomp_parallel()); }
EXPORT int onecard_contended() { return contended(); }
EXPORT void onecard_allow_gathering(int change) { allow_gathering(change); }

// Returns 1, or 0 if a weight is not finite (packed and absmax are then invalid).
EXPORT int onecard_quantize(const void* W, int dtype, int64_t num_weights, int64_t blocksize, const float* bounds,
                            const uint8_t* order, uint8_t* packed, float* absmax, int num_threads) {
    Quantization q{bounds, order, num_weights, blocksize};
    std::atomic<bool> finite{true};
    int64_t num_blocks = (num_weights + blocksize - 1) / blocksize;
    parallel_for(num_blocks, 256, num_threads, [&](int64_t begin, int64_t end) {
        if (!current->quantize(W, static_cast<Dtype>(dtype), q, packed, absmax, begin, end)) finite = false;
    });
    return finite;
}

EXPORT void onecard_dequantize(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                               const float* dynamic_map, const float* offset, const float* quant_map, int shifted,
                               int64_t num_weights, int64_t blocksize, void* out, int dtype, int num_threads) {
    Weight w = make_weight(packed, absmax, nested_absmax, dynamic_map, offset, quant_map, shifted, num_weights, blocksize);
    int64_t num_blocks = (num_weights + blocksize - 1) / blocksize;
    bool stream = worth_streaming(out, num_weights * (dtype == kFloat32 ? 4 : 2));
    parallel_for(num_blocks, 256, num_threads, [&](int64_t begin, int64_t end) {
        current->dequantize(w, static_cast<Dtype>(dtype), out, stream, begin, end);
    });
}

// y (M, N) float32 = x (M, K) W^T directly from the codes; K a multiple of 64 and of the blocksize. Returns 0, or
// -1 without memory.
EXPORT int onecard_product(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                           const float* dynamic_map, const float* offset, const float* quant_map, int shifted, int64_t N,
                           int64_t K, int64_t blocksize, const void* x, int dtype, int64_t M, float* y,
                           int num_threads) try {
    Weight w = make_weight(packed, absmax, nested_absmax, dynamic_map, offset, quant_map, shifted, N * K, blocksize);
    std::unique_ptr<float[]> arranged(new float[static_cast<size_t>(M * ((K + 127) / 128 * 128))]);
    current->arrange(x, static_cast<Dtype>(dtype), M, K, arranged.get());
    parallel_for(N, 16, num_threads, [&](int64_t begin, int64_t end) {
        current->product(w, arranged.get(), static_cast<Dtype>(dtype), M, K, y, N, begin, end);
    });
    return 0;
} OR_OUT_OF_MEMORY

// Returns 1, or 0 if this instruction set has no such kernel. (Every call's last argument is the number of threads.)
EXPORT int onecard_has_linear(int) { return current->linear_forward != nullptr; }

// Computes the forward, or the backward if l.grad_y is set. With blocksize 0, packed is the weight in bfloat16. Returns
// 0, or -1 without memory.
EXPORT int onecard_linear(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                          const float* dynamic_map, const float* offset, const float* quant_map, int shifted,
                          int64_t blocksize, const Linear* l, int num_threads) try {
    Weight w = make_weight(packed, absmax, nested_absmax, dynamic_map, offset, quant_map, shifted, l->N * l->K, blocksize);
    if (blocksize == 0) w.dense = reinterpret_cast<const uint16_t*>(packed);
    (l->grad_y ? current->linear_backward : current->linear_forward)(w, *l, num_threads);
    return 0;
} OR_OUT_OF_MEMORY

EXPORT void onecard_rope(const void* x, const void* cos, const void* sin, void* y, int dtype, int64_t tokens, int64_t H,
                         int64_t D, int64_t period, int back, int num_threads) {
    parallel_for(tokens, 1, num_threads, [&](int64_t begin, int64_t end) {
        current->rope(x, cos, sin, y, static_cast<Dtype>(dtype), H, D, period, back != 0, begin, end);
    });
}

// Computes every head over every document (num_documents + 1 boundaries), or the backward if a.grad_out is set. Returns
// 0, or -1 without memory.
EXPORT int onecard_attention(const Attention* a, const int64_t* boundaries, int64_t num_documents, int num_threads) try {
    std::atomic<int64_t> next{0};
    auto one = a->grad_out ? current->attention_backward : current->attention_forward;
    parallel_for(num_threads, 1, num_threads, [&](int64_t, int64_t) {
        for (int64_t task; (task = next.fetch_add(1)) < num_documents * a->H;) {
            int64_t document = task / a->H;
            one(*a, task % a->H, boundaries[document], boundaries[document + 1]);
        }
    });
    if (!a->grad_out) return 0;
    parallel_for(a->H_kv * a->T, 64, num_threads, [&](int64_t begin, int64_t end) {
        current->attention_reduce(*a, begin, end);
    });
    return 0;
} OR_OUT_OF_MEMORY

EXPORT void onecard_cross_entropy(void* logits, int dtype, int64_t rows, int64_t V, const int64_t* target, float* losses,
                                  int num_threads) {
    parallel_for(rows, 1, num_threads, [&](int64_t begin, int64_t end) {
        current->cross_entropy(logits, static_cast<Dtype>(dtype), V, target, losses, begin, end);
    });
}

EXPORT void onecard_rms_norm(const void* x, const void* delta, const void* w, void* total, void* y, float* rstd, int dtype,
                             int64_t rows, int64_t D, float eps, int num_threads) {
    parallel_for(rows, 1, num_threads, [&](int64_t begin, int64_t end) {
        current->rms_norm(x, delta, w, total, y, rstd, static_cast<Dtype>(dtype), D, eps, begin, end);
    });
}

EXPORT void onecard_rms_norm_backward(const void* grad_y, const void* x, const void* w, const float* rstd,
                                      const void* grad_total, void* grad_x, int dtype, int64_t rows, int64_t D,
                                      int num_threads) {
    parallel_for(rows, 1, num_threads, [&](int64_t begin, int64_t end) {
        current->rms_norm_backward(grad_y, x, w, rstd, grad_total, grad_x, static_cast<Dtype>(dtype), D, begin, end);
    });
}

EXPORT void onecard_swiglu(const void* gate, const void* up, void* y, int dtype, int64_t size, int num_threads) {
    parallel_for(size, 4096, num_threads, [&](int64_t begin, int64_t end) {
        current->swiglu(gate, up, y, static_cast<Dtype>(dtype), begin, end);
    });
}

EXPORT void onecard_swiglu_backward(const void* grad_y, const void* gate, const void* up, void* grad_gate, void* grad_up,
                                    int dtype, int64_t size, int num_threads) {
    parallel_for(size, 4096, num_threads, [&](int64_t begin, int64_t end) {
        current->swiglu_backward(grad_y, gate, up, grad_gate, grad_up, static_cast<Dtype>(dtype), begin, end);
    });
}

EXPORT void onecard_dense_product(const void* W, const void* x, int dtype, int64_t M, int64_t N, int64_t K, float* y,
                                  int num_threads) {
    parallel_for(N, 16, num_threads, [&](int64_t begin, int64_t end) {
        current->dense_product(W, x, static_cast<Dtype>(dtype), M, K, y, N, begin, end);
    });
}

EXPORT void onecard_adamw_8bit(const AdamW8bit* a, int num_threads) {
    parallel_for((a->size + kStateBlock - 1) / kStateBlock, 16, num_threads,
                 [&](int64_t begin, int64_t end) { current->adamw_8bit(*a, begin, end); });
}

EXPORT void onecard_round_columns(const float* target, const float* W, const float* scale, const float* U, int64_t P,
                                  int64_t N, const float* levels, const float* bounds, int count, float* D,
                                  uint8_t* number, int num_threads) {
    Columns c{P, N, target, W, scale, U, D, number};
    Levels l{count, levels, bounds};
    parallel_for(N, 64, num_threads, [&](int64_t begin, int64_t end) { current->round_columns(c, l, begin, end); });
}

EXPORT void onecard_choose_scales(const float* x, const float* weight, int64_t num_blocks, int64_t blocksize,
                                  const float* levels, const float* bounds, int count, const float* shares,
                                  int64_t num_shares, float* scale, int num_threads) {
    Blocks b{blocksize, x, weight, num_shares, shares, scale};
    Levels l{count, levels, bounds};
    parallel_for(num_blocks, 64, num_threads, [&](int64_t begin, int64_t end) { current->choose_scales(b, l, begin, end); });
}

// First fit (data/packing.py): each document goes into the first row with room for it. `free` is a tree over 2 * size
// nodes, of which each is the largest room below it; `size` is a power of two, at least the number of documents.
// Returns the number of rows.
EXPORT int64_t onecard_first_fit(const int32_t* lengths, int64_t num_documents, int64_t room, int32_t* free, int64_t size,
                                 int32_t* row_of, int) {
    std::fill(free, free + 2 * size, static_cast<int32_t>(room));
    int64_t num_rows = 0;
    for (int64_t document = 0; document < num_documents; document++) {
        int64_t node = 1;
        while (node < size) node = 2 * node + (free[2 * node] < lengths[document]);
        row_of[document] = static_cast<int32_t>(node - size);
        num_rows = std::max(num_rows, node - size + 1);
        free[node] -= lengths[document];
        while (node > 1) {
            node /= 2;
            free[node] = std::max(free[2 * node], free[2 * node + 1]);
        }
    }
    return num_rows;
}

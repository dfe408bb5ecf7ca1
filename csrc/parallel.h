// parallel_for: a range cut into parts, of which a free thread takes the next one.
//
// Where torch's own OpenMP runtime (libgomp) is loaded, its threads do the work: a second pool beside it would fight
// for the cores with threads that spin between two of torch's kernels. Elsewhere a small pool of our own does.
#pragma once

#include <cstdint>
#include <functional>

#include "contention.h"

namespace onecard {

using Body = std::function<void(int64_t begin, int64_t end)>;

// Calls body on parts of [0, size), cut at multiples of grain, on up to num_threads threads; returns when all are done.
// How it is cut depends on the threads' speed: what body computes must not depend on it.
// Throws std::bad_alloc, here in the caller's thread, if one of them did.
void parallel_for(int64_t size, int64_t grain, int num_threads, const Body& body);

// GOMP_parallel of the libgomp that torch has loaded, or null for the pool.
void set_gomp_parallel(void* function);
GompParallel get_gomp_parallel();

}  // namespace onecard

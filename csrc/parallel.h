// parallel_for: divides a range into parts. A free thread takes the next part.
//
// If torch's OpenMP runtime (libgomp) is loaded, its threads do the work: a second pool would compete for the cores
// with libgomp's threads, which spin between two of torch's kernels. Otherwise our own small pool does it.
#pragma once

#include <cstdint>
#include <functional>

#include "contention.h"

namespace onecard {

using Body = std::function<void(int64_t begin, int64_t end)>;

// Calls body on parts of [0, size), cut at multiples of grain, on up to num_threads threads; returns when all are done.
// The division depends on the threads' speed, so the results of body must not depend on the division.
// Throws std::bad_alloc in the caller's thread if body threw it in any thread.
void parallel_for(int64_t size, int64_t grain, int num_threads, const Body& body);

// GOMP_parallel of the libgomp that torch has loaded, or null for the pool.
void set_gomp_parallel(void* function);
GompParallel get_gomp_parallel();

}  // namespace onecard

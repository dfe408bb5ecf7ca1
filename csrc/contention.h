// What libgomp's threads do beside other busy processes.
#pragma once

namespace onecard {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Starts, once a process, a thread that looks whether threads of this process wait for a core, and calls set_contended as
// that changes. Linux alone; elsewhere, and where the kernel counts no waits, the machine counts as quiet.
void watch_contention(GompParallel gomp_parallel);

// Whether idle threads sleep (true) or spin for what comes next.
void set_contended(bool contended, GompParallel gomp_parallel);
bool contended();

// Begins (1) or ends (-1) work in which this process starts no other: a child would keep the core that it was started on.
// Inside, the threads of a process on two cores gather on one of them as long as the machine is contended.
void allow_gathering(int change);

}  // namespace onecard

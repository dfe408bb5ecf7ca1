// The behaviour of libgomp's threads while other processes are busy.
#pragma once

namespace onecard {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Starts, once per process, a thread that checks whether this process's threads wait for a core. It calls set_contended
// when that changes. Linux only; elsewhere, and if the kernel does not count waits, the machine counts as quiet.
void watch_contention(GompParallel gomp_parallel);

// Sets whether idle threads sleep (true) or spin until their next work.
void set_contended(bool contended, GompParallel gomp_parallel);
bool contended();

// Begins (1) or ends (-1) work in which this process starts no other: a child would stay on the core of its start.
// During this work, the threads of a process on two cores gather on one of them while the machine is contended.
void allow_gathering(int change);

}  // namespace onecard

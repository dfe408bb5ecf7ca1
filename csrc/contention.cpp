// An idle thread of libgomp spins for milliseconds before it sleeps. On a quiet machine it is awake when its next work
// begins. If another process is busy, it uses the time in which the thread that it waits for could run. Later the
// kernel preempts it in the middle of its work, and the others spin for it. No value of GOMP_SPINCOUNT is right for
// both (benchmarks/contention.py), and libgomp reads it only once. Therefore a thread watches the machine. While
// threads of this process wait for a core:
//
// - libgomp counts more threads than cores, and its threads then spin for 100 turns instead of 300,000. The additional
//   threads are one thread and its own pool, whose members sleep. The threads that compute do not change, and neither
//   do their bits.
// - Two threads that work in step, each with a busy loop on its core, run at the same time for a third of the time, not
//   half: each sleeps while the other is preempted, and sleep earns no share. Together on one core they have their
//   whole share, and a thread that waits frees the core for the other. Therefore they gather there. Every two seconds
//   they check whether the other core is free again. This is measured for two cores, and done only with two.
#include "contention.h"

#if defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace onecard {
namespace {

constexpr auto kEvery = std::chrono::milliseconds(250);
constexpr int kLook = 8;  // times kEvery: how long threads stay gathered before the next check
// The share of the time that a thread waits for a core. Measured on two cores: at most 0.07 alone, and 0.25 or more
// with a busy loop.
constexpr double kBusy = 0.2, kQuiet = 0.15;

// Calls take(id) for each thread of this process.
template <class Take>
void each_thread(const Take& take) {
    DIR* folder = opendir("/proc/self/task");
    if (!folder) return;
    while (dirent* entry = readdir(folder)) {
        if (int id = std::atoi(entry->d_name)) take(id);
    }
    closedir(folder);
}

struct Times {
    uint64_t ran, waited;  // nanoseconds since the thread began
};
using Threads = std::map<int, Times>;

Threads read_times() {
    Threads threads;
    each_thread([&](int id) {
        char path[64];
        std::snprintf(path, sizeof path, "/proc/self/task/%d/schedstat", id);
        unsigned long long ran = 0, waited = 0;
        std::FILE* file = std::fopen(path, "re");
        if (!file) return;  // the thread has ended, or the kernel does not count
        if (std::fscanf(file, "%llu %llu", &ran, &waited) == 2) threads[id] = {ran, waited};
        std::fclose(file);
    });
    return threads;
}

// Returns the thread that ran most between the two samples, and the longest wait of any thread.
std::pair<int, uint64_t> busiest(const Threads& before, const Threads& now) {
    int id = 0;
    uint64_t most = 0, longest = 0;
    for (auto [thread, times] : now) {
        auto found = before.find(thread);
        if (found == before.end()) continue;
        longest = std::max(longest, times.waited - found->second.waited);
        if (times.ran - found->second.ran < most) continue;
        most = times.ran - found->second.ran;
        id = thread;
    }
    return {id, longest};
}

// Returns the core on which a thread ran last, or -1.
int core_of(int id) {
    char path[64], text[1024];
    std::snprintf(path, sizeof path, "/proc/self/task/%d/stat", id);
    std::FILE* file = std::fopen(path, "re");
    if (!file) return -1;
    size_t size = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    text[size] = 0;
    const char* at = std::strrchr(text, ')');                            // the second field's end
    for (int i = 2; at && i < 39; ++i) at = std::strchr(at + 1, ' ');  // to the 39th
    return at ? std::atoi(at + 1) : -1;
}

// Moves threads that may use two cores to one of them, and back.
class Gathering {
public:
    void allow(int change) {
        std::lock_guard<std::mutex> lock(mutex_);
        allowed_ += change;
        if (!allowed_) spread_all();
    }
    bool gather(int core) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!allowed_ || core < 0 || CPU_COUNT(&all_) != 2 || !CPU_ISSET(core, &all_)) return false;
        CPU_ZERO(&one_);
        CPU_SET(core, &one_);
        move(all_, one_);
        return gathered_ = true;
    }
    void spread() {
        std::lock_guard<std::mutex> lock(mutex_);
        spread_all();
    }

private:
    void spread_all() {
        if (gathered_) move(one_, all_);
        gathered_ = false;
    }
    // Does not move threads with another set of cores: the user has set it.
    static void move(const cpu_set_t& from, const cpu_set_t& to) {
        each_thread([&](int id) {
            cpu_set_t found;
            if (sched_getaffinity(id, sizeof found, &found) == 0 && CPU_EQUAL(&found, &from)) {
                sched_setaffinity(id, sizeof to, &to);
            }
        });
    }
    static cpu_set_t process_cores() {
        cpu_set_t cores;
        CPU_ZERO(&cores);
        sched_getaffinity(0, sizeof cores, &cores);
        return cores;
    }

    std::mutex mutex_;
    cpu_set_t all_ = process_cores(), one_;
    int allowed_ = 0;
    bool gathered_ = false;
};

Gathering& gathering() {
    static Gathering* only = new Gathering;
    return *only;
}

// During its lifetime, libgomp counts more threads than cores.
class Crowd {
public:
    explicit Crowd(GompParallel gomp_parallel) : thread_([this, gomp_parallel] {
        gomp_parallel([](void*) {}, nullptr, std::max(1u, std::thread::hardware_concurrency()) + 1, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return done_; });
    }) {}
    ~Crowd() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            done_ = true;
        }
        wake_.notify_one();
        thread_.join();
    }

private:
    std::mutex mutex_;
    std::condition_variable wake_;
    bool done_ = false;
    std::thread thread_;  // the last member: it uses the others
};

// libgomp ends the process if it can't start a thread. Therefore a Crowd needs a process without a memory limit, and
// this test starts as many threads before.
bool has_room_for_threads() {
    for (int limit : {RLIMIT_AS, RLIMIT_DATA}) {
        rlimit found;
        if (getrlimit(limit, &found) != 0 || found.rlim_cur != RLIM_INFINITY) return false;
    }
    std::vector<std::thread> tried;
    bool started = true;
    std::mutex all;
    std::unique_lock<std::mutex> held(all);
    try {
        for (unsigned i = 0; i < std::thread::hardware_concurrency() + 2; ++i) {
            tried.emplace_back([&all] { std::lock_guard<std::mutex> wait(all); });
        }
    } catch (const std::exception&) {
        started = false;
    }
    held.unlock();
    for (std::thread& thread : tried) thread.join();
    return started;
}

std::atomic<Crowd*> crowd{nullptr};  // not destroyed when the process ends: its thread still waits

}  // namespace

bool contended() { return crowd != nullptr; }

void set_contended(bool contended, GompParallel gomp_parallel) {
    if (contended && !crowd && has_room_for_threads()) crowd = new Crowd(gomp_parallel);
    if (!contended) delete crowd.exchange(nullptr);
}

void allow_gathering(int change) { gathering().allow(change); }

void watch_contention(GompParallel gomp_parallel) {
    static std::once_flag once;
    std::call_once(once, [=] {
        try {
            std::thread([=] {
                pthread_setname_np(pthread_self(), "onecard-watch");
                int together = 0;  // for how many more periods threads stay gathered
                auto time = std::chrono::steady_clock::now();
                for (Threads before = read_times(); !before.empty();) {
                    std::this_thread::sleep_for(kEvery);
                    Threads now = read_times();
                    auto later = std::chrono::steady_clock::now();
                    if (together) {  // they wait for each other, so the times show nothing
                        if (--together == 0) gathering().spread();
                    } else {
                        auto [id, longest] = busiest(before, now);
                        double share = longest * 1e-9 / std::chrono::duration<double>(later - time).count();
                        bool again = contended();  // a short burst is not worth two seconds on one core
                        if (share > kBusy) set_contended(true, gomp_parallel);
                        if (share < kQuiet) set_contended(false, gomp_parallel);
                        if (again && contended() && gathering().gather(core_of(id))) together = kLook;
                    }
                    before = std::move(now);
                    time = later;
                }
            }).detach();
        } catch (const std::exception&) {  // no thread can start: the machine is not watched
        }
    });
}

}  // namespace onecard

#else

namespace onecard {

bool contended() { return false; }
void set_contended(bool, GompParallel) {}
void watch_contention(GompParallel) {}
void allow_gathering(int) {}

}  // namespace onecard

#endif

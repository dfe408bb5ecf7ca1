#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace onecard {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

// One call's parts; whoever is free takes the next one. What a body throws must not leave a runtime's thread.
struct Work {
    const Body* body;
    int64_t size, part;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};

    void run() noexcept {
        try {
            for (int64_t begin; (begin = next.fetch_add(part)) < size;) (*body)(begin, std::min(size, begin + part));
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    }
};

// Threads that sleep between calls. It is never destroyed: a thread may still wait in it when the process ends.
class Pool {
public:
    void run(Work& work, int num_helpers) {
        std::lock_guard<std::mutex> one_call(calls_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < num_helpers) {
                threads_.emplace_back([this] { serve(); });
                threads_.back().detach();
            }
            work_ = &work;
            wanted_ = num_helpers;
        }
        wake_.notify_all();
        work.run();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;
        done_.wait(lock, [this] { return busy_ == 0; });
        work_ = nullptr;
    }

private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            Work* work = work_;
            lock.unlock();
            work->run();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex calls_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    Work* work_ = nullptr;
    int wanted_ = 0, busy_ = 0;
};

}  // namespace

void set_gomp_parallel(void* function) { gomp_parallel = reinterpret_cast<GompParallel>(function); }

void parallel_for(int64_t size, int64_t grain, int num_threads, const Body& body) {
    int64_t num_parts = std::min<int64_t>(num_threads, (size + grain - 1) / grain);
    if (num_parts <= 1) {
        if (size > 0) body(0, size);
        return;
    }
    int64_t part = (size + num_parts - 1) / num_parts;
    Work work{&body, size, (part + grain - 1) / grain * grain};
    if (gomp_parallel) {
        gomp_parallel([](void* w) { static_cast<Work*>(w)->run(); }, &work, static_cast<unsigned>(num_parts), 0);
    } else {
        static Pool* pool = new Pool;
        pool->run(work, static_cast<int>(num_parts) - 1);
    }
    if (work.out_of_memory) throw std::bad_alloc();
}

}  // namespace onecard

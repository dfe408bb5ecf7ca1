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

GompParallel gomp_parallel = nullptr;

constexpr int64_t kParts = 8;  // no part is smaller than a thread's share divided by this

// The parts of one call. A free thread takes the next part: half of a thread's share of the rest, so that a preempted
// thread leaves little work to wait for. An exception of a body must not leave a runtime's thread.
struct Work {
    Work(const Body& body, int64_t size, int64_t grain, int64_t num_threads)
        : body(&body), size(size), grain(grain), num_threads(num_threads),
          smallest(whole_grains(size / (kParts * num_threads) + 1)) {}

    const Body* body;
    int64_t size, grain, num_threads, smallest;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};

    void run() noexcept {
        try {
            for (int64_t begin, end; take(begin, end);) (*body)(begin, end);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    }

private:
    bool take(int64_t& begin, int64_t& end) {
        begin = next;
        do {
            if (begin >= size) return false;
            end = std::min(size, begin + std::max(smallest, whole_grains((size - begin) / (2 * num_threads))));
        } while (!next.compare_exchange_weak(begin, end));
        return true;
    }
    int64_t whole_grains(int64_t n) const { return (n + grain - 1) / grain * grain; }
};

// Threads that sleep between calls. The pool is never destroyed: a thread may still wait in it when the process ends.
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
GompParallel get_gomp_parallel() { return gomp_parallel; }

void parallel_for(int64_t size, int64_t grain, int num_threads, const Body& body) {
    int64_t num_parts = std::min<int64_t>(num_threads, (size + grain - 1) / grain);
    if (num_parts <= 1) {
        if (size > 0) body(0, size);
        return;
    }
    Work work(body, size, grain, num_threads);
    if (gomp_parallel) {
        gomp_parallel([](void* w) { static_cast<Work*>(w)->run(); }, &work, static_cast<unsigned>(num_parts), 0);
    } else {
        static Pool* pool = new Pool;
        pool->run(work, static_cast<int>(num_parts) - 1);
    }
    if (work.out_of_memory) throw std::bad_alloc();
}

}  // namespace onecard

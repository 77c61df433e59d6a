// A thread pool in which the caller computes too and does not wait for helpers that are not running.
//
// OpenMP waits at the end of each parallel region for every thread of the team. If another process has taken
// a core, it waits until the scheduler gives the core back: milliseconds in each of a step's hundred regions,
// which with busy neighbours on two cores made steps more than ten times as slow. Here the caller takes
// pieces of work itself; a helper that is not running takes none. The caller only waits for helpers that are
// inside a piece. Whoever waits spins for a moment, in which the other side is usually done, and then gives
// its core away: a helper that was stopped inside a piece, by a neighbour or a quota, may need that very core.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

class Pool {
  public:
    // Set how many threads compute, the caller included, on how many cores. Helpers are never ended; they sleep
    // without work. With more threads than cores, a thread that spins would keep another one from running.
    void resize(int threads, int cores) {
        const std::lock_guard<std::mutex> guard(busy_);
        wanted_.store(threads - 1);
        spins_.store(threads > cores ? 0 : SPINS);
        for (; started_ < threads - 1; ++started_) std::thread(&Pool::help, this, started_).detach();
    }

    int threads() const { return wanted_.load(std::memory_order_relaxed) + 1; }

    // Call function(i) for each i below count, in any order, on any of the threads.
    template <typename F>
    void run(int64_t count, const F& function) {
        // While another engine of this process uses the pool, the caller computes alone.
        if (count > 1 && wanted_.load(std::memory_order_relaxed) > 0 && busy_.try_lock()) {
            share(count, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &function);
            busy_.unlock();
        } else {
            for (int64_t i = 0; i < count; ++i) function(i);
        }
    }

  private:
    using Call = void (*)(const void*, int64_t);
    static constexpr int SPINS = 4000;  // about 50 microseconds, longer than the time between two layers

    void share(int64_t count, Call call, const void* function) {
        call_ = call, function_ = function, count_ = count;
        next_.store(0);
        open_.store(true);
        job_.fetch_add(1);
        job_.notify_all();
        work();
        open_.store(false);
        for (int spin = 0; helping_.load() > 0 && spin < spins_.load(); ++spin) pause();
        for (int32_t helping; (helping = helping_.load()) > 0;) helping_.wait(helping);
    }

    void work() {
        for (int64_t i; (i = next_.fetch_add(1)) < count_;) call_(function_, i);
    }

    void help(int number) {
        for (uint32_t done = 0;;) {
            for (int spin = 0; job_.load() == done && spin < spins_.load(); ++spin) pause();
            job_.wait(done);
            done = job_.load();
            if (number >= wanted_.load()) continue;
            // Either the caller sees that this thread helps, or this thread sees that the job is closed.
            helping_.fetch_add(1);
            if (open_.load()) work();
            if (helping_.fetch_sub(1) == 1) helping_.notify_one();
        }
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        _mm_pause();
#else
        std::this_thread::yield();
#endif
    }

    std::mutex busy_;
    int started_ = 0;
    std::atomic<int> wanted_{0}, spins_{SPINS};
    std::atomic<int32_t> helping_{0};
    std::atomic<bool> open_{false};
    std::atomic<uint32_t> job_{0};
    std::atomic<int64_t> next_{0};
    Call call_ = nullptr;
    const void* function_ = nullptr;
    int64_t count_ = 0;
};

// The pool of the process; never destroyed, because its threads are never ended.
inline Pool& pool() {
    static Pool* const it = new Pool;
    return *it;
}

// Call function(first, end) for ranges of at most `piece` numbers that cover 0 ... count - 1.
template <typename F>
void in_pieces(int64_t count, int64_t piece, const F& function) {
    pool().run((count + piece - 1) / piece, [&](int64_t i) {
        const int64_t first = i * piece;
        function(first, first + piece < count ? first + piece : count);
    });
}

// Sums and gathers over the ranks of a stage; see exchange.h.

#include "exchange.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// Sleep until the number is another one, or some time has passed. std::atomic's own wait is within a process.
void sleep_while(std::atomic<uint32_t>& number, uint32_t value) {
#if defined(__linux__)
    const timespec most = {0, 100'000'000};
    syscall(SYS_futex, &number, FUTEX_WAIT, value, &most, nullptr, 0);
#else
    std::this_thread::sleep_for(std::chrono::microseconds(20));
#endif
}

void wake_all(std::atomic<uint32_t>& number) {
#if defined(__linux__)
    syscall(SYS_futex, &number, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

Place& place(Exchange& exchange, int64_t rank) {
    const int64_t size = sizeof(Place) + 2 * exchange.capacity;
    return *reinterpret_cast<Place*>(exchange.segment + rank * size);
}

char* slot(Exchange& exchange, int64_t rank) {
    return reinterpret_cast<char*>(&place(exchange, rank) + 1) + exchange.round % 2 * exchange.capacity;
}

bool reached(const Place& other, uint32_t round) { return int32_t(other.round.load() - round) >= 0; }

// Wait until another rank has written its slot; return false if it does not.
bool wait_for(Exchange& exchange, Place& other, uint32_t round) {
    for (int64_t spin = 0; spin < exchange.spins; ++spin, pause())
        if (reached(other, round)) return true;
    const auto began = std::chrono::steady_clock::now();
    const std::chrono::duration<double> most(exchange.timeout);
    // Either this rank sees the round that the other one has stored, or the other one sees that it sleeps.
    other.sleepers.fetch_add(1);
    bool done;
    while (!(done = reached(other, round)) && std::chrono::steady_clock::now() - began < most) {
        const uint32_t seen = other.round.load();
        if (int32_t(seen - round) < 0) sleep_while(other.round, seen);
    }
    other.sleepers.fetch_sub(1);
    return done;
}

// Write `bytes` into this rank's slot of the next round, and wait for those of all others.
bool meet(Exchange& exchange, const void* mine, int64_t bytes) {
    if (exchange.failed) return false;
    const uint32_t round = uint32_t(++exchange.round);
    std::memcpy(slot(exchange, exchange.rank), mine, bytes);
    Place& own = place(exchange, exchange.rank);
    own.round.store(round);
    if (own.sleepers.load()) wake_all(own.round);
    for (int64_t rank = 0; rank < exchange.ranks; ++rank)
        if (rank != exchange.rank && !wait_for(exchange, place(exchange, rank), round)) {
            exchange.failed = 1;
            return false;
        }
    return true;
}

}  // namespace

void all_reduce(Exchange& exchange, float* x, int64_t count) {
    const int64_t most = exchange.capacity / int64_t(sizeof(float));
    for (int64_t first = 0; first < count; first += most) {
        const int64_t size = std::min(most, count - first);
        float* const to = x + first;
        if (!meet(exchange, to, size * sizeof(float))) return;
        for (int64_t rank = 0; rank < exchange.ranks; ++rank) {
            const float* const from = reinterpret_cast<const float*>(slot(exchange, rank));
            if (rank == 0)
                std::memcpy(to, from, size * sizeof(float));
            else
                for (int64_t i = 0; i < size; ++i) to[i] += from[i];
        }
    }
}

extern "C" {

int64_t exchange_size(int64_t ranks, int64_t capacity) { return ranks * (sizeof(Place) + 2 * capacity); }

void exchange_sum(Exchange* exchange, float* x, int64_t count) { all_reduce(*exchange, x, count); }

// Gather `bytes` of each rank into all[rank].
void exchange_gather(Exchange* exchange, const char* mine, int64_t bytes, char* all) {
    for (int64_t first = 0; first < bytes; first += exchange->capacity) {
        const int64_t size = std::min(exchange->capacity, bytes - first);
        if (!meet(*exchange, mine + first, size)) return;
        for (int64_t rank = 0; rank < exchange->ranks; ++rank)
            std::memcpy(all + rank * bytes + first, slot(*exchange, rank), size);
    }
}

}  // extern "C"

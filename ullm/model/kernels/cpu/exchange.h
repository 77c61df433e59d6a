// Sums and gathers over the ranks of a stage, which are processes on one machine, through memory that they share.
//
// A message over a socket wakes the other process through the kernel, some 50 to 100 microseconds, and a step
// has two sums per layer. Here each rank writes its numbers into a slot of its own, says which round it has
// reached, and reads those of all others; whoever is early spins for a moment and then sleeps. There are two
// slots per rank, used in turn: a rank is at most one round ahead of the slowest, which has then read the slot
// before. Sums are added in the order of the ranks, so they are equal on all ranks, bit by bit.

#pragma once

#include <atomic>
#include <cstdint>

// The first cache line of each rank's part of the segment, which begins as zeros.
struct alignas(64) Place {
    std::atomic<uint32_t> round;     // the last one whose slot is written
    std::atomic<uint32_t> sleepers;  // ranks that wait for the next one
};

// One rank's view of the segment: `ranks` parts of a Place and two slots of `capacity` bytes. As in exchange.py.
struct Exchange {
    char* segment;
    int64_t ranks, rank, capacity, spins;
    double timeout;  // seconds without an answer after which it fails, for good
    int64_t round, failed;
};

void all_reduce(Exchange& exchange, float* x, int64_t count);

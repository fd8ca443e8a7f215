// Work shared out among the threads that torch has, and memory that a thread keeps for it.
//
// A library is one source, so what is defined here is defined once in each.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

using Run = void (*)(void*);
using Fork = void (*)(Run, void*, unsigned, unsigned);
using WithTeam = void (*)(Run, void*, int32_t);
Fork fork_threads = nullptr;  // GOMP_parallel of the runtime that torch has loaded, or a team of its threads
bool (*leads)() = nullptr;    // whether this thread has such a team: team.cpp
WithTeam with_team = nullptr;

template <class Work> struct Queue {
    std::atomic<int> taken{0};
    int size;
    const Work& work;
    static void run(void* self) {
        auto& queue = *static_cast<Queue*>(self);
        for (int i; (i = queue.taken++) < queue.size;) queue.work(queue.size - 1 - i);
    }
};

// work(i) of every i < size, the last first: where some take longer, they belong there, or would be waited
// for. Waking threads costs microseconds, more where they are many, so little work is for 1 thread; but their
// number never changes, since that would make the runtime end some and start others.
template <class Work> void for_each(int size, int threads, const Work& work) {
    Queue<Work> queue{{}, size, work};
    if (threads > 1 && size > 1 && fork_threads) fork_threads(Queue<Work>::run, &queue, unsigned(threads), 0);
    else Queue<Work>::run(&queue);
}

// Work that reads memory from one end to the other, shared out in stretches: each thread goes on where it was,
// and takes from the stretches of others when its own is done.
template <class Work> class Stretches {
    static constexpr int MOST = 32;
    struct alignas(64) Stretch {
        std::atomic<int> next;
        int end;
    };
    Stretch stretches[MOST];
    const int count;
    std::atomic<int> joined{0};
    const Work& work;

public:
    Stretches(int size, int threads, const Work& work) : count(threads < MOST ? threads : MOST), work(work) {
        for (long s = 0; s < count; ++s) {
            stretches[s].next = int(size * s / count);
            stretches[s].end = int(size * (s + 1) / count);
        }
    }

    static void run(void* self) {
        auto& all = *static_cast<Stretches*>(self);
        const int own = all.joined++;
        for (int s = 0; s < all.count; ++s) {
            Stretch& stretch = all.stretches[(own + s) % all.count];
            for (int i; (i = stretch.next++) < stretch.end;) all.work(i);
        }
    }
};

// work(i) of every i < size, upwards in a few stretches.
template <class Work> void for_stretches(int size, int threads, const Work& work) {
    if (threads < 2 || size < 2 || !fork_threads) {
        for (int i = 0; i < size; ++i) work(i);
        return;
    }
    Stretches<Work> stretches(size, threads, work);
    fork_threads(Stretches<Work>::run, &stretches, unsigned(threads), 0);
}

// What work must exceed to be shared out, of what it must where threads have to be woken for it.
inline double least() { return leads && leads() ? 1.0 / 16 : 1.0; }

inline long rounded(long count, long by) { return (count + by - 1) / by * by; }

// Grows and never shrinks; contents are lost when it grows.
template <class T> class Buffer {
    std::unique_ptr<T, decltype(&std::free)> memory{nullptr, std::free};
    long size = 0;

public:
    T* of(long count) {
        if (count > size) {
            const long bytes = rounded(count * long(sizeof(T)), 64);
            memory.reset(static_cast<T*>(std::aligned_alloc(64, size_t(bytes))));
            if (!memory) std::abort();
            size = count;
        }
        return memory.get();
    }
};

}  // namespace

extern "C" void use_threads(void* fork, void* leads, void* with_team) {
    ::fork_threads = reinterpret_cast<Fork>(fork);
    ::leads = reinterpret_cast<bool (*)()>(leads);
    ::with_team = reinterpret_cast<WithTeam>(with_team);
}

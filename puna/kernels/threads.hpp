// Work shared out among the threads that torch has, and memory that a thread keeps for it.
//
// A library is one source, so what is defined here is defined once in each.

#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>

namespace {

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
Fork fork_threads = nullptr;  // GOMP_parallel of the runtime that torch has loaded: one pool for both

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
// for. Waking a team costs microseconds, more for a large one, so little work is for 1 thread; but the size of
// a team never changes, since that would make the runtime end threads and start others.
template <class Work> void for_each(int size, int threads, const Work& work) {
    Queue<Work> queue{{}, size, work};
    if (threads > 1 && size > 1 && fork_threads) fork_threads(Queue<Work>::run, &queue, unsigned(threads), 0);
    else Queue<Work>::run(&queue);
}

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

extern "C" void use_threads(void* fork) { fork_threads = reinterpret_cast<Fork>(fork); }

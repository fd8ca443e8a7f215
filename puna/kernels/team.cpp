// Threads that wait for work during a pass instead of sleeping: a piece is handed to them in a fraction of a
// microsecond, where waking them takes tens.
//
// The threads are those of torch's own pool, taken for the length of a pass. One of them, the caller's, leads;
// the others look at one word for the next piece, and share it with the leader. The leader closes the piece
// when its own part of it is done, and waits for those only who had joined: a thread that the system keeps from
// running holds nobody up. Whoever has looked for long lets others run between two looks.

#include <atomic>
#include <cstdint>
#include <thread>

namespace {

using Run = void (*)(void*);
using Fork = void (*)(Run, void*, unsigned, unsigned);
Fork fork_threads = nullptr;  // GOMP_parallel of the runtime that torch has loaded

constexpr int LOOKS = 3000;  // before the processor is offered to others: some tens of microseconds

class Patience {
    int looks = 0;

public:
    void wait() {
        if (++looks > LOOKS) return std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

class Team;
thread_local Team* led = nullptr;  // the team that this thread leads

class Team {
    static constexpr uint64_t PIECE = uint64_t(1) << 33, OPEN = uint64_t(1) << 32, OVER = ~uint64_t(0);
    alignas(64) std::atomic<uint64_t> word{0};  // number of the piece, whether it is open, how many have joined
    Run run = nullptr;
    void* data = nullptr;
    alignas(64) std::atomic<uint32_t> done{0};  // of those who joined
    alignas(64) uint64_t piece = 0;
    bool sharing = false;
    const std::thread::id leader = std::this_thread::get_id();
    const Run pass;
    void* const given;

public:
    Team(Run pass, void* given) : pass(pass), given(given) {}

    static void enter(void* self) {
        auto& team = *static_cast<Team*>(self);
        if (std::this_thread::get_id() == team.leader) team.lead();
        else team.serve();
    }

    void share(Run run, void* data) {
        if (sharing) return run(data);  // from within a piece
        sharing = true;
        this->run = run, this->data = data;
        done.store(0, std::memory_order_relaxed);
        word.store((piece += PIECE) | OPEN, std::memory_order_release);
        run(data);
        const uint32_t joined = uint32_t(word.fetch_and(~OPEN));
        for (Patience patience; done.load(std::memory_order_acquire) != joined;) patience.wait();
        sharing = false;
    }

private:
    void lead() {
        led = this;
        pass(given);
        led = nullptr;
        word.store(OVER, std::memory_order_release);
    }

    void serve() {
        uint64_t last = 0, now;
        Patience patience;
        while ((now = word.load(std::memory_order_acquire)) != OVER) {
            if (!(now & OPEN) || now / PIECE == last) {
                patience.wait();
            } else if (word.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) {
                last = now / PIECE;
                run(data);
                done.fetch_add(1, std::memory_order_release);
                patience = {};
            }
        }
    }
};

}  // namespace

extern "C" void use_threads(void* fork, void*, void*) { fork_threads = reinterpret_cast<Fork>(fork); }

// As GOMP_parallel, with the caller's team where it leads one.
extern "C" void share(Run run, void* data, unsigned threads, unsigned flags) {
    if (led) led->share(run, data);
    else if (fork_threads) fork_threads(run, data, threads, flags);
    else run(data);
}

// Whether the caller leads a team.
extern "C" bool leads() { return led; }

// pass(given), on this thread, with a team of this many threads at hand.
extern "C" void with_team(Run pass, void* given, int32_t threads) {
    if (threads < 2 || led || !fork_threads) return pass(given);
    Team team(pass, given);
    fork_threads(Team::enter, &team, unsigned(threads), 0);
}

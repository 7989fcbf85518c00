// A team of threads for kernels on the CPU that take microseconds: included by the kernels of pangu and recsys.

#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace kernels {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Helpers that wait actively for a short while, since the next product of a step follows within microseconds, and then
// sleep. Each thread goes through a part of its own, block by block, as a stream through memory is read best, and then
// helps with the others' parts: a core that another process holds delays no more than a block.
class Team {
 public:
  static Team& get() {
    static Team* team = new Team();  // never destroyed: its threads may outlive static destruction
    return *team;
  }

  // Threads that share the work, the caller's own included.
  int size() const { return helpers_ + 1; }

  template <typename Body>
  void run(int blocks, const Body& body) {
    // A forked child has no helpers; a second caller finds them busy.
    if (helpers_ == 0 || blocks <= 1 || getpid() != home_ || busy_.exchange(true, std::memory_order_acquire)) {
      for (int block = 0; block < blocks; ++block) body(block);
      return;
    }
    call_ = [](const void* context, int block) { (*static_cast<const Body*>(context))(block); };
    context_ = &body;
    for (int part = 0; part <= helpers_; ++part) {
      parts_[part].next.store(static_cast<int>(int64_t(blocks) * part / (helpers_ + 1)), std::memory_order_relaxed);
      parts_[part].end = static_cast<int>(int64_t(blocks) * (part + 1) / (helpers_ + 1));
    }
    inside_.store(kOpen, std::memory_order_release);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE_PRIVATE, helpers_);
    work(0);
    // Nothing is left to begin. Helpers inside finish their blocks; one that has not come yet, since its core was busy
    // with something else, is not waited for.
    inside_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; inside_.load(std::memory_order_acquire) != 0; ++spins)
      if (spins < kSpins)
        pause_cpu();
      else
        sched_yield();
    busy_.store(false, std::memory_order_release);
  }

 private:
  Team() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    int cores = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
    helpers_ = std::min(cores, kMost) - 1;
    for (int i = 1; i <= helpers_; ++i) std::thread([this, i] { loop(i); }).detach();
  }

  void futex(int operation, int value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&round_), operation, value, nullptr, nullptr, 0);
  }

  void work(int own) {
    for (int i = 0; i <= helpers_; ++i) {
      Part& part = parts_[(own + i) % (helpers_ + 1)];
      for (int block; (block = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) call_(context_, block);
    }
  }

  void loop(int own) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (round_.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          pause_cpu();
          continue;
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        if (round_.load(std::memory_order_seq_cst) == seen) futex(FUTEX_WAIT_PRIVATE, static_cast<int>(seen));
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = round_.load(std::memory_order_acquire);
      uint32_t state = inside_.load(std::memory_order_acquire);
      while ((state & kOpen) != 0 && !inside_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      }
      if ((state & kOpen) == 0) continue;
      work(own);
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  struct alignas(64) Part {
    std::atomic<int> next{0};
    int end = 0;
  };

  static constexpr int kSpins = 4000;  // about 0.1 ms
  static constexpr int kMost = 16;
  static constexpr uint32_t kOpen = 1u << 16;
  int helpers_ = 0;
  const pid_t home_ = getpid();
  std::atomic<bool> busy_{false};
  std::atomic<uint32_t> round_{0};
  std::atomic<uint32_t> inside_{0};  // helpers at work, and whether more may come
  std::atomic<int> sleepers_{0};
  Part parts_[kMost];
  void (*call_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
};

}  // namespace kernels

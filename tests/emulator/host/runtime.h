// What the parts of the emulator's runtime know of each other. Kernels see only cuda_host.h.
//
//   faults.cpp     what went wrong, and how a launch ends early: by a check, a signal, or the time limit
//   scheduler.cpp  threads as fibers, barriers, the order in which threads and blocks run
//   warp.cpp       what a warp does together: shuffles, votes, mma, ldmatrix
//   memory.cpp     global and shared memory between guard zones, cp.async, the checker of every access
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fiber.h"

#define TTR_API extern "C" __attribute__((visibility("default")))
#define TTR_CALLER __builtin_return_address(0)

struct ttr_index {
  unsigned x, y, z;
};

namespace emulator {

constexpr int max_threads = 1024;
constexpr int warp_size = 32;
constexpr size_t stack_bytes = 128 << 10;
constexpr size_t page = 4096;

enum class State : uint8_t { ready, waiting, finished };

struct AsyncCopy {
  char* to;
  const char* from;
  int bytes, from_source, group;  // bytes past from_source are zeros
  bool at_issue;
  const void* where;
};

// What a lane brings to a warp operation, and what it takes home.
struct Operands {
  unsigned a[4], b[2];
  float c[4];
  uint64_t value;
  int lane;
  const void* row;
};

struct Thread {
  Context context;
  char* stack;
  int number;
  ttr_index index;
  State state;
  const char* waits_for;
  const void* waits_at;
  Operands operands;
  std::vector<AsyncCopy> copies;
  int open_group;
  uint32_t* clock;  // clock[t]: how much of thread t's past is known to have happened before now
};

struct Machine {
  Thread threads[max_threads];
  Thread* current = nullptr;  // null while the launching code itself runs
  Context launcher;
  int thread_count = 0, live = 0;
  ttr_index block, block_size, grid_size;
  bool aborted = false;
  bool checking = false;
  uint64_t seed = 0;
};
extern Machine machine;

// --- faults.cpp
// Notes a fault (once for each kind and place) and goes on, unless there are many by now.
void fault(const char* kind, const void* where, const char* format, ...) __attribute__((format(printf, 3, 4)));
// Notes a fault after which going on has no meaning.
[[noreturn]] void fail(const char* kind, const void* where, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
void clear_faults();
int fault_count();

// Turns crashes of a kernel into faults while it lives.
class SignalGuard {
 public:
  explicit SignalGuard(double seconds);
  ~SignalGuard();
};

// --- scheduler.cpp
uint32_t random_bits();  // a function of the seed
inline bool randomised() { return machine.seed != 0; }
void wait_for(const char* what, const void* where);
void wake(Thread& thread);
void let_others_run();
[[noreturn]] void return_to_launcher();
bool on_a_stack(uintptr_t address);

// --- warp.cpp
void begin_block_of_warps();
void check_exit(Thread& thread);

// --- memory.cpp
enum class Access { read, write, atomic };
void begin_launch(const void* entry);
void begin_block(size_t dynamic_bytes);
void end_block();
void check_guards();
void check_access(const void* address, size_t bytes, Access access, const void* where);
void require_shared(const void* address, size_t bytes, const char* what, const void* where);
void release(Thread& thread, std::vector<uint32_t>& clock);        // what the thread did becomes visible...
void acquire(Thread& thread, const std::vector<uint32_t>& clock);  // ...to those who wait for it

}  // namespace emulator

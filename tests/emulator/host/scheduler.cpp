// Threads as fibers, the order in which they run, barriers, and the launch of a grid.
//
// Blocks run one after another, in an order drawn from the seed; so do the threads of a block, each until it must wait.
// Seed 0 takes them in turn. Any other seed gives the warps priorities, which change now and then, and runs a random
// lane of the foremost warp that can run: one warp gets as far ahead of the others as the barriers allow.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "runtime.h"

#if defined(__x86_64__) && !defined(TTR_UCONTEXT)
asm(".text\n.globl ttr_switch_stack\n.hidden ttr_switch_stack\n.type ttr_switch_stack,@function\n"
    "ttr_switch_stack:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size ttr_switch_stack,.-ttr_switch_stack\n");
#endif

namespace emulator {

Machine machine;

namespace {

uint64_t random_state;
unsigned ready[warp_size];  // by warp, a bit for each lane that can run
uint32_t priority[warp_size];
int last_run;
void (*kernel)(void*);
void* kernel_arguments;

struct Barrier {
  int expected, arrived;
  const char* file;
  int line;
  std::vector<Thread*> waiting;
  std::vector<uint32_t> clock;
  int count, all, any;  // of the predicates brought so far
  int result[3];        // the same, when the barrier last opened
};
Barrier barriers[16];

int warps() { return (machine.thread_count + warp_size - 1) / warp_size; }

// The next thread to run, taken out of the ready set; null if all wait.
Thread* next_thread() {
  int warp = -1, lane;
  if (randomised()) {
    if ((random_bits() & 255) == 0) priority[random_bits() % warp_size] = random_bits();
    for (int w = 0; w < warps(); ++w)
      if (ready[w] && (warp < 0 || priority[w] > priority[warp])) warp = w;
    if (warp < 0) return nullptr;
    unsigned lanes = ready[warp];
    for (unsigned skip = random_bits() % static_cast<unsigned>(__builtin_popcount(lanes)); skip; --skip)
      lanes &= lanes - 1;
    lane = __builtin_ctz(lanes);
  } else {
    int first = (last_run + 1) % (warps() * warp_size);
    unsigned later_lanes = ready[first / warp_size] & (~0u << (first % warp_size));
    if (later_lanes) {
      warp = first / warp_size;
      lane = __builtin_ctz(later_lanes);
    } else {
      for (int step = 1; step <= warps() && warp < 0; ++step) {
        int w = (first / warp_size + step) % warps();
        if (ready[w]) warp = w;
      }
      if (warp < 0) return nullptr;
      lane = __builtin_ctz(ready[warp]);
    }
  }
  last_run = warp * warp_size + lane;
  ready[warp] &= ~(1u << lane);
  return &machine.threads[last_run];
}

void run_another() {
  Thread* leaving = machine.current;
  Thread* next = next_thread();
  if (next == leaving) return;
  machine.current = next;
  switch_context(leaving->context, next ? next->context : machine.launcher);
}

void thread_main() {
  kernel(kernel_arguments);
  Thread& thread = *machine.current;
  check_exit(thread);
  thread.state = State::finished;
  --machine.live;
  run_another();
  __builtin_unreachable();
}

char* stack_of(int thread) {
  // Below each stack a page that cannot be touched, which an overflow hits.
  static char* all = [] {
    size_t bytes = (stack_bytes + page) * max_threads;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    for (int t = 0; t < max_threads; ++t)
      mprotect(static_cast<char*>(memory) + t * (stack_bytes + page), page, PROT_NONE);
    return static_cast<char*>(memory);
  }();
  return all + thread * (stack_bytes + page) + page;
}

// Names each place where threads wait for what can no longer come.
void report_deadlock() {
  const void* seen[4];
  int places = 0, count = machine.thread_count;
  for (int t = 0; t < count && places < 4; ++t) {
    Thread& thread = machine.threads[t];
    if (thread.state != State::waiting || std::find(seen, seen + places, thread.waits_at) != seen + places) continue;
    seen[places++] = thread.waits_at;
    int here = 0;
    for (int u = 0; u < count; ++u)
      here += machine.threads[u].state == State::waiting && machine.threads[u].waits_at == thread.waits_at;
    machine.current = &thread;
    fault("deadlock", thread.waits_at, "%d of %d threads wait at %s for others that do not come; %d have exited", here,
          count, thread.waits_for, count - machine.live);
    machine.current = nullptr;
  }
}

void run_block(size_t dynamic_bytes) {
  machine.live = machine.thread_count;
  last_run = -1;
  std::fill(std::begin(ready), std::end(ready), 0);
  for (Barrier& barrier : barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();
    barrier.clock.assign(machine.thread_count, 0);
  }
  for (uint32_t& p : priority) p = random_bits();
  for (int t = 0; t < machine.thread_count; ++t) {
    Thread& thread = machine.threads[t];
    unsigned x = machine.block_size.x, y = machine.block_size.y, n = static_cast<unsigned>(t);
    thread.number = t;
    thread.index = {n % x, n / x % y, n / x / y};
    thread.stack = stack_of(t);
    thread.copies.clear();
    thread.open_group = 0;
    prepare_context(thread.context, thread.stack, stack_bytes, thread_main);
    wake(thread);
  }
  begin_block_of_warps();
  begin_block(dynamic_bytes);
  machine.current = next_thread();
  switch_context(machine.launcher, machine.current->context);
  machine.current = nullptr;
  if (!machine.aborted && machine.live > 0) report_deadlock();
  machine.aborted |= machine.live > 0;
  end_block();
}

}  // namespace

uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>(random_state * 0x2545F4914F6CDD1Dull >> 32);
}

void wake(Thread& thread) {
  thread.state = State::ready;
  ready[thread.number / warp_size] |= 1u << (thread.number % warp_size);
}

void wait_for(const char* what, const void* where) {
  machine.current->state = State::waiting;
  machine.current->waits_for = what;
  machine.current->waits_at = where;
  run_another();
}

void let_others_run() {
  if (!randomised()) return;
  wake(*machine.current);
  run_another();
}

void return_to_launcher() {
  Thread* leaving = machine.current;
  machine.aborted = true;
  machine.current = nullptr;
  switch_context(leaving->context, machine.launcher);
  __builtin_unreachable();
}

bool on_a_stack(uintptr_t address) {
  auto first = reinterpret_cast<uintptr_t>(stack_of(0)) - page;
  return address >= first && address < first + max_threads * (stack_bytes + page);
}

}  // namespace emulator

using namespace emulator;

// One barrier for bar.sync, bar.red and bar.arrive. `file` may be null where one barrier serves several places.
static Barrier& arrive(int id, int count, int predicate, const char* file, int line, const void* where) {
  Barrier& barrier = barriers[id];
  if (count % warp_size && count != machine.thread_count)
    fail("divergent barrier", where, "barrier %d for %d threads, expected a multiple of 32", id, count);
  if (barrier.arrived == 0) {
    barrier.expected = count;
    barrier.file = file;
    barrier.line = line;
    barrier.count = barrier.any = 0;
    barrier.all = 1;
    std::fill(barrier.clock.begin(), barrier.clock.end(), 0);
  }
  if (barrier.expected != count)
    fail("divergent barrier", where, "barrier %d for %d threads meets one for %d", id, count, barrier.expected);
  if (file && barrier.file && (line != barrier.line || strcmp(file, barrier.file)))
    fail("divergent barrier", where, "threads of a block are at different __syncthreads: another is at line %d",
         barrier.line);
  ++barrier.arrived;
  barrier.count += predicate != 0;
  barrier.any |= predicate != 0;
  barrier.all &= predicate != 0;
  release(*machine.current, barrier.clock);
  return barrier;
}

static void open(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.result[0] = barrier.count;
  barrier.result[1] = barrier.all;
  barrier.result[2] = barrier.any;
  for (Thread* thread : barrier.waiting) {
    acquire(*thread, barrier.clock);
    if (thread != machine.current) wake(*thread);
  }
  barrier.waiting.clear();
}

static Barrier& arrive_and_wait(int id, int count, int predicate, const char* file, int line, const void* where) {
  Barrier& barrier = arrive(id, count, predicate, file, line, where);
  barrier.waiting.push_back(machine.current);
  if (barrier.arrived == barrier.expected) {
    open(barrier);
    let_others_run();
  } else {
    wait_for("a barrier", where);
  }
  return barrier;
}

TTR_API void ttr_syncthreads(const char* file, int line) {
  arrive_and_wait(0, machine.thread_count, 0, file, line, TTR_CALLER);
}

// what: 0 the number of threads whose predicate holds, 1 whether all do, 2 whether any does.
TTR_API int ttr_syncthreads_reduce(int predicate, int what, const char* file, int line) {
  return arrive_and_wait(0, machine.thread_count, predicate, file, line, TTR_CALLER).result[what];
}

TTR_API void ttr_bar_sync(int id, int count) { arrive_and_wait(id, count, 0, nullptr, 0, TTR_CALLER); }

TTR_API void ttr_bar_arrive(int id, int count) {
  Barrier& barrier = arrive(id, count, 0, nullptr, 0, TTR_CALLER);
  if (barrier.arrived == barrier.expected) open(barrier);
}

TTR_API ttr_index ttr_threadIdx() { return machine.current->index; }
TTR_API ttr_index ttr_blockIdx() { return machine.block; }
TTR_API ttr_index ttr_blockDim() { return machine.block_size; }
TTR_API ttr_index ttr_gridDim() { return machine.grid_size; }

// Runs the grid; the number of faults.
TTR_API int ttr_run(void (*entry)(void*), void* arguments, const unsigned* grid, const unsigned* block,
                    size_t dynamic_bytes, uint64_t seed, int checking, double seconds) {
  clear_faults();
  machine.seed = seed;
  machine.checking = checking;
  machine.aborted = false;
  machine.current = nullptr;
  machine.grid_size = {grid[0], grid[1], grid[2]};
  machine.block_size = {block[0], block[1], block[2]};
  machine.thread_count = static_cast<int>(block[0] * block[1] * block[2]);
  kernel = entry;
  kernel_arguments = arguments;
  random_state = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  begin_launch(reinterpret_cast<const void*>(entry));
  {
    SignalGuard guard(seconds);
    // The blocks in steps of a number coprime to theirs, from a random first one: each once.
    uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2], at = 0, step = 1;
    if (randomised()) {
      at = random_bits() % blocks;
      do step = 1 + random_bits() % blocks;
      while (std::gcd(step, blocks) != 1);
    }
    for (uint64_t done = 0; done < blocks && !machine.aborted; ++done, at = (at + step) % blocks) {
      machine.block = {static_cast<unsigned>(at % grid[0]), static_cast<unsigned>(at / grid[0] % grid[1]),
                       static_cast<unsigned>(at / grid[0] / grid[1])};
      run_block(dynamic_bytes);
    }
  }
  check_guards();
  return fault_count();
}

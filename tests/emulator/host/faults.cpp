// What went wrong in a launch, and the ways in which a launch ends early.
#include <signal.h>
#include <sys/time.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "runtime.h"

namespace emulator {
namespace {

struct Fault {
  const char* kind;
  const void* where;
  std::string line;
};
std::vector<Fault> faults;
constexpr size_t most_faults = 8;

// kind, message, block, thread and program counter, separated by tabs: read by emulator.py.
void note(const char* kind, const void* where, const char* format, va_list values) {
  for (const Fault& known : faults)
    if (known.where == where && !strcmp(known.kind, kind)) return;
  char message[512], place[128];
  vsnprintf(message, sizeof message, format, values);
  snprintf(place, sizeof place, "\t(%u, %u, %u)\t%d\t%p", machine.block.x, machine.block.y, machine.block.z,
           machine.current ? machine.current->number : -1, where);
  faults.push_back({kind, where, std::string(kind) + "\t" + message + place});
}

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGVTALRM};
struct sigaction previous[sizeof signals / sizeof *signals];
stack_t previous_stack;
char signal_stack[64 << 10];
double time_limit;

const void* program_counter(void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc + 1);
#else
  (void)context;
  return nullptr;
#endif
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (!machine.current) {  // not the kernel's doing: let it happen as it would without us
    if (number == SIGVTALRM) return;
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  const void* where = program_counter(context);
  auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (number == SIGVTALRM) fail("time limit", where, "still running after %g s: an endless loop?", time_limit);
  if (number == SIGFPE) fail("crash", where, "integer division by zero");
  if (number == SIGILL || number == SIGABRT) fail("crash", where, "%s", strsignal(number));
  if (on_a_stack(address)) fail("crash", where, "stack overflow: local memory over %zu KiB", stack_bytes >> 10);
  fail("crash", where, "%s at address %p (misaligned, or far out of bounds)", strsignal(number), info->si_addr);
}

}  // namespace

void fault(const char* kind, const void* where, const char* format, ...) {
  va_list values;
  va_start(values, format);
  note(kind, where, format, values);
  va_end(values);
  if (faults.size() >= most_faults && machine.current) return_to_launcher();
}

void fail(const char* kind, const void* where, const char* format, ...) {
  va_list values;
  va_start(values, format);
  note(kind, where, format, values);
  va_end(values);
  return_to_launcher();
}

void clear_faults() { faults.clear(); }
int fault_count() { return static_cast<int>(faults.size()); }

SignalGuard::SignalGuard(double seconds) {
  time_limit = seconds;
  // A stack of its own: the one in use may be what overflowed. The handler never returns, hence SA_NODEFER.
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < sizeof signals / sizeof *signals; ++i) sigaction(signals[i], &action, &previous[i]);
  itimerval timer{};
  timer.it_value.tv_sec = static_cast<time_t>(seconds);
  timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - static_cast<double>(timer.it_value.tv_sec)) * 1e6);
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

SignalGuard::~SignalGuard() {
  itimerval none{};
  setitimer(ITIMER_VIRTUAL, &none, nullptr);
  for (size_t i = 0; i < sizeof signals / sizeof *signals; ++i) sigaction(signals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace emulator

// A kernel's assert() and __trap().
TTR_API void ttr_assertion_failed(const char* condition) {
  emulator::fail("assertion", TTR_CALLER, "%s", condition);
}

TTR_API const char* ttr_faults() {
  static std::string text;
  text.clear();
  for (const emulator::Fault& fault : emulator::faults) text += fault.line + "\n";
  return text.c_str();
}

// A place in a computation that can be left and returned to. Each CUDA thread runs on one, on a stack of its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

#if defined(__x86_64__) && !defined(TTR_UCONTEXT)

// The registers that the ABI asks a callee to keep lie on the fiber's own stack: all that remains is where.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void ttr_switch_stack(void** save, void* resume);

inline void switch_context(Context& from, const Context& to) {
  ttr_switch_stack(&from.stack_pointer, to.stack_pointer);
}

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // entry never returns; and it must find its stack 8 bytes off a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}

#else

}  // namespace emulator
#include <ucontext.h>
namespace emulator {

// The portable way, which asks the kernel for the signal mask at each switch and is about four times slower.
struct Context {
  ucontext_t registers;
};

inline void switch_context(Context& from, const Context& to) { swapcontext(&from.registers, &to.registers); }

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

#endif

}  // namespace emulator

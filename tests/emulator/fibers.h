// Contexts with stacks of their own: an assembly switch on x86-64, ucontext elsewhere, both known to AddressSanitizer.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif
#if !defined(__x86_64__) || defined(FIBERS_UCONTEXT)
#undef FIBERS_UCONTEXT
#define FIBERS_UCONTEXT 1
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)
namespace emulator {
using Entry = void (*)();
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

#if FIBERS_UCONTEXT
using Registers = ucontext_t;

inline void swap_registers(Registers& from, Registers& to) { swapcontext(&from, &to); }

inline void set_registers(Registers& registers, char* stack, Entry entry) {
  getcontext(&registers);
  registers.uc_stack.ss_sp = stack;
  registers.uc_stack.ss_size = kStackBytes;
  makecontext(&registers, entry, 0);
}
#else
using Registers = void**;  // the stack pointer; the callee-saved registers of the System V ABI lie there

// A jump and not `ret`, which the processor would always mispredict.
[[gnu::naked, gnu::noipa]] inline void swap_registers([[maybe_unused]] Registers& from, [[maybe_unused]] Registers& to) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n pop %rcx\n jmp *%rcx");
}

inline void set_registers(Registers& registers, char* stack, Entry entry) {
  registers = reinterpret_cast<void**>(stack + kStackBytes) - 8;  // six registers, the entry, and a zero to return to
  registers[6] = reinterpret_cast<void*>(entry);
}
#endif

struct Context {
  Registers registers;
  const void* stack;
  size_t stack_bytes;
  void* fake_stack;  // AddressSanitizer's
};

// `entry` must call entered_from() first and must not return.
inline void make_context(Context& context, Entry entry) {
  void* memory =
      mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE)) std::abort();
  char* stack = static_cast<char*>(memory) + kGuardBytes;
  set_registers(context.registers, stack, entry);
  context.stack = stack;
  context.stack_bytes = kStackBytes;
}

inline void entered_from(Context& from) { __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes); }

inline void switch_context(Context& from, Context& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  swap_registers(from.registers, to.registers);
  __sanitizer_finish_switch_fiber(from.fake_stack, &to.stack, &to.stack_bytes);
}
}  // namespace emulator
#pragma GCC visibility pop

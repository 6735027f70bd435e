#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace emulator {
namespace {

constexpr size_t STACK = 128 * 1024;

// The lowest page is a guard: a stack that runs over ends the process rather than another's data.
char* stack(int number) {
  static std::vector<char*> stacks;  // they are kept for the next launch
  while (int(stacks.size()) <= number) {
    void* const memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
    mprotect(memory, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[size_t(number)];
}

}  // namespace

#ifdef LORA_OWN_SWAP

// Saves what a function must keep, and the stack pointer. No signal mask: that is a system call.
asm(R"(
.text
.p2align 4
.hidden lora_emulator_swap
.globl lora_emulator_swap
.type lora_emulator_swap, @function
lora_emulator_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lora_emulator_swap, .-lora_emulator_swap
)");
extern "C" __attribute__((visibility("hidden"))) void lora_emulator_swap(Context*, Context*);

void begin(Context& context, int number, void (*entry)()) {
  // Tops at different places of a page, or all threads would compete for the same lines of caches.
  const size_t stagger = size_t(number) * 5 % 63 * 64;
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack(number) + STACK - stagger - 64);
  *--top = 0;  // where a return address of entry() would be
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  context.stack_pointer = top;
}

void swap(Context& from, Context& to) { lora_emulator_swap(&from, &to); }

#else

void begin(Context& context, int number, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack(number);
  context.saved.uc_stack.ss_size = STACK;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

void swap(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#endif

}  // namespace emulator

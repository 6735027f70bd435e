// Stacks of their own for the threads of a kernel, and switches between them.
#pragma once

#if defined(__x86_64__) && defined(__ELF__)
#define LORA_OWN_SWAP 1
#else
#include <ucontext.h>
#endif

namespace emulator {

// Where a suspended thread goes on.
struct Context {
#ifdef LORA_OWN_SWAP
  void* stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
};

// Makes `context` begin with entry() on stack `number`; entry() must never return.
void begin(Context& context, int number, void (*entry)());
// Goes on in `to`; returns when something goes on in `from`.
void swap(Context& from, Context& to);

}  // namespace emulator

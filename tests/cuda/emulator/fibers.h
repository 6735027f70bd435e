// Stacks of their own for the threads of a kernel, and switches between them.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

// Where a suspended thread goes on.
struct Context {
#ifdef __x86_64__
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

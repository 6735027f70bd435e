// The kernels for any processor.
#include <cstring>

#include "tasks.h"

namespace lora {
namespace level_portable {
#include "portable.h"
#include "vec_portable.h"
#include "kernels.h"
}  // namespace level_portable

const Kernels portable_kernels = level_portable::ALL;
}  // namespace lora

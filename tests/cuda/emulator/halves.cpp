// Numbers of two bytes, and what whole warps do with them.
#include <cstring>

#include "emulator.h"

namespace emulator {
namespace {

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

float float_of_bf16(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float float_of_fp16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
  if ((half & 0x7c00) == 0x7c00) return float_of_bits(sign | 0x7f800000 | rest);
  // The product puts the exponent's bias right, for subnormal numbers too.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest) * float_of_bits(0x77800000)));
}

uint16_t fp16_of_float(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                       // subnormal: the addition rounds it
    return sign | uint16_t(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

template <bool IS_BF16>
void mma(Warp& warp) {
  const auto number = [](uint32_t packed, int high) {
    const uint16_t half = uint16_t(packed >> (16 * high));
    return double(IS_BF16 ? float_of_bf16(half) : float_of_fp16(half));
  };
  double a[16][16], b[16][8];
  for (int lane = 0; lane < LANES; ++lane) {
    const MmaOperands& mine = *static_cast<const MmaOperands*>(warp.operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = number(mine.a[i], e);
      for (int i = 0; i < 2; ++i) b[2 * t + e + 8 * i][g] = number(mine.b[i], e);
    }
  }
  double sum[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int depth = 0; depth < 16; ++depth) {
      for (int column = 0; column < 8; ++column)
        sum[row][column] += a[row][depth] * b[depth][column];
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    float* const d = static_cast<const MmaOperands*>(warp.operands[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) d[i] = float(d[i] + sum[g + i / 2 * 8][2 * t + i % 2]);
  }
}
template void mma<true>(Warp&);
template void mma<false>(Warp&);

void store_blocks(Warp& warp) {
  const auto operand = [&](int lane) { return static_cast<const BlockRow*>(warp.operands[lane]); };
  for (int lane = 0; lane < LANES; ++lane) {
    char* const row = static_cast<char*>(operand(lane)->row);
    const int64_t offset = offset_of(*warp.block, row, "store_blocks");
    if (offset % 16 || offset + 16 > state.launch.shared_bytes) {
      fail("store_blocks: a row must be 16 aligned bytes of shared memory, " + here());
    }
    for (int t = 0; t < 4; ++t) {
      std::memcpy(row + 4 * t, &operand(lane % 8 * 4 + t)->registers[lane / 8], 4);
    }
  }
}

}  // namespace emulator

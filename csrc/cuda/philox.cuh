// The dropout generator of lora_kernels/runtime/dropout.py: Philox4x32 with 7 rounds.
#pragma once

#include "cuda/device.cuh"

namespace lora::cuda {

// Bit k of the result: whether the group's column k is kept.
__device__ __forceinline__ uint32_t keep_bits(uint64_t seed, uint64_t group, uint32_t stream,
                                              uint32_t threshold) {
  uint32_t word0 = uint32_t(group), word1 = uint32_t(group >> 32), word2 = stream, word3 = 0;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, word0), low0 = 0xD2511F53u * word0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, word2), low1 = 0xCD9E8D57u * word2;
    word0 = high1 ^ word1 ^ key0;
    word1 = low1;
    word2 = high0 ^ word3 ^ key1;
    word3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {word0, word1, word2, word3};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= uint32_t((words[i] & 0xffffu) >= threshold) << (2 * i);
    bits |= uint32_t((words[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return bits;
}

}  // namespace lora::cuda

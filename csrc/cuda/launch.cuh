// Launches, and what they may report.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace lora::cuda {

struct Grid {
  int64_t blocks;  // a multiple of cluster
  int threads;
  int64_t shared_bytes;
  int cluster = 1;   // blocks that run together; 1 before compute capability 9.0
  int64_t rows = 1;  // blocks in y
};

// "decode_linear (tokens 3, rank 16)": what an error calls a launch.
inline void describe(std::ostringstream&) {}
template <class V, class... Rest>
void describe(std::ostringstream& text, const char* name, V value, Rest... rest) {
  text << name << ' ' << value << (sizeof...(rest) ? ", " : "");
  describe(text, rest...);
}
template <class... Sizes>
std::string described(const char* kernel, Sizes... sizes) {
  std::ostringstream text;
  text << kernel << " (";
  describe(text, sizes...);
  text << ")";
  return text.str();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifndef LORA_EMULATE

template <class What>
void check(cudaError_t error, const What& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it
  throw std::runtime_error(what() + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// Makes the device current in this runtime. The caller has made it torch's current device.
template <class What>
void use(const Place& place, const What& what) {
  check(cudaSetDevice(place.device), what);
}

template <class What>
int attribute(cudaDeviceAttr which, const Place& place, const What& what) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, place.device), what);
  return value;
}
template <class What>
int multiprocessors(const Place& place, const What& what) {
  return attribute(cudaDevAttrMultiProcessorCount, place, what);
}
// 10 * major + minor.
template <class What>
int compute_capability(const Place& place, const What& what) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, place, what) +
         attribute(cudaDevAttrComputeCapabilityMinor, place, what);
}

// `what` makes the text of an error, and is called for one only.
template <class... Parameters, class What, class... Arguments>
void launch(const What& what, void (*kernel)(Parameters...), const Grid& grid, const Place& place,
            const Arguments&... arguments) {
  if (grid.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(grid.shared_bytes)),
          what);
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks), unsigned(grid.rows));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
}

#endif  // LORA_EMULATE

}  // namespace lora::cuda

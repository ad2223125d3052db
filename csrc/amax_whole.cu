// The amax of a weight that is one run of memory, too large for one thread block. Every processor's one block loads all
// that a thread has registers for before it waits for anything; the first block sets the result, and behind one
// grid-wide barrier, which is long open by then, every block raises it.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "kernels.h"

namespace fp8_kernels {
namespace {

constexpr int kNumThreads = 1024;
template <typename T>
constexpr int kVecs = 32 / Vec<T>::kWords;  // loads in flight a thread

template <typename T>
__global__ void __launch_bounds__(kNumThreads, 1) amax_whole_kernel(const __grid_constant__ AmaxParams p, int64_t num_vecs) {
  if (blockIdx.x == 0 && threadIdx.x == 0) store_amax(0, p, {});
  const auto grid = cooperative_groups::this_grid();
  const T* w = static_cast<const T*>(p.w.data);
  constexpr int kStep = kNumThreads * kVecs<T>;
  Vec<T> vecs[kVecs<T>];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kVecs<T>; ++i) {
      const int64_t at = first + i * kNumThreads;
      vecs[i] = at < num_vecs ? load_whole_vec(w + at * kVecElements) : Vec<T>{};
    }
  };
  int64_t at = static_cast<int64_t>(blockIdx.x) * kStep + threadIdx.x;
  load(at);
  auto token = grid.barrier_arrive();
  uint32_t acc = 0;
  for (;;) {
#pragma unroll
    for (int i = 0; i < kVecs<T>; ++i) acc = vecs[i].max_abs(acc);
    at += static_cast<int64_t>(gridDim.x) * kStep;
    if (at >= num_vecs) break;
    load(at);
  }
  acc = team_max<kNumThreads>(Elements<T>::amax_bits(acc));
  grid.barrier_wait(std::move(token));
  if (threadIdx.x == 0) atomicMax(static_cast<uint32_t*>(p.amax.data), is_nan(acc) ? kNanBits : acc);
}

}  // namespace

void launch_amax_whole(AmaxParams params, InputType type, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    using T = decltype(element);
    int64_t num_vecs = params.grouping.vecs_per_group;
    const int64_t steps = (num_vecs + kNumThreads * kVecs<T> - 1) / (kNumThreads * kVecs<T>);
    void* arguments[] = {&params, &num_vecs};
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(num_processors(), steps)));
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(amax_whole_kernel<T>), grid, dim3(kNumThreads), arguments,
                                0, stream);
  });
  check_launch();
}

}  // namespace fp8_kernels

// The score steps are host and device code: this compiles them for a GPU, where a register of scores is one
// float.
#include "score/steps.h"

namespace attncore {

/// The vocabulary of cpu/tile/score_math.h for one thread of a GPU.
struct DeviceMath {
  using Scalar = float;
  using Scores = float;
  struct Keys {
    Index first, count;
  };

  static __device__ float hidden() { return -INFINITY; }
  static __device__ float tanh(float x) { return tanhf(x); }
  static __device__ float hide_outside(float s, const Keys& keys, Index low, Index high) {
    return low <= keys.first && keys.first <= high ? s : hidden();
  }
  static __device__ float hide_where_zero(float s, const std::byte* mask, Index, const Keys&) {
    return *mask != std::byte{0} ? s : hidden();
  }
  static __device__ float hide_where_clear(float s, const std::uint64_t* words, Index first,
                                           const Keys& keys) {
    const Index bit = keys.first - first;
    return bit < 0 || (words[bit / 64] >> (bit % 64) & 1U) != 0 ? s : hidden();
  }
  static __device__ float hide_where_unequal(float s, const std::byte* segment, const Tensor& like,
                                             Index wanted, const Keys&) {
    return read_int(segment, like.dtype) == wanted ? s : hidden();
  }
  static __device__ float add_or_hide(float s, float bias) { return bias == hidden() ? bias : s + bias; }
  static __device__ float load_one(const std::byte* p, DType) { return *reinterpret_cast<const float*>(p); }
  template <class Run>
  static __device__ void with_line(const std::byte* line, const Tensor& like, Run run) {
    run([&](const Keys& keys) { return load_one(line + keys.first * like.stride[3], like.dtype); });
  }
  static __device__ float by_distance(const float* line, Index farthest, Index distance) {
    return line[farthest + max(-farthest, min(distance, farthest))];
  }
  static __device__ float distance(Index position, const Keys& keys) {
    return fabsf(static_cast<float>(position - keys.first));
  }
};

__global__ void apply_steps(const Call& call, const Block& block, const Row& row, float* scores) {
  const Index key = threadIdx.x;
  const Range visible = ScoreSteps::visible(call, block);
  if (key < visible.begin || key >= visible.end) return;
  const TileWork work = ScoreSteps::touch(call, block, {key, key + 1});
  ScoreSteps::apply<DeviceMath>(
      call, row, work.steps, [&](auto step) { scores[key] = step(scores[key], DeviceMath::Keys{key, 1}); });
}

}  // namespace attncore

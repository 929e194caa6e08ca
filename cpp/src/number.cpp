#include "number.h"

#include "cpu/dtype.h"

namespace attncore {
namespace {

struct Scalar {  // an instruction set's tag: registers as every machine has them
  static constexpr int kBytes = 16;
};

}  // namespace

double read_number(const std::byte* from, DType dtype) noexcept {
  if (dtype == DType::f64) return load_scalar<Scalar, double>(from, dtype);
  return static_cast<double>(load_scalar<Scalar, float>(from, dtype));
}

void write_number(double value, std::byte* to, DType dtype) noexcept {
  if (dtype == DType::f64) return __builtin_memcpy(to, &value, sizeof value), void();
  const auto narrow = broadcast<Vec<Scalar, float>>(static_cast<float>(value));
  with_storage<float>(dtype,
                      [&]<DType kStorage>() { store_items<Scalar, float, kStorage>(to, 0, 1, narrow); });
}

}  // namespace attncore

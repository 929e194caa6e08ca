#include "number.h"

#include "cpu/dtype.h"

namespace attncore {

double read_number(const std::byte* from, DType dtype) noexcept {
  if (dtype == DType::f64) return load_scalar<Portable, double>(from, dtype);
  return static_cast<double>(load_scalar<Portable, float>(from, dtype));
}

void write_number(double value, std::byte* to, DType dtype) noexcept {
  if (dtype == DType::f64) return __builtin_memcpy(to, &value, sizeof value), void();
  const auto narrow = broadcast<Vec<Portable, float>>(static_cast<float>(value));
  with_storage<float>(dtype,
                      [&]<DType kStorage>() { store_items<Portable, float, kStorage>(to, 0, 1, narrow); });
}

}  // namespace attncore

#include "cache_store.h"

#include <cstring>
#include <utility>

#include "require.h"
#include "tensor.h"

namespace attncore {
namespace {

using std::to_string;

constexpr Index kChunk = 64;  // tokens that are rotated at once, between two looks at Options::cancelled
constexpr double kMostBytes = 0x1p47;

/// Keys in the accumulation type, rotated.
class Rotated {
 public:
  Rotated(const CacheSettings& settings, Rope rotary, Index most)
      : rope_(std::move(rotary)),
        first_dim_(first_rotated(settings)),
        tensor_(Tensor::contiguous(nullptr, accumulation(settings.dtype),
                                   {1, settings.kv_heads, most, settings.dim})) {
    memory_.resize(
        static_cast<std::size_t>(settings.kv_heads * most * settings.dim * item_size(tensor_.dtype)));
    tensor_.data = memory_.data();
    numbers_.resize(static_cast<std::size_t>(most));
  }

  Tensor operator()(const Tensor& key, const Incoming& tokens, Index done, const Options& options) {
    const Index count = key.shape[2];
    for (Index i = 0; i < count; ++i) numbers_[static_cast<std::size_t>(i)] = tokens.first + done + i;
    rope_.positions = tokens.positions.given()
                          ? part_of(tokens.positions, 2, done, count)
                          : Tensor::contiguous(numbers_.data(), DType::i64, {1, 1, count, 1});
    const Tensor to = part_of(tensor_, 2, 0, count);
    convert(key, to);
    const Tensor turned = part_of(to, 3, first_dim_, to.shape[3] - first_dim_);
    Options alone = options;  // some 30 µs of work: not worth another thread
    alone.num_threads = 1;
    rope(turned, rope_, turned, false, alone);
    return to;
  }

 private:
  Rope rope_;
  Index first_dim_;
  Tensor tensor_;
  std::vector<std::byte> memory_;
  std::vector<Index> numbers_;
};

/// Room for a pool.
Reservation reserve(const Shape& shape, DType dtype, const char* argument) {
  double bytes = static_cast<double>(row_bytes(dtype, shape[3]));
  for (std::size_t axis = 0; axis < 3; ++axis) bytes *= static_cast<double>(shape[axis]);
  if (bytes <= kMostBytes) return {static_cast<Index>(bytes), argument};
  throw CacheFull(std::string(argument) + ": " + shape_text(shape) + " " + name(dtype) +
                  " numbers are more than there is address space");
}

}  // namespace

std::vector<StoredPart> stored_parts(const CacheSettings& s) {
  const bool values = !s.value_in_key;
  std::vector<StoredPart> parts{{"key", &StoredTokens::key, s.dtype, s.dim}};
  if (values) parts.push_back({"value", &StoredTokens::value, s.dtype, s.value_dim});
  if (!is_quantised(s.dtype)) return parts;
  parts.push_back({"key_scale", &StoredTokens::key_scale, DType::f32, 1});
  if (values) parts.push_back({"value_scale", &StoredTokens::value_scale, DType::f32, 1});
  return parts;
}

CacheStore::CacheStore(const CacheSettings& settings, Index pages, Index slots, const char* argument,
                       bool huge)
    : settings_(settings), parts_(stored_parts(settings)), pools_{} {
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const StoredPart& part = parts_[i];
    const Shape shape{pages, settings_.kv_heads, slots, part.dim};
    Reservation& memory = memory_[i] = reserve(shape, part.dtype, argument);
    memory.huge_pages(huge, 0, memory.bytes(), memory.bytes());
    pools_.*part.tensor = Tensor::contiguous(memory.data(), part.dtype, shape);
  }
  if (!settings_.value_in_key) return;
  pools_.value = part_of(pools_.key, 3, 0, settings_.value_dim);
  pools_.value_scale = pools_.key_scale;
}

Index CacheStore::token_bytes() const noexcept {
  Index bytes = 0;
  for (const StoredPart& part : parts_) bytes += settings_.kv_heads * row_bytes(part.dtype, part.dim);
  return bytes;
}

Index CacheStore::reserved_bytes() const noexcept {
  Index bytes = 0;
  for (const Reservation& memory : memory_) bytes += memory.bytes();
  return bytes;
}

void CacheStore::write(const Incoming& tokens, const Options& options) {
  const Index count = tokens.key.shape[2];
  std::optional<Rotated> rotated;
  if (settings_.rotary) rotated.emplace(settings_, *settings_.rotary, min(count, kChunk));
  for (Index done = 0; done < count; done += kChunk) {
    if (options.cancelled && options.cancelled()) throw Cancelled();
    const Index n = min(kChunk, count - done);
    const Tensor key = part_of(tokens.key, 2, done, n);
    place("key", rotated ? (*rotated)(key, tokens, done, options) : key, tokens, done, pools_.key,
          pools_.key_scale);
    if (!settings_.value_in_key)
      place("value", part_of(tokens.value, 2, done, n), tokens, done, pools_.value, pools_.value_scale);
  }
}

/// x: tokens `done` … of those that come.
void CacheStore::place(const char* argument, const Tensor& x, const Incoming& tokens, Index done,
                       const Tensor& pool, const Tensor& scales) const {
  for (Index i = 0; i < x.shape[2];) {
    const Index token = tokens.first + done + i, slot = token % slots();
    const Index page = tokens.table[token / slots()], count = min(x.shape[2] - i, slots() - slot);
    const Tensor from = part_of(x, 2, i, count), to = tokens_of(pool, page, slot, count);
    if (!scales.given()) {
      convert(from, to);
    } else if (const auto bad = quantise(from, to, tokens_of(scales, page, slot, count))) {
      reject_row(argument, tokens.entry, *bad, done + i, pool.dtype);
    }
    i += count;
  }
}

void CacheStore::prepare(Index page, Range range) noexcept {
  const std::size_t arrays = settings_.value_in_key ? 1 : 2;  // scales are small
  for (std::size_t i = 0; i < arrays; ++i) {
    const Tensor& pool = pools_.*parts_[i].tensor;
    const Index row = pool.stride[1], token = pool.stride[2];
    const Index start = page * pool.stride[0], end = start + pool.stride[0];
    if (row < 2 * kHugePage) {  // all of them, once they are half full
      const bool begins = 2 * range.begin < slots() && slots() <= 2 * range.end;
      if (begins) memory_[i].huge_pages(true, start, end, end);
      continue;
    }
    // Those that come after as much memory as they are.
    for (Index first = start; first < end; first += row) {
      memory_[i].huge_pages(true, first + max(range.begin * token, kHugePage), first + range.end * token,
                            first + row);
    }
  }
}

void CacheStore::copy(Index from, Index to, Index count) noexcept {
  for (const StoredPart& part : parts_) {
    const Tensor& pool = pools_.*part.tensor;
    copy_rows(tokens_of(pool, from, 0, count), tokens_of(pool, to, 0, count));
  }
}

void CacheStore::move(const std::int32_t* table, Index from, Index to) noexcept {
  const auto token = [&](const Tensor& pool, Index i) {
    return tokens_of(pool, table[i / slots()], i % slots(), 1);
  };
  for (const StoredPart& part : parts_) {
    const Tensor& pool = pools_.*part.tensor;
    copy_rows(token(pool, from), token(pool, to));
  }
}

void CacheStore::save(Index page, Index count, const StoredTokens& packed, Index first) const noexcept {
  for (const StoredPart& part : parts_)
    copy_rows(tokens_of(pools_.*part.tensor, page, 0, count), part_of(packed.*part.tensor, 2, first, count));
}

void CacheStore::load(Index page, Index count, const StoredTokens& packed, Index first) noexcept {
  for (const StoredPart& part : parts_)
    copy_rows(part_of(packed.*part.tensor, 2, first, count), tokens_of(pools_.*part.tensor, page, 0, count));
}

void CacheStore::gather(const std::int32_t* table, Range tokens, const Tensor& key,
                        const Tensor& value) const noexcept {
  for (Index token = tokens.begin; token < tokens.end;) {
    const Index slot = token % slots(), page = table[token / slots()];
    const Index count = min(tokens.end - token, slots() - slot);
    const auto one = [&](const Tensor& pool, const Tensor& scales, const Tensor& out) {
      const Tensor from = tokens_of(pool, page, slot, count),
                   to = part_of(out, 2, token - tokens.begin, count);
      if (!scales.given()) return convert(from, to);
      dequantise(from, tokens_of(scales, page, slot, count), to);
    };
    one(pools_.key, pools_.key_scale, key);
    if (value.given()) one(pools_.value, pools_.value_scale, value);
    token += count;
  }
}

StoredTokens packed_tokens(const CacheSettings& settings, Index tokens, Workspace& memory) {
  StoredTokens packed;
  Tensors tensors;
  for (const StoredPart& part : stored_parts(settings))
    tensors.add(packed.*part.tensor, part.dtype, {1, settings.kv_heads, tokens, part.dim});
  tensors.reserve(memory);
  return packed;
}

}  // namespace attncore

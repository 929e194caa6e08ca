#include "cache_store.h"

#include <cstring>

#include "require.h"

namespace attncore {
namespace {

using std::to_string;

constexpr Index kChunk = 64;  // tokens that are rotated at once, between two looks at Options::cancelled
constexpr double kMostBytes = 0x1p47;

/// Tokens first … first + count − 1.
Tensor tokens_of(Tensor t, Index first, Index count) noexcept {
  t.data = at(t, 0, 0, first);
  t.shape[2] = count;
  return t;
}

/// Slots slot … slot + count − 1 of a page.
Tensor slots_of(Tensor pool, Index page, Index slot, Index count) noexcept {
  if (!pool.given()) return pool;
  pool.data = at(pool, page, 0, slot);
  pool.shape[0] = 1;
  pool.shape[2] = count;
  return pool;
}

/// Keys in the accumulation type, rotated.
class Rotated {
 public:
  Rotated(const CacheSettings& settings, const Rope& rotary, Index most)
      : rope_(rotary),
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
                          ? tokens_of(tokens.positions, done, count)
                          : Tensor::contiguous(numbers_.data(), DType::i64, {1, 1, count, 1});
    const Tensor to = tokens_of(tensor_, 0, count);
    convert(key, to);
    rope(to, rope_, to, false, options);
    return to;
  }

 private:
  Rope rope_;
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

CacheStore::CacheStore(const CacheSettings& settings, Index pages, Index slots, const char* argument,
                       bool huge)
    : settings_(settings), pools_{} {
  const auto pool = [&](std::size_t number, Tensor& tensor, DType dtype, Index dim) {
    const Shape shape{pages, settings_.kv_heads, slots, dim};
    Reservation& memory = memory_[number] = reserve(shape, dtype, argument);
    memory.huge_pages(huge, 0, memory.bytes(), memory.bytes());
    tensor = Tensor::contiguous(memory.data(), dtype, shape);
  };
  pool(0, pools_.key, settings_.dtype, settings_.dim);
  pool(1, pools_.value, settings_.dtype, settings_.value_dim);
  if (!is_quantised(settings_.dtype)) return;
  pool(2, pools_.key_scale, DType::f32, 1);
  pool(3, pools_.value_scale, DType::f32, 1);
}

Index CacheStore::token_bytes() const noexcept {
  Index bytes = 0;
  for (const Tensor& t : {pools_.key, pools_.value, pools_.key_scale, pools_.value_scale}) {
    if (t.given()) bytes += settings_.kv_heads * row_bytes(t.dtype, t.shape[3]);
  }
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
    const Tensor key = tokens_of(tokens.key, done, n);
    place("key", rotated ? (*rotated)(key, tokens, done, options) : key, tokens, done, pools_.key,
          pools_.key_scale);
    place("value", tokens_of(tokens.value, done, n), tokens, done, pools_.value, pools_.value_scale);
  }
}

/// x: tokens `done` … of those that come.
void CacheStore::place(const char* argument, const Tensor& x, const Incoming& tokens, Index done,
                       const Tensor& pool, const Tensor& scales) const {
  for (Index i = 0; i < x.shape[2];) {
    const Index token = tokens.first + done + i, slot = token % slots();
    const Index page = tokens.table[token / slots()], count = min(x.shape[2] - i, slots() - slot);
    const Tensor from = tokens_of(x, i, count), to = slots_of(pool, page, slot, count);
    if (!scales.given()) {
      convert(from, to);
    } else if (const auto bad = quantise(from, to, slots_of(scales, page, slot, count))) {
      reject(argument, "has a NaN or an infinity for entry " + to_string(tokens.entry) + " (head " +
                           to_string(bad->head) + ", token " + to_string(done + i + bad->token) + "), " +
                           name(pool.dtype) + " can only store finite numbers of float32's range");
    }
    i += count;
  }
}

void CacheStore::prepare(Index page, Range range) noexcept {
  const Tensor* const pools[] = {&pools_.key, &pools_.value};
  for (std::size_t i = 0; i < 2; ++i) {
    const Tensor& pool = *pools[i];
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
  for (const Tensor& t : {pools_.key, pools_.value, pools_.key_scale, pools_.value_scale}) {
    if (t.given()) copy_rows(slots_of(t, from, 0, count), slots_of(t, to, 0, count));
  }
}

void CacheStore::save(Index page, Index count, const StoredTokens& packed, Index first) const noexcept {
  constexpr Tensor StoredTokens::* kParts[] = {&StoredTokens::key, &StoredTokens::value,
                                               &StoredTokens::key_scale, &StoredTokens::value_scale};
  for (const auto part : kParts) {
    if ((pools_.*part).given())
      copy_rows(slots_of(pools_.*part, page, 0, count), tokens_of(packed.*part, first, count));
  }
}

void CacheStore::load(Index page, Index count, const StoredTokens& packed, Index first) noexcept {
  constexpr Tensor StoredTokens::* kParts[] = {&StoredTokens::key, &StoredTokens::value,
                                               &StoredTokens::key_scale, &StoredTokens::value_scale};
  for (const auto part : kParts) {
    if ((pools_.*part).given())
      copy_rows(tokens_of(packed.*part, first, count), slots_of(pools_.*part, page, 0, count));
  }
}

void CacheStore::gather(const std::int32_t* table, Range tokens, const Tensor& key,
                        const Tensor& value) const noexcept {
  for (Index token = tokens.begin; token < tokens.end;) {
    const Index slot = token % slots(), page = table[token / slots()];
    const Index count = min(tokens.end - token, slots() - slot);
    const auto one = [&](const Tensor& pool, const Tensor& scales, const Tensor& out) {
      const Tensor from = slots_of(pool, page, slot, count), to = tokens_of(out, token - tokens.begin, count);
      if (!scales.given()) return convert(from, to);
      dequantise(from, slots_of(scales, page, slot, count), to);
    };
    one(pools_.key, pools_.key_scale, key);
    one(pools_.value, pools_.value_scale, value);
    token += count;
  }
}

StoredTokens packed_tokens(const CacheSettings& settings, Index tokens, Workspace& memory) {
  StoredTokens packed;
  const auto tensor = [&](Tensor& t, DType dtype, Index dim) {
    t = Tensor::contiguous(nullptr, dtype, {1, settings.kv_heads, tokens, dim});
  };
  tensor(packed.key, settings.dtype, settings.dim);
  tensor(packed.value, settings.dtype, settings.value_dim);
  if (is_quantised(settings.dtype)) {
    tensor(packed.key_scale, DType::f32, 1);
    tensor(packed.value_scale, DType::f32, 1);
  }
  Tensor* const all[] = {&packed.key, &packed.value, &packed.key_scale, &packed.value_scale};
  Index bytes = 0;
  for (const Tensor* t : all) bytes += round_up(t->stride[0], 64);
  std::byte* data = memory.reserve(static_cast<std::size_t>(bytes + 64));
  for (Tensor* t : all) {
    if (t->stride[0] == 0) continue;
    t->data = data;
    data += round_up(t->stride[0], 64);
  }
  return packed;
}

}  // namespace attncore

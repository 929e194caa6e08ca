// KVCache and PagedKVCache; their Python classes are in _cache.py.
#include <pybind11/stl.h>

#include <attncore/cache.hpp>
#include <memory>

#include "bind.h"
#include "call.h"

namespace attncore::python {
namespace {

template <class Cache>
void append(Cache& cache, const py::object& key, const py::object& value, const py::object& entries,
            const py::object& lengths, const py::object& positions, const py::object& layout) {
  const bool bshd = is_bshd(layout);
  NewTokens tokens;
  tokens.key = token_operand("key", key, bshd);
  if (!cache.settings().value_in_key || !value.is_none()) tokens.value = token_operand("value", value, bshd);
  const IntArgument chosen("entries", entries, 1), counts("lengths", lengths, 1),
      at("positions", positions, 2);
  tokens.lengths = counts.tensor;
  tokens.positions = at.tensor;
  Options options;
  run_without_gil(options, [&] { cache.append(tokens, chosen.tensor, options); });
}

/// `options`: those of Arguments.
template <class Cache>
py::object attend(const Cache& cache, const py::object& query, const py::object& entries,
                  const py::object& out_or_none, const py::object& return_lse, const py::object& rotate_query,
                  const py::dict& options) {
  Arguments arguments("attend", query, py::handle(), py::handle(), options);
  arguments.problem.value.shape[3] = cache.settings().value_dim;
  const IntArgument chosen("entries", entries, 1);
  const bool rotate = boolean("rotate_query", rotate_query);
  return results(arguments, out_or_none, return_lse,
                 [&] { cache.attend(arguments.problem, chosen.tensor, arguments.options, rotate); });
}

template <class Cache>
void truncate(Cache& cache, const py::object& lengths, const py::object& entries) {
  const IntArgument left("lengths", lengths, 1), chosen("entries", entries, 1);
  cache.truncate(left.tensor, chosen.tensor);
}

template <class Cache>
void accept(Cache& cache, const py::object& branch, const py::object& new_tokens, const py::object& entries) {
  const IntArgument kept("branch", branch, 2), last("new_tokens", new_tokens, 1),
      chosen("entries", entries, 1);
  cache.accept(kept.tensor, last.tensor, chosen.tensor);
}

py::array_t<Index> int64(const std::vector<Index>& numbers) {
  return py::array_t<Index>(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

/// The tokens of an entry as floats of a dtype; values that lie in keys are a view of these.
template <class Cache>
py::tuple gather(const Cache& cache, const py::object& entry, const py::dtype& dtype) {
  const CacheSettings& s = cache.settings();
  const Index number = integer("entry", entry);
  Index first = 0;
  if constexpr (std::is_same_v<Cache, PagedKVCache>) first = cache.kept_from(number);
  const Index count = cache.length(number) - first;
  const py::array key(dtype, {s.kv_heads, count, s.dim});
  py::array value;
  Tensor values;
  if (s.value_in_key) {
    value = key[py::make_tuple(py::ellipsis(), py::slice(0, s.value_dim, 1))];
  } else {
    value = py::array(dtype, {s.kv_heads, count, s.value_dim});
    values = tensor("value", value, {-1, 0, 1, 2}, kFloats);
  }
  const Tensor keys = tensor("key", key, {-1, 0, 1, 2}, kFloats);
  {
    const WithoutGil no_gil;
    cache.gather(number, first, keys, values);
  }
  return py::make_tuple(key, value);
}

/// What NumPy has for the bits of a dtype of storage.
py::dtype bits_of(DType dtype) {
  if (dtype == DType::f32) return py::dtype::of<float>();
  if (dtype == DType::f64) return py::dtype::of<double>();
  if (dtype == DType::f16) return py::dtype("e");
  if (dtype == DType::bf16) return py::dtype::of<std::uint16_t>();
  if (dtype == DType::i8) return py::dtype::of<std::int8_t>();
  return py::dtype::of<std::uint8_t>();
}

/// A state's arrays by their names in files: see _cache_file.py.
template <class Cache>
py::dict state(const Cache& cache) {
  auto owner = std::make_unique<CacheState>();
  {
    const WithoutGil no_gil;
    *owner = cache.state();
  }
  const CacheState& s = *owner.release();
  const py::capsule keeper(&s, [](void* p) { delete static_cast<CacheState*>(p); });
  py::dict arrays;
  const auto add = [&](const char* name, const Tensor& t, bool scale) {
    if (!t.given()) return;
    std::vector<Index> shape{t.shape[1], t.shape[2]};
    if (!scale) shape.push_back(t.dtype == DType::i4 ? t.shape[3] / 2 : t.shape[3]);
    arrays[name] = py::array(bits_of(t.dtype), shape, t.data, keeper);
  };
  add("key", s.tokens.key, false);
  add("value", s.tokens.value, false);
  add("key_scale", s.tokens.key_scale, true);
  add("value_scale", s.tokens.value_scale, true);
  arrays["lengths"] = int64(s.lengths);
  if constexpr (std::is_same_v<Cache, PagedKVCache>) {
    std::vector<Index> tables;
    for (const auto& table : s.tables) tables.insert(tables.end(), table.begin(), table.end());
    arrays["page_lengths"] = int64(s.page_lengths);
    arrays["tables"] = int64(tables);
    arrays["given_back"] = int64(s.given_back);
  }
  return arrays;
}

std::vector<Index> ints_of(const py::dict& arrays, const char* name) {
  const auto array = py::array_t<Index, py::array::c_style>::ensure(arrays[name]);
  return {array.data(), array.data() + array.size()};
}

/// The tables of all entries, one after another, by the entries' lengths.
std::vector<std::vector<Index>> split_tables(const std::vector<Index>& flat,
                                             const std::vector<Index>& lengths, Index page_size) {
  std::vector<std::vector<Index>> tables;
  auto next = flat.begin();
  for (const Index length : lengths) {
    const Index pages = length <= 0 ? 0 : (length - 1) / page_size + 1;
    const auto end = next + std::min<Index>(pages, flat.end() - next);
    tables.emplace_back(next, end);
    next = end;
  }
  if (next != flat.end()) reject_value("state", "has more pages in its tables than its lengths need");
  return tables;
}

/// Arrays as state() makes them.
template <class Cache>
void restore(Cache& cache, const py::dict& arrays) {
  CacheState s;
  const auto read = [&](const char* name, DType dtype, Tensor& t) {
    if (!arrays.contains(name)) return;
    const py::array array = arrays[name];
    const Index dim = array.ndim() < 3 ? 1 : array.shape(2) * (dtype == DType::i4 ? 2 : 1);
    t = Tensor::contiguous(array.data(), dtype, {1, array.shape(0), array.shape(1), dim});
  };
  const DType dtype = cache.settings().dtype;
  read("key", dtype, s.tokens.key);
  read("value", dtype, s.tokens.value);
  read("key_scale", DType::f32, s.tokens.key_scale);
  read("value_scale", DType::f32, s.tokens.value_scale);
  s.lengths = ints_of(arrays, "lengths");
  if constexpr (std::is_same_v<Cache, PagedKVCache>) {
    s.page_lengths = ints_of(arrays, "page_lengths");
    s.given_back = ints_of(arrays, "given_back");
    s.tables = split_tables(ints_of(arrays, "tables"), s.lengths, cache.page_size());
  }
  const WithoutGil no_gil;
  cache.restore(s);
}

Index positive(const char* argument, const py::object& object) {
  const Index value = integer(argument, object);
  if (value < 1) reject_value(argument, "is " + std::to_string(value) + ", must be at least 1");
  return value;
}

template <class Cache>
std::unique_ptr<Cache> make(const char* extent_name, const char* slots_name, const py::object& extent,
                            const py::object& slots, const py::object& kv_heads, const py::object& dim,
                            const py::object& value_dim, const py::object& value_in_key,
                            const std::string& dtype, const py::object& rotary, const py::object& window) {
  CacheSettings s;
  s.kv_heads = positive("kv_heads", kv_heads);
  s.dim = positive("dim", dim);
  if (!value_dim.is_none()) s.value_dim = positive("value_dim", value_dim);
  s.value_in_key = boolean("value_in_key", value_in_key);
  for (const DType one : {DType::f64, DType::f16, DType::bf16, DType::i8, DType::i4, DType::f8}) {
    if (dtype == name(one)) s.dtype = one;
  }
  if (!rotary.is_none()) s.rotary = rope_of(py::tuple(rotary));
  if (!window.is_none()) {
    s.window = integer("window", window);
    if (s.window < 0) reject_value("window", "is " + std::to_string(s.window) + ", must be at least 0");
  }
  return std::make_unique<Cache>(positive(extent_name, extent), positive(slots_name, slots), s);
}

template <class Cache>
py::class_<Cache> bind(py::module_& m, const char* class_name) {
  return py::class_<Cache>(m, class_name)
      .def("append", append<Cache>)
      .def("attend", attend<Cache>)
      .def("truncate", truncate<Cache>)
      .def("accept", accept<Cache>)
      .def("gather", gather<Cache>)
      .def("state", state<Cache>)
      .def("restore", restore<Cache>)
      .def("lengths", [](const Cache& cache) { return int64(cache.lengths()); })
      .def("memory", [](const Cache& cache) {
        const CacheMemory memory = cache.memory();
        return py::make_tuple(memory.reserved, memory.used);
      });
}

}  // namespace

void bind_cache(py::module_& m) {
  bind<KVCache>(m, "KVCache")
      .def(py::init([](const py::object& batch, const py::object& capacity, const py::args& rest) {
        return make<KVCache>("batch", "capacity", batch, capacity, rest[0], rest[1], rest[2], rest[3],
                             rest[4].cast<std::string>(), rest[5], rest[6]);
      }));
  bind<PagedKVCache>(m, "PagedKVCache")
      .def(py::init([](const py::object& pages, const py::object& page_size, const py::args& rest) {
        return make<PagedKVCache>("pages", "page_size", pages, page_size, rest[0], rest[1], rest[2], rest[3],
                                  rest[4].cast<std::string>(), rest[5], rest[6]);
      }))
      .def("add", &PagedKVCache::add)
      .def("fork",
           [](PagedKVCache& cache, const py::object& entry) { return cache.fork(integer("entry", entry)); })
      .def("free", [](PagedKVCache& cache, const py::object& entry) { cache.free(integer("entry", entry)); })
      .def("free_pages", &PagedKVCache::free_pages)
      .def("entries", [](const PagedKVCache& cache) { return int64(cache.entries()); })
      .def("block_table",
           [](const PagedKVCache& cache, const py::object& entry) {
             return int64(cache.block_table(integer("entry", entry)));
           })
      .def("reference_counts", [](const PagedKVCache& cache) { return int64(cache.reference_counts()); });
}

}  // namespace attncore::python

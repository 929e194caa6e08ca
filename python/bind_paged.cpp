// attention_paged and append_paged: keys and values that lie in the caller's pages.
#include <pybind11/stl.h>

#include <attncore/cache.hpp>

#include "bind.h"
#include "call.h"
#include "storage.h"

namespace attncore::python {
namespace {

/// (batch, pages), or (pages)
struct BlockTable : IntArgument {
  explicit BlockTable(const py::object& object) : IntArgument("block_table", object, 2, true) {
    if (object.is_none()) reject_type("block_table", "must be an array, is NoneType");
    std::swap(tensor.shape[2], tensor.shape[3]);
    std::swap(tensor.stride[2], tensor.stride[3]);
  }
};

/// The pools: key_pages and value_pages by layout, and their scales, None where there are none.
struct Pools {
  Pools(const std::array<py::object, 4>& objects, const py::object& layout, bool written) {
    constexpr std::array<const char*, 4> kNames{"key_pages", "value_pages", "key_scale", "value_scale"};
    const bool bshd = is_bshd(layout, "page_layout");
    for (std::size_t i = 0; i < 4; ++i) {
      const bool scale = i >= 2;
      if (objects[i].is_none() && (scale || (written && i == 1))) continue;  // no scales; no values
      const py::array array = require_array(kNames[i], objects[i]);
      if (array.ndim() != (scale ? 3 : 4)) {
        reject_value(kNames[i], "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                                    (scale ? "3: (page, slot, head)" : "4: (page, slot, head, dim)"));
      }
      if (written && !array.writeable()) reject_value(kNames[i], "is read-only");
      const Axes axes{0, bshd ? 2 : 1, bshd ? 1 : 2, scale ? -1 : 3};
      pools[i] = scale ? tensor(kNames[i], array, axes, "float32") : stored(kNames[i], array, axes);
    }
  }

  std::array<Tensor, 4> pools;
};

/// The arguments of attention_paged.
struct PagedArguments : Arguments {
  PagedArguments(const char* function, py::handle query, const std::array<py::object, 4>& objects,
                 const py::object& table, const py::object& page_layout, const py::object& cu_query_lengths,
                 const py::dict& options)
      : Arguments(function, query, py::handle(), py::handle(), options), block_table(table) {
    const auto [key, value, key_scale, value_scale] = Pools(objects, page_layout, false).pools;
    problem.key = key;
    problem.value = value;
    problem.key_scale = key_scale;
    problem.value_scale = value_scale;
    problem.paging.block_table = block_table.tensor;
    if (cu_query_lengths.is_none()) return;
    if (rank() != 3) {
      reject_value("query", "has " + std::to_string(rank()) +
                                " dimensions, packed queries have 3: (token, head, dim)");
    }
    problem.packing.query_tokens = ints("cu_query_lengths", cu_query_lengths, 1);
  }

  BlockTable block_table;
};

py::object attention_paged(py::handle query, const std::array<py::object, 4>& objects,
                           const py::object& table, const py::object& page_layout,
                           const py::object& cu_query_lengths, const py::object& out_or_none,
                           const py::object& return_lse, const py::dict& options) {
  PagedArguments arguments("attention_paged", query, objects, table, page_layout, cu_query_lengths, options);
  return call_forward(arguments, out_or_none, return_lse);
}

py::dict explain_paged(py::handle query, const std::array<py::object, 4>& objects, const py::object& table,
                       const py::object& page_layout, const py::object& cu_query_lengths,
                       const py::dict& options) {
  PagedArguments arguments("explain_paged", query, objects, table, page_layout, cu_query_lengths, options);
  return call_explain(arguments);
}

/// `tokens`: (key, value or None).
void append_call(const std::array<py::object, 2>& tokens, const std::array<py::object, 4>& pools,
                 const py::object& table, const py::object& key_lengths, const py::object& lengths,
                 const py::object& cu_lengths, const py::object& layout, const py::object& page_layout) {
  const bool packed = !cu_lengths.is_none(), bshd = is_bshd(layout) || packed;
  PagedAppend append;
  append.key = token_operand("key", tokens[0], bshd);
  if (!tokens[1].is_none()) append.value = token_operand("value", tokens[1], bshd);
  for (const py::object& array : tokens) {
    if (!packed || array.is_none() || py::len(array.attr("shape")) == 3) continue;
    reject_value("key", "and value are packed by cu_lengths, must have 3 dimensions: (token, head, dim)");
  }
  const auto [key_pages, value_pages, key_scale, value_scale] = Pools(pools, page_layout, true).pools;
  append.key_pages = key_pages;
  append.value_pages = value_pages;
  append.key_scale = key_scale;
  append.value_scale = value_scale;
  const BlockTable pages(table);
  append.block_table = pages.tensor;
  if (key_lengths.is_none()) reject_type("key_lengths", "must be an int or an array, is NoneType");
  const IntArgument before("key_lengths", key_lengths, 1), count("lengths", lengths, 1);
  const IntArgument starts("cu_lengths", cu_lengths, 1);
  append.key_lengths = before.tensor;
  append.lengths = count.tensor;
  append.token_starts = starts.tensor;
  Options options;
  run_without_gil(options, [&] { append_paged(append, options); });
}

}  // namespace

void bind_paged(py::module_& m) {
  m.def("attention_paged", attention_paged);
  m.def("explain_paged", explain_paged);
  m.def("append_paged", append_call);
}

}  // namespace attncore::python

// attention_paged: keys and values that lie in the caller's pages.
#include <pybind11/stl.h>

#include "arguments.h"
#include "bind.h"
#include "run.h"
#include "storage.h"

namespace attncore::python {
namespace {

/// (batch, pages), or (pages)
Tensor block_table(Arguments& arguments, const py::object& object) {
  if (object.is_none()) reject_type("block_table", "must be an array, is NoneType");
  Tensor table = arguments.ints("block_table", object, 2);
  std::swap(table.shape[2], table.shape[3]);
  std::swap(table.stride[2], table.stride[3]);
  return table;
}

/// The pools: key_pages and value_pages by layout, and their scales, None where there are none.
struct Pools {
  Pools(const std::array<py::object, 4>& objects, const py::object& layout) {
    constexpr std::array<const char*, 4> kNames{"key_pages", "value_pages", "key_scale", "value_scale"};
    const bool bshd = is_bshd(layout, "page_layout");
    for (std::size_t i = 0; i < 4; ++i) {
      const bool scale = i >= 2;
      if (scale && objects[i].is_none()) continue;
      const py::array array = require_array(kNames[i], objects[i]);
      if (array.ndim() != (scale ? 3 : 4)) {
        reject_value(kNames[i], "has " + std::to_string(array.ndim()) + " dimensions, must have " +
                                    (scale ? "3: (page, slot, head)" : "4: (page, slot, head, dim)"));
      }
      const Axes axes{0, bshd ? 2 : 1, bshd ? 1 : 2, scale ? -1 : 3};
      pools[i] = scale ? tensor(kNames[i], array, axes, "float32") : stored(kNames[i], array, axes);
    }
  }

  std::array<Tensor, 4> pools;
};

py::object attention_paged(py::handle query, const std::array<py::object, 4>& objects,
                           const py::object& table, const py::object& page_layout,
                           const py::object& cu_query_lengths, const py::object& out_or_none,
                           const py::object& return_lse_or_not, const py::args& options) {
  Arguments arguments(query, py::handle(), py::handle(), options);
  Problem& problem = arguments.problem;
  const auto [key, value, key_scale, value_scale] = Pools(objects, page_layout).pools;
  problem.key = key;
  problem.value = value;
  problem.key_scale = key_scale;
  problem.value_scale = value_scale;
  problem.paging.block_table = block_table(arguments, table);
  if (!cu_query_lengths.is_none()) {
    if (arguments.rank() != 3) {
      reject_value("query", "has " + std::to_string(arguments.rank()) +
                                " dimensions, packed queries have 3: (token, head, dim)");
    }
    problem.packing.query_tokens = arguments.ints("cu_query_lengths", cu_query_lengths, 1);
  }
  const bool return_lse = boolean("return_lse", return_lse_or_not);
  py::array out = out_or_none.is_none() ? arguments.allocate_out() : require_array("out", out_or_none);
  problem.out = arguments.out_tensor(out);
  py::array lse;
  if (return_lse) {
    lse = arguments.allocate_rows(arguments.compute_dtype(), problem.query.shape[2], std::nullopt);
    problem.lse = arguments.rows_tensor("lse", lse, false);
  }
  run_without_gil(arguments.options, [&] { forward(problem, arguments.options); });
  if (return_lse) return py::make_tuple(out, lse);
  return out;
}

}  // namespace

void bind_paged(py::module_& m) { m.def("attention_paged", attention_paged); }

}  // namespace attncore::python

// Which ISA is taken where nobody asks for one: what is to be tried is taken if it is right and clearly faster.  The model of a
// matrix unit (tile_model.h) is right and slow, and wrong where it is broken; the baseline is fast beside one that does its work
// several times.
#pragma once

#include <cstring>
#include <string>

#include "cpu/choice.h"
#include "cpu/dispatch.h"
#include "tile_model.h"

namespace attncore {
namespace {

const Kernels& of_baseline() { return *table_named("baseline").f32; }

/// The baseline's, but their work done several times: of tasks that begin with nothing, so that they end with the same.
Kernels repeated() {
  Kernels kernels = of_baseline();
  kernels.forward = [](const Call& call, const Task& task, std::byte* scratch) noexcept {
    CHECK(task.first && task.last);
    for (int i = 0; i < 4; ++i) of_baseline().forward(call, task, scratch);
  };
  return kernels;
}

bool yes() noexcept { return true; }
bool no() noexcept { return false; }
IsaTable with(const char* name, bool (*preferred)() noexcept, const Kernels& f32, const Kernels& bf16) {
  IsaTable table = table_named("baseline");
  table.name = name;
  table.preferred = preferred;
  table.bf16 = &bf16;
  for (const Kernels** const kernels : {&table.f32, &table.f16, &table.highest, &table.high, &table.medium,
                                        &table.bf16_products, &table.bf16_gradients})
    *kernels = &f32;
  return table;
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void trials(const Kernels& in_tiles) {
  const Kernels slow = repeated();
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    const Trial fast = try_kernels(of_baseline(), slow, dtype);
    CHECK(fast.right && fast.speedup > 1.2);
    const Trial tardy = try_kernels(slow, of_baseline(), dtype);
    CHECK(tardy.right && tardy.speedup > 0 && tardy.speedup < 1);
  }
  const Trial model = try_kernels(in_tiles, of_baseline(), DType::bf16);
  CHECK(model.right && model.speedup > 0 && model.speedup < 1);
  tiles.broken = true;
  const Trial broken = try_kernels(in_tiles, slow, DType::bf16);
  tiles.broken = false;
  CHECK(!broken.right && broken.speedup == 0);
  Kernels nothing = of_baseline();  // fast, and wrong: what is in out stays there
  nothing.forward = [](const Call&, const Task&, std::byte*) noexcept {};
  CHECK(!try_kernels(nothing, slow, DType::f32).right);
  Kernels copy = of_baseline();  // fast, and right only where each row sees no key but its own
  copy.forward = [](const Call& call, const Task&, std::byte*) noexcept {
    for (Index row = 0; row < call.queries; ++row) {
      std::memcpy(at(call.out, 0, 0, row), at(call.value, 0, 0, row),
                  static_cast<std::size_t>(call.value_dim * item_size(call.value.dtype)));
    }
  };
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    CHECK(!try_kernels(copy, slow, dtype).right);
}

void choices(const Kernels& in_tiles) {
  const Kernels slow = repeated(), fast = of_baseline();
  const IsaTable last = with("last", yes, slow, slow);
  const IsaTable rapid = with("rapid", nullptr, slow, fast), both = with("both", nullptr, fast, fast);
  const IsaTable model = with("model", nullptr, slow, in_tiles), unwanted = with("unwanted", no, slow, slow);

  const Choice one = choose({&rapid, &unwanted, &last});
  CHECK(one.table == &rapid);
  CHECK(contains(one.reason, "rapid was tried against last: bfloat16 ") && contains(one.reason, "as fast"));
  CHECK(!contains(one.reason, "float32"));  // which it does not change

  const Choice next = choose({&both, &rapid, &last});
  CHECK(next.table == &both);
  CHECK(contains(next.reason, "; both was tried against rapid: float16 ") &&
        contains(next.reason, ", float32 "));

  const Choice stays = choose({&rapid, &model, &last});
  CHECK(stays.table == &last);  // what builds on the model is not tried
  CHECK(contains(stays.reason, "model was tried against last: bfloat16 0.") &&
        !contains(stays.reason, "rapid"));

  tiles.broken = true;
  const Choice broken = choose({&model, &last});
  tiles.broken = false;
  CHECK(broken.table == &last);
  CHECK(contains(broken.reason, "bfloat16 gives wrong results"));

  const IsaTable first = with("first", yes, slow, slow);
  CHECK(choose({&rapid, &first, &last}).table == &rapid);
  CHECK(choose({&first, &rapid, &last}).table == &first);  // nothing after the best is tried
  CHECK(choose({&unwanted, &last}).table == &last);
}

/// This machine's own; asking changes it and the reason.
void own_choice() {
  const Choice choice = choose(available_tables());
  CHECK(choice.table->preferred == nullptr || choice.table->preferred());
  const std::string before = isa(), reason = isa_reason();
  CHECK(!reason.empty());
  use_isa("baseline");
  CHECK(isa() == "baseline");
  CHECK(before == "baseline" ? isa_reason() == reason : isa_reason() == "asked for");
  use_isa(before);
  CHECK(isa_reason() == reason);
}

void check_choice(const Kernels& in_tiles) {
  trials(in_tiles);
  choices(in_tiles);
  own_choice();
}

}  // namespace
}  // namespace attncore

#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "../text.h"
#include "choice.h"

namespace attncore {

// The build writes one line for each ISA, the best first.
#define ATTN_ISA(name) extern const IsaTable name;
#include "attncore_isas.h"
#undef ATTN_ISA

namespace {

constexpr const IsaTable* kTables[] = {
#define ATTN_ISA(name) &name,
#include "attncore_isas.h"
#undef ATTN_ISA
};

std::atomic<const IsaTable*> chosen{nullptr};
std::atomic<const Choice*> unasked{nullptr};  // the choice, where it was not the user's

const Choice& best_choice() {
  static const Choice choice = choose(available_tables());
  unasked = &choice;
  return choice;
}

}  // namespace

const std::vector<const IsaTable*>& available_tables() {
  static const std::vector<const IsaTable*> tables = [] {
    std::vector<const IsaTable*> list;
    for (const IsaTable* table : kTables) {
      if (table->supported()) list.push_back(table);
    }
    return list;
  }();
  return tables;
}

const IsaTable& table_named(const std::string& name) {
  for (const IsaTable* table : available_tables()) {
    if (name == table->name) return *table;
  }
  throw std::invalid_argument("isa: '" + name + "' is not available, this machine has " +
                              joined(available_isas(), ", "));
}

const IsaTable& current_table() {
  if (const IsaTable* table = chosen.load(std::memory_order_relaxed)) return *table;
  const char* const forced = std::getenv("ATTNCORE_ISA");
  const IsaTable& table = forced != nullptr && *forced != '\0' ? table_named(forced) : *best_choice().table;
  const IsaTable* unset = nullptr;
  chosen.compare_exchange_strong(unset, &table);
  return *chosen.load();
}

std::string isa_reason() {
  const IsaTable& table = current_table();
  const Choice* const choice = unasked;
  return choice != nullptr && choice->table == &table ? choice->reason : "asked for";
}

std::string isa() { return current_table().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaTable* table : available_tables()) names.emplace_back(table->name);
  return names;
}

void use_isa(const std::string& name) { chosen = &table_named(name); }

}  // namespace attncore

#include "sequences.h"

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "require.h"

namespace attncore {
namespace {

using std::to_string;

constexpr Index kMostWords = Index{1}
                             << 44;  // more than any machine's memory: sums and products stay in range

std::string entry_is(Index entry, Index value) {
  return "entry " + to_string(entry) + " is " + to_string(value);
}

/// Places of packed sequences, from cumulative lengths (batch + 1).
std::vector<Place> packed_places(const char* argument, const Tensor& cumulative, Index tokens) {
  std::vector<Place> places;
  Index before = 0;
  for (Index entry = 0; entry < cumulative.shape[0]; ++entry) {
    const Index next = read_int(at(cumulative, entry, 0), cumulative.dtype);
    if (entry == 0 && next != 0)
      reject(argument, entry_is(0, next) + ", must be 0: a sequence begins where the one before it ends");
    if (next < before || next > tokens) {
      reject(argument, entry_is(entry, next) + ", must be " + to_string(before) + " … " + to_string(tokens));
    }
    if (entry > 0) places.push_back({0, before, next - before});
    before = next;
  }
  if (before != tokens) {
    reject(argument,
           "ends with " + to_string(before) + ", must end with the number of tokens, " + to_string(tokens));
  }
  return places;
}

}  // namespace

std::vector<Place> places_of(const char* argument, const Tensor& cumulative, Index batch, Index tokens,
                             Index& longest) {
  if (!cumulative.given()) {
    longest = tokens;
    std::vector<Place> places;
    places.reserve(static_cast<std::size_t>(batch));
    for (Index entry = 0; entry < batch; ++entry) places.push_back({entry, 0, tokens});
    return places;
  }
  require_ints(argument, cumulative, {batch + 1, 1, 1, 1}, {"batch + 1"});
  std::vector<Place> places = packed_places(argument, cumulative, tokens);
  longest = 0;
  for (const Place& place : places) longest = max(longest, place.tokens);
  return places;
}

Index read_length(const char* argument, const Tensor& lengths, Index entry, Index tokens) {
  if (!lengths.given()) return tokens;
  const Index length = read_int(at(lengths, entry, 0), lengths.dtype);
  if (length < 0 || length > tokens) {
    reject(argument, entry_is(entry, length) + ", must be 0 … " + to_string(tokens));
  }
  return length;
}

namespace {

Index read_offset(const Tensor& offset, Index entry, Index otherwise) {
  if (!offset.given()) return otherwise;
  const Index first = read_int(at(offset, entry, 0), offset.dtype);
  if (first < -kFarthest || first > kFarthest) {
    reject("query_offset", "is " + to_string(first) + ", must be within ± 2**60");
  }
  return first;
}

/// The pages that the sequences' keys lie in, copied and checked.
void read_pages(Call& call, const Tensor& table) {
  constexpr auto kTable = "block_table";
  const Index slots = call.key.shape[2], pool = call.key.shape[0];
  if (pool > std::numeric_limits<std::int32_t>::max()) {
    reject("key_pages", "has " + to_string(pool) + " pages, must have fewer than 2**31");
  }
  Index count = 0;
  for (Sequence& sequence : call.sequences) {
    sequence.first_page = count;
    count += ceil_div(sequence.keys, slots);
    if (count > kMostWords) throw std::bad_alloc();
  }
  const std::shared_ptr<std::int32_t[]> memory(new std::int32_t[static_cast<std::size_t>(max(1, count))]);
  for (const Sequence& sequence : call.sequences) {
    for (Index i = 0; i < ceil_div(sequence.keys, slots); ++i) {
      const Index page = read_int(at(table, sequence.batch, 0, 0, i), table.dtype);
      if (page < 0 || page >= pool) {
        reject(kTable, "entry (" + to_string(sequence.batch) + ", " + to_string(i) + ") is " +
                           to_string(page) +
                           (pool > 0 ? ", must be 0 … " + to_string(pool - 1) : ", key_pages has none"));
      }
      memory[static_cast<std::size_t>(sequence.first_page + i)] = static_cast<std::int32_t>(page);
    }
  }
  call.pages = {memory.get(), slots, memory};
}

void require_table(const Call& call, const Tensor& table, const Tensor& key_lengths) {
  require_ints("block_table", table, {call.batch, 1, 1, table.shape[3]}, {"batch", "", "", "pages"});
  if (!key_lengths.given() && call.batch > 0) reject("key_lengths", "is not given, pages need it");
  const Index slots = call.key.shape[2];
  if (slots < 1) reject("key_pages", "has pages of 0 tokens, must have at least 1");
  if (table.shape[3] > kFarthest / slots) {
    reject("block_table", "has " + to_string(table.shape[3]) + " pages of " + to_string(slots) +
                              " tokens an entry, must have at most 2**60 tokens");
  }
}

}  // namespace

void resolve_sequences(Call& call, const Problem& problem) {
  const Packing& packing = problem.packing;
  const Tensor& table = problem.paging.block_table;
  Score& score = call.score;
  for (const auto& [argument, lengths] :
       {std::pair<const char*, const Tensor&>{"query_lengths", score.query_lengths},
        {"key_lengths", score.key_lengths}}) {
    if (is_given(argument, lengths)) require_ints(argument, lengths, {call.batch, 1, 1, 1}, {"batch"});
  }
  Tensor& offset = score.query_offset;
  if (is_given("query_offset", offset)) {
    require_dtype("query_offset", offset, {DType::i32, DType::i64});
    broadcast_to("query_offset", offset, {call.batch, 1, 1, 1}, {"batch"});
  }
  const bool paged = table.given();
  if (paged) require_table(call, table, score.key_lengths);
  const Index slots = paged ? table.shape[3] * call.key.shape[2] : call.key.shape[2];
  if (!score.query_lengths.given() && !score.key_lengths.given() && !offset.given() &&
      !packing.query_tokens.given() && !packing.key_tokens.given()) {
    call.queries = call.query.shape[2];
    call.keys = slots;
    return;
  }
  const std::vector<Place> queries =
      places_of("cu_query_lengths", packing.query_tokens, call.batch, call.query.shape[2], call.queries);
  const std::vector<Place> keys =
      places_of("cu_key_lengths", packing.key_tokens, call.batch, slots, call.keys);
  call.sequences.reserve(static_cast<std::size_t>(call.batch));
  for (Index entry = 0; entry < call.batch; ++entry) {
    Sequence s{.batch = entry,
               .query_place = queries[static_cast<std::size_t>(entry)],
               .key_place = keys[static_cast<std::size_t>(entry)]};
    s.queries = read_length("query_lengths", score.query_lengths, entry, s.query_place.tokens);
    s.keys = read_length("key_lengths", score.key_lengths, entry, s.key_place.tokens);
    s.offset = read_offset(offset, entry, s.keys - s.queries);
    call.sequences.push_back(s);
  }
  if (paged) read_pages(call, table);
}

void resolve_tree(Call& call) {
  const Tensor& parents = call.score.tree_parents;
  if (!is_given("tree_parents", parents)) return;
  const Score& score = call.score;
  if (score.left != kUnbounded || (score.right != kUnbounded && score.right != 0) || score.alibi.given() ||
      score.relative_bias.table.given()) {
    reject("tree_parents",
           "comes with a window, alibi or relative_bias, which go by distances that a tree does not have");
  }
  constexpr Index kBits = 64;
  const Index tokens = call.query.shape[2], entries = call.query.shape[0];
  Tensor repeated = parents;
  require_dtype("tree_parents", parents, {DType::i32, DType::i64});
  broadcast_to("tree_parents", repeated, {entries, 1, tokens, 1}, {"batch", "", "query"});
  Tree tree{.words = ceil_div(max(1, call.queries), kBits)};
  if (max(1, entries) > kMostWords / tree.words / max(1, tokens)) throw std::bad_alloc();
  tree.stride = tokens * tree.words;
  const auto count = static_cast<std::size_t>(max(1, entries * tree.stride));
  const std::shared_ptr<std::uint64_t[]> lines(new std::uint64_t[count]());
  for (Index entry = 0; entry < call.batch; ++entry) {
    const Sequence s = call.sequence(entry);
    if (s.keys < s.queries) {
      reject("tree_parents", "entry " + to_string(entry) + " has " + to_string(s.keys) +
                                 " keys, must have one a query: " + to_string(s.queries));
    }
    const Place& place = s.query_place;
    std::uint64_t* const first = lines.get() + place.batch * tree.stride + place.first * tree.words;
    for (Index query = 0; query < s.queries; ++query) {
      const Index parent = read_int(at(repeated, place.batch, 0, place.first + query), parents.dtype);
      if (parent < -1 || parent >= query) {
        reject("tree_parents", "of query " + to_string(query) + " is " + to_string(parent) +
                                   ", must be -1 … " + to_string(query - 1));
      }
      std::uint64_t* const line = first + query * tree.words;
      if (parent >= 0) std::copy_n(first + parent * tree.words, tree.words, line);
      line[query / kBits] |= std::uint64_t{1} << (query % kBits);
    }
  }
  tree.lines = lines.get();
  tree.memory = lines;
  call.tree = std::move(tree);
}

}  // namespace attncore

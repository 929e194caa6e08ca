// New tokens for the caller's pages: all is checked first, then written.
#include <algorithm>
#include <attncore/cache.hpp>

#include "cache_format.h"
#include "require.h"
#include "sequences.h"

namespace attncore {
namespace {

using std::to_string;

constexpr Index kChunk = 64;  // tokens that are written between two looks at Options::cancelled

/// Keys or values: what comes, where it goes.
struct Stream {
  const char* name;
  const char* pages_name;
  const char* scale_name;
  Tensor tokens, pages, scale;
};

/// Tokens first … first + count − 1 of an entry are new; they stand at `from`.
struct Piece {
  Index entry = 0, first = 0, count = 0;
  Place from;
};

/// Slots begin … end − 1 of a page are written: page `place` of an entry.
struct Write {
  Index page = 0, entry = 0, place = 0;
  Range slots;
};

void require_pages(const Stream& s) {
  const Tensor& pages = s.pages;
  require_given(s.pages_name, pages);
  require_stored(s.pages_name, pages);
  if (pages.shape[2] < 1) reject(s.pages_name, "has pages of 0 tokens, must have at least 1");
  const Index gap = pages.dtype == DType::i4 ? 2 : 1;  // one byte has no neighbours
  if (is_quantised(pages.dtype) && pages.shape[3] > gap && pages.stride[3] != 1) {
    reject(s.pages_name, "has a dim of " + to_string(pages.shape[3]) + " numbers at a stride of " +
                             to_string(pages.stride[3]) + " bytes, " + name(pages.dtype) +
                             " must have no gaps");
  }
  if (pages.dtype == DType::i4 && pages.shape[3] % 2 != 0) {
    reject(s.pages_name, "has a dim of " + to_string(pages.shape[3]) + ", int4 must have an even one");
  }
}

void require_stream(const Stream& s, Index entries, const Stream& keys) {
  require_given(s.name, s.tokens);
  require_float(s.name, s.tokens);
  require_pages(s);
  const Index dim = s.pages.shape[3];
  if (dim < 1) reject(s.pages_name, "shape is " + shape_text(s.pages.shape) + ", dim must be at least 1");
  Shape pages = keys.pages.shape, tokens = keys.tokens.shape;
  pages[3] = tokens[3] = dim;
  tokens[0] = entries;
  tokens[1] = pages[1];
  require_shape(s.pages_name, s.pages, pages, kPageAxes);
  require_shape(s.name, s.tokens, tokens, kTokenAxes);
  if (is_quantised(s.pages.dtype) != s.scale.given()) {
    reject(s.scale_name, std::string(s.scale.given() ? "comes with " : "is not given, it must come with ") +
                             s.pages_name + " of " + name(s.pages.dtype) +
                             (s.scale.given() ? ", only int8, float8_e4m3fn and int4 have scales" : ""));
  }
  if (!s.scale.given()) return;
  require_dtype(s.scale_name, s.scale, {DType::f32});
  require_shape(s.scale_name, s.scale, {pages[0], pages[1], pages[2], 1}, {"page", "head", "slot"});
}

/// What is written lies apart: from itself, from all that is read, and from each other.
void require_all_apart(const std::vector<Stream>& streams, const PagedAppend& append) {
  std::vector<Named> others{{"block_table", &append.block_table},
                            {"key_lengths", &append.key_lengths},
                            {"lengths", &append.lengths},
                            {"cu_lengths", &append.token_starts}};
  for (const Stream& s : streams) others.push_back({s.name, &s.tokens});
  for (const Stream& s : streams) {
    for (const Named& written : {Named{s.pages_name, &s.pages}, Named{s.scale_name, &s.scale}}) {
      if (!written.tensor->given()) continue;
      require_apart(written.name, *written.tensor, others);
      others.push_back(written);
    }
  }
}

/// One append, checked.
class Appending {
 public:
  Appending(const PagedAppend& append, const Options& options) : append_(append), options_(options) {
    streams_.push_back({"key", "key_pages", "key_scale", append.key, append.key_pages, append.key_scale});
    const bool values = append.value_pages.given();
    if (append.value.given() != values) {
      reject(values ? "value" : "value_pages", "is not given, value and value_pages come together");
    }
    if (values) {
      streams_.push_back(
          {"value", "value_pages", "value_scale", append.value, append.value_pages, append.value_scale});
    } else if (append.value_scale.given()) {
      reject("value_scale", "comes without value_pages");
    }
    const Tensor& starts = append.token_starts;
    if (is_given("cu_lengths", starts) && starts.shape[0] < 1)
      reject("cu_lengths", "is empty, must begin with 0");
    batch_ = starts.given() ? starts.shape[0] - 1 : append.key.shape[0];
    for (const Stream& s : streams_) require_stream(s, starts.given() ? 1 : batch_, streams_[0]);
    read_lengths();
    read_table();
    require_all_apart(streams_, append);
    require_finite();
  }

  void run() {
    each_chunk([](const Stream& s, const Tensor& from, const Tensor& to, const Tensor& scale, Index, Index) {
      if (s.scale.given()) {
        (void)quantise(from, to, scale);
      } else {
        convert(from, to);
      }
    });
  }

 private:
  [[nodiscard]] Index slots() const noexcept { return streams_[0].pages.shape[2]; }

  [[nodiscard]] Index page(Index entry, Index place) const noexcept {
    return read_int(at(append_.block_table, entry, 0, 0, place), append_.block_table.dtype);
  }

  void read_lengths() {
    const Tensor &table = append_.block_table, &old = append_.key_lengths, &added = append_.lengths;
    for (const auto& [argument, t] : {Named{"block_table", &table}, {"key_lengths", &old}}) {
      require_given(argument, *t);
    }
    require_ints("block_table", table, {batch_, 1, 1, table.shape[3]}, {"batch", "", "", "pages"});
    require_ints("key_lengths", old, {batch_, 1, 1, 1}, {"batch"});
    if (is_given("lengths", added)) require_ints("lengths", added, {batch_, 1, 1, 1}, {"batch"});
    if (table.shape[3] > kFarthest / slots()) reject("block_table", "has room for more than 2**60 tokens");
    Index longest = 0;
    const auto places = places_of("cu_lengths", append_.token_starts, batch_, append_.key.shape[2], longest);
    const Index room = table.shape[3] * slots();
    for (Index entry = 0; entry < batch_; ++entry) {
      const Place& from = places[static_cast<std::size_t>(entry)];
      Piece piece{entry, read_length("key_lengths", old, entry, room),
                  read_length("lengths", added, entry, from.tokens), from};
      if (piece.count > room - piece.first) {
        reject("block_table", "has room for " + to_string(room) + " tokens, entry " + to_string(entry) +
                                  " has " + to_string(piece.first) + " and gets " + to_string(piece.count));
      }
      pieces_.push_back(piece);
    }
  }

  /// The pages that are written exist, and nobody else has tokens in what is written there.
  void read_table() {
    const Index pool = streams_[0].pages.shape[0];
    std::vector<Write> writes;
    for (const Piece& piece : pieces_) {
      const Index end = piece.first + piece.count;
      for (Index token = piece.first; token < end; token = (token / slots() + 1) * slots()) {
        const Index place = token / slots(), number = page(piece.entry, place);
        if (number < 0 || number >= pool) {
          reject("block_table",
                 "entry (" + to_string(piece.entry) + ", " + to_string(place) + ") is " + to_string(number) +
                     (pool > 0 ? ", must be 0 … " + to_string(pool - 1) : ", key_pages has none"));
        }
        const Range slots_of_page{token % slots(), min(end - place * slots(), slots())};
        writes.push_back({number, piece.entry, place, slots_of_page});
      }
    }
    tables_.reserve(writes.size());
    for (const Write& write : writes) tables_.push_back(write.page);
    require_one_writer(writes);
    require_no_reader(writes);
  }

  /// Sorts them by page.
  static void require_one_writer(std::vector<Write>& writes) {
    std::sort(writes.begin(), writes.end(), [](const Write& a, const Write& b) {
      return a.page != b.page ? a.page < b.page : a.entry < b.entry;
    });
    for (std::size_t i = 1; i < writes.size(); ++i) {
      const Write &a = writes[i - 1], &b = writes[i];
      if (a.page != b.page) continue;
      reject("block_table",
             a.entry == b.entry
                 ? "entry " + to_string(a.entry) + " would write page " + to_string(a.page) + " twice"
                 : "entries " + to_string(a.entry) + " and " + to_string(b.entry) +
                       " would both write page " + to_string(a.page));
    }
  }

  void require_no_reader(const std::vector<Write>& writes) const {
    if (writes.empty()) return;
    std::vector<bool> written(static_cast<std::size_t>(streams_[0].pages.shape[0]));
    for (const Write& write : writes) written[static_cast<std::size_t>(write.page)] = true;
    for (const Piece& piece : pieces_) {
      for (Index place = 0; place * slots() < piece.first; ++place) {
        const Index number = page(piece.entry, place);
        if (number < 0 || number >= streams_[0].pages.shape[0] || !written[static_cast<std::size_t>(number)])
          continue;
        const auto write = std::lower_bound(writes.begin(), writes.end(), number,
                                            [](const Write& w, Index at) { return w.page < at; });
        if (write->slots.begin >= min(slots(), piece.first - place * slots())) continue;
        reject("block_table", "entry " + to_string(write->entry) + " would write page " + to_string(number) +
                                  " where entry " + to_string(piece.entry) + " has tokens");
      }
    }
  }

  /// visit(stream, from, to, scale, entry, token): tensors (1, head, token, dim), `token` the number of their first one
  /// among the entry's new ones.
  template <class Visit>
  void each_chunk(Visit visit) {
    auto page_of = tables_.begin();
    for (const Piece& piece : pieces_) {
      for (Index done = 0, count = 0; done < piece.count; done += count) {
        if (options_.cancelled && options_.cancelled()) throw Cancelled();
        const Index slot = (piece.first + done) % slots();
        count = min(min(kChunk, piece.count - done), slots() - slot);
        for (const Stream& s : streams_) {
          visit(s, tokens_of(s.tokens, piece.from.batch, piece.from.first + done, count),
                tokens_of(s.pages, *page_of, slot, count), tokens_of(s.scale, *page_of, slot, count),
                piece.entry, done);
        }
        if (slot + count == slots() || done + count == piece.count) ++page_of;
      }
    }
  }

  /// What is quantised, once for nothing: an error must come before anything is written.
  void require_finite() {
    each_chunk([this](const Stream& s, const Tensor& from, const Tensor& to, const Tensor&, Index entry,
                      Index token) {
      if (!s.scale.given()) return;
      Tensor numbers = Tensor::contiguous(nullptr, to.dtype, to.shape);
      Tensor scales = Tensor::contiguous(nullptr, DType::f32, {1, to.shape[1], to.shape[2], 1});
      trial_.resize(static_cast<std::size_t>(numbers.stride[0] + scales.stride[0]));
      scales.data = trial_.data();
      numbers.data = trial_.data() + scales.stride[0];
      if (const auto bad = quantise(from, numbers, scales)) {
        reject_row(s.name, entry, *bad, token, to.dtype);
      }
    });
  }

  const PagedAppend& append_;
  const Options& options_;
  Index batch_ = 0;
  std::vector<Stream> streams_;
  std::vector<Piece> pieces_;
  std::vector<Index> tables_;  // the pages that are written, in the order of writing
  std::vector<std::byte> trial_;
};

}  // namespace

void append_paged(const PagedAppend& append, const Options& options) { Appending(append, options).run(); }

}  // namespace attncore

// Batch entries as sequences: where their tokens stand, how many exist, which pages hold them, how new ones descend.
#pragma once

#include "call.h"

namespace attncore {

/// Where each entry's tokens stand, by cumulative lengths (batch + 1) if given; `longest` becomes the longest entry's number of them.
std::vector<Place> places_of(const char* argument, const Tensor& cumulative, Index batch, Index tokens,
                             Index& longest);

/// An entry's length, 0 … tokens; `tokens` if there are no lengths.
Index read_length(const char* argument, const Tensor& lengths, Index entry, Index tokens);

/// Sets the batch, the sequences, their pages, and the longest one's queries and keys.  query, key and value have been
/// looked at.  Lengths, offsets, pages are read here, once.
void resolve_sequences(Call& call, const Problem& problem);

/// The ancestors of new tokens.
void resolve_tree(Call& call);

}  // namespace attncore

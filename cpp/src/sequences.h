// Batch entries as sequences: where their tokens stand, how many exist, which pages hold them, how new ones descend.
#pragma once

#include "call.h"

namespace attncore {

/// Sets the batch, the sequences, their pages, and the longest one's queries and keys.  query, key and value have been
/// looked at.  Lengths, offsets, pages are read here, once.
void resolve_sequences(Call& call, const Problem& problem);

/// The ancestors of new tokens.
void resolve_tree(Call& call);

}  // namespace attncore

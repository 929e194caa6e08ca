#include "avx512.h"

#include "isa.h"

namespace attncore {

extern constinit const IsaTable avx512 = make_table<Avx512>("avx512", supported);

}  // namespace attncore

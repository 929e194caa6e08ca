#include "avx2.h"

#include "isa.h"

namespace attncore {

extern constinit const IsaTable avx2 = make_table<Avx2>("avx2", supported);

}  // namespace attncore

#include "baseline.h"

#include "isa.h"

namespace attncore {

extern constinit const IsaTable baseline = make_table<Baseline>("baseline", supported);

}  // namespace attncore

// The two function macros.  Code that several instruction sets compile must never be shared between them by
// the linker, so whatever has no ISA in its type is inlined by force.
#pragma once

#define ATTN_INLINE inline __attribute__((always_inline))

#ifdef __CUDACC__
#define ATTN_FN __host__ __device__ inline
#else
#define ATTN_FN ATTN_INLINE
#endif

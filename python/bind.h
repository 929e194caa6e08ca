// What each binding file adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace attncore::python {

void bind_backward(pybind11::module_& m);  ///< attention_backward and dropout_mask
void bind_cache(pybind11::module_& m);     ///< KVCache and PagedKVCache
void bind_layers(pybind11::module_& m);    ///< linear, linear_backward and rope
void bind_multi_head_attention(pybind11::module_& m);
void bind_paged(pybind11::module_& m);   ///< the *_paged functions
void bind_varlen(pybind11::module_& m);  ///< the *_varlen functions
void bind_state(pybind11::module_& m);   ///< AttentionState

}  // namespace attncore::python

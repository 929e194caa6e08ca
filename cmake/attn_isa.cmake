# An instruction set is one source file with compile flags of its own, and one line of a generated header.

set(attncore_isas "")

# attn_isa(NAME FLAG…) compiles cpp/src/cpu/isa/NAME.cpp with FLAG…; call it for the best instruction set first.
# GCC's AVX-512 intrinsics warn of a register that they leave undefined on purpose.
# Kernels are optimised whatever the rest is built for, except that Debug builds (the sanitizers') keep their own level.
function(attn_isa name)
  if(ATTNCORE_ISAS AND NOT name STREQUAL baseline AND NOT name IN_LIST ATTNCORE_ISAS)
    return()
  endif()
  set(source ${PROJECT_SOURCE_DIR}/cpp/src/cpu/isa/${name}.cpp)
  target_sources(attncore PRIVATE ${source})
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
    "${ARGN};$<$<NOT:$<CONFIG:Debug>>:-O3>;-ffp-contract=fast;-fno-math-errno;-fno-trapping-math;$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>")
  set(attncore_isas ${attncore_isas} ${name} PARENT_SCOPE)
endfunction()

# attn_isa_list() writes attncore_isas.h: ATTN_ISA(NAME) for each, in the order of the calls.
function(attn_isa_list)
  list(TRANSFORM attncore_isas REPLACE "(.+)" "ATTN_ISA(\\1)\n" OUTPUT_VARIABLE lines)
  string(CONCAT text "// Written by cmake/attn_isa.cmake: the instruction sets of this build, the best first.\n" ${lines})
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/generated/attncore_isas.h CONTENT "${text}" @ONLY)
endfunction()

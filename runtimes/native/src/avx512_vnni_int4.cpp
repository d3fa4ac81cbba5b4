// int4 weights with AVX-512 VNNI; see avx512_vnni.cpp.
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

extern const IntegerKernels kVnniInt4;

namespace {
#include "losa/loops/vnni_kernels.h"
}  // namespace

const IntegerKernels kVnniInt4 = kVnniKernels<SparseInt4, DenseInt4>;

}  // namespace losa

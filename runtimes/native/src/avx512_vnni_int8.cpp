// int8 weights with AVX-512 VNNI; see avx512_vnni.cpp.
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

extern const IntegerKernels kVnniInt8;

namespace {
#include "losa/loops/vnni_kernels.h"
}  // namespace

const IntegerKernels kVnniInt8 = kVnniKernels<SparseInt8, DenseInt8>;

}  // namespace losa

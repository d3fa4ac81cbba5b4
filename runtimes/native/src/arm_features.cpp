// Compiled for any ARM processor: it runs before the CPU has been asked what it can do.
#include "losa/arm_features.h"

#ifdef __linux__
#include <sys/auxv.h>
#endif

namespace losa {
namespace {

#ifdef __linux__
// Bits of the kernel's interface, by number: older C libraries lack the names.
bool has(unsigned long type, int bit) { return (getauxval(type) >> bit & 1) != 0; }
constexpr unsigned long kHwcap = 16, kHwcap2 = 26;
constexpr int kDotprod = 20, kI8mm = 13;
#endif

}  // namespace

#ifdef __linux__
bool arm_has_dotprod() { return has(kHwcap, kDotprod); }
bool arm_has_i8mm() { return arm_has_dotprod() && has(kHwcap2, kI8mm); }
#else  // nobody to ask: the row that every processor runs
bool arm_has_dotprod() { return false; }
bool arm_has_i8mm() { return false; }
#endif

}  // namespace losa

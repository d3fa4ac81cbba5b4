// What an ARM processor can do beyond the instructions that all of them have.
#pragma once

namespace losa {

bool arm_has_dotprod();
/// Products of small matrices; only with dotprod.
bool arm_has_i8mm();

}  // namespace losa

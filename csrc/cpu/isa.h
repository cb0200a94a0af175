// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "blocks.h"

namespace vdu {

// The block functions in use: the fastest that this machine has, unless another was chosen.
const Isa& isa();

// Names of the instruction sets that this machine has, fastest first.
std::vector<std::string> available_isas();

// Chooses one by name, for tests and measurements; false when this machine does not have it.
bool choose_isa(const std::string& name);

}  // namespace vdu

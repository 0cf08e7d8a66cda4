// Holds this program to the golden vectors of protos/testdata.
#pragma once

#include <string>

namespace armillary {

// Recomputes every file of the folder; prints a line for each, and what is wrong. False where anything is.
bool check_vectors(const std::string& folder);

}  // namespace armillary

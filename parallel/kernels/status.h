// What an entry of a kernel library returns to MindSpore; everything but kDone ends the program with this number.
#pragma once

enum Status : int {
  kDone = 0,
  kNoProduct = 1,  // oneDNN's matrix product is not in this process
  kBadCall = 2,    // another number of inputs and outputs than the entry has, or shapes that do not fit
  kBadCounts = 3,  // experts with more rows together than there are
};

// The CUDA ops on a CPU, for the tests: schemas and checks in one translation unit, since torch's headers cost 10 s each.
#include "../../csrc/ops.cpp"

#include "../../csrc/cuda_ops.cpp"

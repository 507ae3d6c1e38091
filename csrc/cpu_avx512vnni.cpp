// AVX-512 with VNNI: the integer products add up in one instruction instead of two.
#define NANOCHAT_VNNI 1
#include "cpu_avx512.cpp"

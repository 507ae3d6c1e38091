#include "simd.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nanochat {
namespace {

struct Level {
  const char* name;
  bool runs;
};

#if defined(__x86_64__)
const Level* levels(int* count) {
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  static const Level all[] = {{"avx512vnni", avx512 && __builtin_cpu_supports("avx512vnni")},
                              {"avx512", avx512},
                              {"avx2", avx2},
                              {"portable", true}};
  *count = 4;
  return all;
}
#else
const Level* levels(int* count) {
#if defined(__aarch64__)
  static const Level all[] = {{"neon", true}, {"portable", true}};
#else
  static const Level all[] = {{"portable", true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof *all);
  return all;
}
#endif

void append(std::string& text, const char* word, bool wanted) {
  if (!wanted) return;
  if (!text.empty()) text += ' ';
  text += word;
}

}  // namespace

const char* simd_level() {
  int count;
  const Level* all = levels(&count);
  const char* asked = std::getenv("NANOCHAT_SIMD");
  for (int i = 0; i < count; ++i)
    if (all[i].runs && (!asked || !*asked || !std::strcmp(asked, all[i].name))) return all[i].name;
  std::string message = "NANOCHAT_SIMD=";
  message += asked;
  message += " cannot run here; use one of: ";
  message += simd_levels();
  throw std::runtime_error(message);
}

const char* simd_levels() {
  static const std::string names = [] {
    std::string text;
    int count;
    const Level* all = levels(&count);
    for (int i = 0; i < count; ++i) append(text, all[i].name, all[i].runs);
    return text;
  }();
  return names.c_str();
}

const char* cpu_features() {
  static const std::string names = [] {
    std::string text;
#if defined(__x86_64__)
    append(text, "avx2", __builtin_cpu_supports("avx2"));
    append(text, "fma", __builtin_cpu_supports("fma"));
    append(text, "f16c", __builtin_cpu_supports("f16c"));
    append(text, "avx512f", __builtin_cpu_supports("avx512f"));
    append(text, "avx512vnni", __builtin_cpu_supports("avx512vnni"));
    append(text, "avx512bf16", __builtin_cpu_supports("avx512bf16"));
#elif defined(__aarch64__)
    append(text, "neon", true);
#endif
    return text;
  }();
  return names.c_str();
}

}  // namespace nanochat

// Runs the numerics of csrc/fp8.cuh on the host, for tests/test_cuda_build.py.
//
//   fp8_host boundaries            the proof of ScaleDivider, exhaustive; prints how many cases it tried
//   fp8_host short BITS            the same of ShortDivider, for x of that many significant bits
//   fp8_host scale TYPE POW2 E5M2 MIN_AMAX MIN_SCALE RECIPROCAL_MAX  fp32 amaxes on stdin, stored scales on stdout (4 bytes each)
//   fp8_host cast E5M2 RECIPROCAL  fp32 pairs (x, scale) on stdin, codes on stdout (1 byte each)
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "fp8.cuh"

using namespace fp8_kernels;

// Rounding to FP8 compares a quotient with boundaries: midpoints of neighbouring codes, numbers of at most five
// significant bits. So two quotients get one code if and only if they compare alike with every boundary. Powers of
// two scale exactly, so one binade of scales and one of boundaries stand for all. The fast quotient is within
// two units in the last place of x / scale, so only the x next to boundary * scale can go wrong.
int boundaries() {
  int64_t tried = 0, failed = 0;
  for (uint32_t significand = 0; significand < 1u << 23; ++significand) {
    const float scale = float_of(0x3f800000 | significand);
    const ScaleDivider divide(scale);
    for (int t = 16; t < 32; ++t) {
      const float boundary = t / 16.0f;
      const uint32_t nearest = bits_of(boundary * scale);
      for (int away = -4; away <= 4; ++away) {
        const float x = float_of(nearest + away);
        const float fast = divide(x), exact = x / scale;
        failed += (fast < boundary) != (exact < boundary) || (fast > boundary) != (exact > boundary);
        ++tried;
      }
    }
  }
  std::printf("%lld tried, %lld failed\n", static_cast<long long>(tried), static_cast<long long>(failed));
  return failed != 0;
}

// As above. Only the x of few bits next to boundary * scale can go wrong: the two around it, and one more each way.
int short_boundaries(int bits) {
  const uint32_t step = 1u << (24 - bits);
  int64_t tried = 0, failed = 0;
  for (uint32_t significand = 0; significand < 1u << 23; ++significand) {
    const float scale = float_of(0x3f800000 | significand);
    const ShortDivider divide{ScaleDivider(scale)};
    for (int t = 16; t < 32; ++t) {
      const float boundary = t / 16.0f;
      const uint32_t below = bits_of(boundary * scale) & -step;
      for (int away = -1; away <= 2; ++away) {
        const float x = float_of(below + away * step);
        const float fast = divide(x), exact = x / scale;
        failed += (fast < boundary) != (exact < boundary) || (fast > boundary) != (exact > boundary);
        ++tried;
      }
    }
  }
  std::printf("%lld tried, %lld failed\n", static_cast<long long>(tried), static_cast<long long>(failed));
  return failed != 0;
}

template <typename T>
std::vector<T> read_all() {
  std::vector<T> values;
  T value;
  while (std::fread(&value, sizeof(T), 1, stdin) == 1) values.push_back(value);
  return values;
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const auto flag = [&](int i) { return std::atoi(argv[i]) != 0; };
  if (mode == "boundaries") return boundaries();
  if (mode == "short" && argc == 3) return short_boundaries(std::atoi(argv[2]));
  Rule rule;
  if (mode == "scale" && argc == 8) {
    rule.min_amax = std::atof(argv[5]);
    rule.min_scale = std::atof(argv[6]);
    rule.reciprocal_max = flag(7);
    const Fp8Type fp8 = flag(4) ? Fp8Type::kE5M2 : Fp8Type::kE4M3;
    for (const float amax : read_all<float>()) {
      const uint32_t stored = stored_scale(amax, fp8, flag(3), static_cast<ScaleType>(std::atoi(argv[2])), rule);
      std::fwrite(&stored, sizeof(stored), 1, stdout);
    }
    return 0;
  }
  if (mode == "cast" && argc == 4) {
    if (flag(3)) rule.reciprocal = true;
    const Fp8Type fp8 = flag(2) ? Fp8Type::kE5M2 : Fp8Type::kE4M3;
    for (const float2 pair : read_all<float2>()) {
      std::fputc(static_cast<int>(to_fp8x2(ScaleDivider(pair.y, rule)(pair.x), 0.0f, fp8) & 0xff), stdout);
    }
    return 0;
  }
  return 2;
}

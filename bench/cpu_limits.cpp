// What a CPU can do at most: bytes a second that all threads read, and multiplications a second that they make in registers.
//
// Nothing here is of use but to its clock. A rate is of one run of `seconds` or of one pass over the data; the caller
// repeats and takes the best. Kinds of multiplication that the CPU or the compiler lacks have the rate 0.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64), aligned(8), may_alias));

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs fn(thread) on all threads from one moment on; the seconds until the last one is done.
template <class F>
static double together(int num_threads, F fn) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; i++)
    threads.emplace_back([&, i] {
      ready++;
      while (!go) std::this_thread::yield();
      fn(i);
    });
  while (ready < num_threads) std::this_thread::yield();
  const double start = now();
  go = true;
  for (auto& thread : threads) thread.join();
  return now() - start;
}

static volatile int64_t sink;

extern "C" double read_rate(const void* data, size_t bytes, int num_threads) {
  const size_t lines = bytes / 64 / num_threads;
  const double seconds = together(num_threads, [&](int thread) {
    const i64x8* p = (const i64x8*)data + thread * lines;
    i64x8 all[8] = {};
    size_t i = 0;
    for (; i + 8 <= lines; i += 8)
      for (int c = 0; c < 8; c++) {
        __builtin_prefetch((const char*)(p + i + c) + 4096);
        all[c] |= p[i + c];
      }
    for (int c = 1; c < 8; c++) all[0] |= all[c];
    sink = all[0][0];
  });
  return num_threads * lines * 64 / seconds;
}

enum Kind { FMA, DPBF16, AMX_BF16, AMX_INT8, VNNI };
constexpr int ROUNDS = 1000, CHAINS = 12;  // chains that do not wait for each other: latency times units is at most 10

// Operations of one call: a multiplication and an addition are two.
static double fma_round() {
#if defined(__AVX512F__)
  __m512 acc[CHAINS] = {}, a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  for (int i = 0; i < ROUNDS; i++)
    for (int c = 0; c < CHAINS; c++) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(acc[c]) : "v"(a), "v"(b));
  return 2.0 * 16 * ROUNDS * CHAINS;
#elif defined(__FMA__)
  __m256 acc[CHAINS] = {}, a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
  for (int i = 0; i < ROUNDS; i++)
    for (int c = 0; c < CHAINS; c++) asm volatile("vfmadd231ps %1, %2, %0" : "+x"(acc[c]) : "x"(a), "x"(b));
  return 2.0 * 8 * ROUNDS * CHAINS;
#elif defined(__aarch64__)
  typedef float f32x4 __attribute__((vector_size(16)));
  f32x4 acc[CHAINS] = {}, a = {1, 1, 1, 1}, b = a;
  for (int i = 0; i < ROUNDS; i++)
    for (int c = 0; c < CHAINS; c++) asm volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(acc[c]) : "w"(a), "w"(b));
  return 2.0 * 4 * ROUNDS * CHAINS;
#else
  return 0;
#endif
}

static double dpbf16_round() {
#if defined(__AVX512BF16__)
  __m512 acc[CHAINS] = {}, a = _mm512_set1_ps(1.0f);
  for (int i = 0; i < ROUNDS; i++)
    for (int c = 0; c < CHAINS; c++) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(acc[c]) : "v"(a));
  return 2.0 * 32 * ROUNDS * CHAINS;
#else
  return 0;
#endif
}

static double vnni_round() {
#if defined(__AVX512VNNI__)
  __m512i acc[CHAINS] = {}, a = _mm512_set1_epi8(1);
  for (int i = 0; i < ROUNDS; i++)
    for (int c = 0; c < CHAINS; c++) asm volatile("vpdpbusd %1, %1, %0" : "+v"(acc[c]) : "v"(a));
  return 2.0 * 64 * ROUNDS * CHAINS;
#elif defined(__AVXVNNI__)
  __m256i acc[CHAINS] = {}, a = _mm256_set1_epi8(1);
  for (int i = 0; i < ROUNDS; i++)
    for (int c = 0; c < CHAINS; c++) asm volatile("{vex} vpdpbusd %1, %1, %0" : "+x"(acc[c]) : "x"(a));
  return 2.0 * 32 * ROUNDS * CHAINS;
#else
  return 0;
#endif
}

#if defined(__x86_64__)
// Products of 4 pairs of tiles, as a matrix product in registers has them: 2 tiles times 2.
template <bool IS_INT8>
__attribute__((target("amx-tile,amx-bf16,amx-int8"))) static double amx_round() {
  alignas(64) struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  asm volatile("ldtilecfg %0" ::"m"(shape));
  asm volatile("tilezero %tmm0; tilezero %tmm1; tilezero %tmm2; tilezero %tmm3");
  asm volatile("tilezero %tmm4; tilezero %tmm5; tilezero %tmm6; tilezero %tmm7");
  for (int i = 0; i < ROUNDS; i++) {
    if (IS_INT8)
      asm volatile(
          "tdpbssd %tmm6, %tmm4, %tmm0; tdpbssd %tmm7, %tmm4, %tmm1; tdpbssd %tmm6, %tmm5, %tmm2; "
          "tdpbssd %tmm7, %tmm5, %tmm3");
    else
      asm volatile(
          "tdpbf16ps %tmm6, %tmm4, %tmm0; tdpbf16ps %tmm7, %tmm4, %tmm1; tdpbf16ps %tmm6, %tmm5, %tmm2; "
          "tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
  return 2.0 * 16 * 16 * (IS_INT8 ? 64 : 32) * 4 * ROUNDS;
}
#else
template <bool IS_INT8>
static double amx_round() {
  return 0;
}
#endif

// The caller has asked the operating system for tiles before it asks for AMX.
extern "C" double multiply_rate(int kind, int num_threads, double seconds) {
  std::vector<double> rates(num_threads);
  together(num_threads, [&](int thread) {
    double operations = 0, start = now(), end = start;
    while (end - start < seconds) {
      const double done = kind == FMA        ? fma_round()
                          : kind == DPBF16   ? dpbf16_round()
                          : kind == VNNI     ? vnni_round()
                          : kind == AMX_BF16 ? amx_round<false>()
                                             : amx_round<true>();
      operations += done;
      end = now();
      if (!done) break;
    }
    rates[thread] = operations / (end - start);
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

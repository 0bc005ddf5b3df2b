// What `instructions.cuh` and CUDA provide, on a CPU: blocks run one after the other, a block's threads in turns, each
// until it waits for others, and warps for turns of random lengths. Shared memory begins at address 0 and is full of NaN.
//
// Copies are done at once, so that one which overwrites what others still read is seen, or late, when somebody waits for
// them, so that what is read without waiting is seen. Then blocks run from the last to the first, so that what they write
// into each other's results is seen. Operands of TF32 are cut off as on a GPU, but sums are rounded.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE inline
#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __trap() std::abort()

using std::max, std::min;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  int x = 0, y = 0, z = 0;
};

inline float __uint_as_float(u32 x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline u32 __float_as_uint(float x) {
  u32 y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fsub_rn(float x, float y) { return x - y; }

alignas(1024) unsigned char raw[232448];

namespace emulator {
constexpr u32 START = 1024;  // of a kernel's shared memory, whose first bytes are not its own

inline unsigned char* memory_at(u32 address) { return raw + (address - START); }
}  // namespace emulator

inline Index threadIdx, blockIdx, gridDim;

// As the tests pack it: sizes and steps of the axes, the innermost first, of a map of 2 or 4 bytes a number.
struct alignas(64) TensorMap {
  u64 data, element, pattern;
  u64 sizes[5], steps[4], box[3];  // steps in bytes, of all but the first axis; boxes have one of the others
  u64 unused[1];
};
static_assert(sizeof(TensorMap) == 128, "");

namespace emulator {

constexpr int LANES = 32, STACK = 64 * 1024;
constexpr int LONGEST = 400;  // turn of a warp, in steps between what its lanes do together

struct Thread {
  ucontext_t beginning;
  jmp_buf place;
  std::vector<char> stack;
  bool begun = false, done = false, waited = false;
};

struct Barrier {  // in shared memory
  int arrivals : 10, pending : 10, phase : 12;  // phase: how many are over
  int bytes;                                    // that are still to come
};
static_assert(sizeof(Barrier) == 8, "");

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline int current = 0, alive = 0;
inline u64 turns = 0;  // in which nobody got any further
inline bool late = false;
inline std::function<void()> before;  // what was launched before and has not ended

inline void yield() {
  if (++turns > 10'000'000ull) fprintf(stderr, "threads wait for each other\n"), std::abort();
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

// Runs a thread until it waits. Contexts begin threads and no more, as to swap them asks the system every time.
inline void resume(Thread& thread) {
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.beginning);
}

// Every thread of a group brings a value; the last to come works on all of them; then all go on, each with its own.
template <typename T>
struct Meeting {
  std::vector<T> brought[2];  // in turns: nobody comes to the next but one before all have left this
  int came = 0;
  u64 number = 0;

  template <typename F>
  T meet(int index, int size, const T& value, F work) {
    const u64 mine = number;
    std::vector<T>& all = brought[mine % 2];
    all.resize(size);
    all[index] = value;
    if (++came == size) {
      work(all.data());
      came = 0, number++, turns = 0;
    }
    while (number == mine) yield();
    return all[index];
  }
};

template <typename T, typename F>
T in_warp(const T& value, F work) {
  static Meeting<T> meetings[64];
  return meetings[current / LANES].meet(current % LANES, LANES, value, work);
}

struct Copy {
  std::function<void()> run;
  u32 barrier;
};
inline std::vector<Copy> under_way;

inline Barrier& barrier_at(u32 address) { return *reinterpret_cast<Barrier*>(memory_at(address)); }

inline void advance(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase++, barrier.pending = barrier.arrivals, turns = 0;
}

// Those that a barrier waits for.
inline void run_copies(u32 address) {
  std::vector<Copy> others, now;
  for (Copy& copy : under_way) (copy.barrier == address ? now : others).push_back(copy);
  under_way = others;
  for (Copy& copy : now) copy.run();
}

// Now or when the barrier is waited for: `copy` copies and gives the number of bytes.
template <typename F>
void copy_in(u32 barrier, F copy) {
  const auto run = [=] {
    Barrier& at = barrier_at(barrier);
    at.bytes -= copy();
    advance(at);
  };
  turns = 0;
  if (late)
    under_way.push_back({run, barrier});
  else
    run();
}

template <typename F>
void each_of_box(const TensorMap& map, u32 shared, const int (&at)[5], F f) {
  u32 offset = 0;
  const u32 mask = map.pattern / 16 - 1;
  for (int c = 0; c < (int)map.box[2]; c++)
    for (int b = 0; b < (int)map.box[1]; b++)
      for (int a = 0; a < (int)map.box[0]; a++, offset += map.element) {
        const long long place[5] = {at[0] + a, at[1] + b, at[2] + c, at[3], at[4]};
        bool inside = true;
        long long from = place[0] * (long long)map.element;
        for (int i = 0; i < 5; i++) inside &= place[i] >= 0 && place[i] < (long long)map.sizes[i];
        for (int i = 1; i < 5; i++) from += place[i] * (long long)map.steps[i - 1];
        const u32 place_in_shared = shared + (offset ^ (offset >> 7 & mask) << 4);
        f(memory_at(place_in_shared), reinterpret_cast<unsigned char*>(map.data) + from, inside);
      }
}

inline float half_to_float(uint16_t x, bool bfloat) {
  if (bfloat) return __uint_as_float(u32(x) << 16);
  const int sign = x >> 15, exponent = x >> 10 & 31, mantissa = x & 1023;
  const float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                      : std::ldexp(float(1024 + mantissa), exponent - 25);
  return sign ? -value : value;
}

inline uint16_t float_to_half(float x, bool bfloat) {
  const u32 bits = __float_as_uint(x);
  if (bfloat) return std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const uint16_t sign = bits >> 31 << 15;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < std::ldexp(1.0f, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float mantissa = std::frexp(size, &exponent);  // in [0.5, 1)
  const int scaled = int(std::nearbyint(std::ldexp(mantissa, 11)));
  return sign | uint16_t(((exponent + 14) << 10) + scaled - 1024);
}

inline float upper_bits(u32 x) { return __uint_as_float(x & 0xFFFFE000); }

struct Product {  // a lane's operands and results
  float c[4];
  u32 a[4], b[2];
};

// inner: of the product; `a` and `b` give numbers of a lane's registers as matrices are laid out over lanes
template <typename A, typename B>
void multiply(Product* lanes, int inner, A a, B b) {
  static float left[16][16], right[16][8];
  for (int lane = 0; lane < LANES; lane++) a(lanes[lane], lane, left), b(lanes[lane], lane, right);
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = lanes[lane].c[i];
      for (int k = 0; k < inner; k++) sum += double(left[row][k]) * double(right[k][column]);
      lanes[lane].c[i] = float(sum);
    }
}

template <bool BFLOAT>
void multiply_halves(Product* lanes, int inner) {
  multiply(
      lanes, inner,
      [inner](const Product& p, int lane, float (&left)[16][16]) {
        for (int i = 0; i < inner / 4; i++)
          for (int j = 0; j < 2; j++)
            left[lane / 4 + i % 2 * 8][lane % 4 * 2 + j + i / 2 * 8] = half_to_float(p.a[i] >> 16 * j, BFLOAT);
      },
      [inner](const Product& p, int lane, float (&right)[16][8]) {
        for (int i = 0; i < inner / 8; i++)
          for (int j = 0; j < 2; j++)
            right[lane % 4 * 2 + j + i * 8][lane / 4] = half_to_float(p.b[i] >> 16 * j, BFLOAT);
      });
}

}  // namespace emulator

inline void __syncwarp() {
  emulator::in_warp(0, [](int*) {});
}

inline void __syncthreads() {
  static emulator::Meeting<int> meeting;
  meeting.meet(emulator::current, emulator::threads.size(), 0, [](int*) {});
}

template <typename T>
T __shfl_xor_sync(u32, T x, int mask) {
  return emulator::in_warp(x, [mask](T* lanes) {
    T others[emulator::LANES];
    for (int i = 0; i < emulator::LANES; i++) others[i] = lanes[i ^ mask];
    memcpy(lanes, others, sizeof(others));
  });
}

template <typename T>
T __shfl_sync(u32, T x, int from) {
  return emulator::in_warp(x, [from](T* lanes) {
    const T one = lanes[from];
    for (int i = 0; i < emulator::LANES; i++) lanes[i] = one;
  });
}

inline bool __any_sync(u32, bool x) {
  return emulator::in_warp(int(x), [](int* lanes) {
    int any = 0;
    for (int i = 0; i < emulator::LANES; i++) any |= lanes[i];
    for (int i = 0; i < emulator::LANES; i++) lanes[i] = any;
  });
}

inline u32 shared_address(const void* p) { return static_cast<const unsigned char*>(p) - raw + emulator::START; }

inline void barrier_init(u32 barrier, int arrivals) {
  emulator::barrier_at(barrier) = {arrivals, arrivals, 0, 0};
}

inline void barriers_ready() {}

inline void barrier_arrive(u32 barrier) {
  emulator::Barrier& at = emulator::barrier_at(barrier);
  if (at.pending-- == 0) fprintf(stderr, "more arrive than a barrier waits for\n"), std::abort();
  emulator::advance(at);
}

inline void barrier_expect_more(u32 barrier, u32 bytes) { emulator::barrier_at(barrier).bytes += bytes; }

inline void barrier_expect(u32 barrier, u32 bytes) {
  barrier_expect_more(barrier, bytes);
  barrier_arrive(barrier);
}

inline void barrier_wait(u32 barrier, int use) {
  emulator::run_copies(barrier);
  // as the GPU has it: the phase before the present one is over, whichever it was
  while ((emulator::barrier_at(barrier).phase - 1 & 1) != (use & 1)) {
    emulator::yield();
    emulator::run_copies(barrier);
  }
}

inline void copy_box_in(u32 to, const TensorMap& map, u32 barrier, int a, int b, int c, int d, int e = 0) {
  emulator::copy_in(barrier, [=] {
    u32 bytes = 0;
    emulator::each_of_box(map, to, {a, b, c, d, e}, [&](unsigned char* shared, unsigned char* global, bool inside) {
      inside ? (void)memcpy(shared, global, map.element) : (void)memset(shared, 0, map.element);
      bytes += map.element;
    });
    return bytes;
  });
}

inline void copy_box_out(u32 from, const TensorMap& map, int a, int b, int c, int d) {
  emulator::each_of_box(map, from, {a, b, c, d, 0}, [&](unsigned char* shared, unsigned char* global, bool inside) {
    if (inside) memcpy(global, shared, map.element);
  });
}

inline void check_row(u64 from, u64 to, u32 bytes) {
  if ((from | to | bytes) % 16) fprintf(stderr, "a copy of %u bytes that are no whole vectors\n", bytes), std::abort();
}

inline void copy_row_in(u32 to, const void* from, u32 bytes, u32 barrier) {
  check_row((u64)from, to, bytes);
  emulator::copy_in(barrier, [=] {
    memcpy(emulator::memory_at(to), from, bytes);
    return bytes;
  });
}

inline void copy_row_out(void* to, u32 from, u32 bytes) {
  check_row(from, (u64)to, bytes);
  memcpy(to, emulator::memory_at(from), bytes);
}

// What begins then may skip what this waits for: the next launch may be one that waits for this one's results alone.
inline void next_may_begin() {
  if (!emulator::threads[emulator::current].waited) fprintf(stderr, "the next begins before the last has ended\n"), std::abort();
}

// The first to wait ends what was launched before.
inline void wait_for_launches() {
  emulator::threads[emulator::current].waited = true;
  if (emulator::before) std::exchange(emulator::before, nullptr)();
}

inline void before_copies() {}
inline void copies_have_read() {}

inline u32 load_half(u32 address) {
  uint16_t half;
  memcpy(&half, emulator::memory_at(address), 2);
  return half;
}

template <int N>
void load(u32 (&x)[N], u32 address) {
  if (address % (4 * N)) fprintf(stderr, "a load of %d words at %u\n", N, address), std::abort();
  memcpy(x, emulator::memory_at(address), 4 * N);
}

struct Matrices {
  u32 r[4], address;
};

template <bool ACROSS>
void load_matrices(u32 (&r)[4], u32 address) {
  Matrices mine = {{}, address};
  mine = emulator::in_warp(mine, [](Matrices* lanes) {
    for (int lane = 0; lane < emulator::LANES; lane++)
      for (int i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (int j = 0; j < 2; j++) {
          const int row = ACROSS ? lane % 4 * 2 + j : lane / 4, column = ACROSS ? lane / 4 : lane % 4 * 2 + j;
          memcpy(&pair[j], emulator::memory_at(lanes[8 * i + row].address) + 2 * column, 2);
        }
        lanes[lane].r[i] = pair[0] | u32(pair[1]) << 16;
      }
  });
  memcpy(r, mine.r, sizeof(r));
}

template <bool ACROSS>
void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  emulator::in_warp(Matrices{{a, b, c, d}, address}, [](Matrices* lanes) {
    for (int lane = 0; lane < emulator::LANES; lane++)
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
          const int row = ACROSS ? lane % 4 * 2 + j : lane / 4, column = ACROSS ? lane / 4 : lane % 4 * 2 + j;
          const uint16_t half = lanes[lane].r[i] >> 16 * j;
          memcpy(emulator::memory_at(lanes[8 * i + row].address) + 2 * column, &half, 2);
        }
  });
}

template <bool BFLOAT>
void multiply_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::Product mine = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  mine = emulator::in_warp(mine, [](emulator::Product* p) { emulator::multiply_halves<BFLOAT>(p, 16); });
  memcpy(c, mine.c, sizeof(c));
}

inline void multiply_8_halves(float (&c)[4], u32 a0, u32 a1, u32 b) {
  emulator::Product mine = {{c[0], c[1], c[2], c[3]}, {a0, a1}, {b}};
  mine = emulator::in_warp(mine, [](emulator::Product* p) { emulator::multiply_halves<true>(p, 8); });
  memcpy(c, mine.c, sizeof(c));
}

inline void multiply_floats(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::Product mine = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  mine = emulator::in_warp(mine, [](emulator::Product* lanes) {
    emulator::multiply(
        lanes, 8,
        [](const emulator::Product& p, int lane, float (&left)[16][16]) {
          for (int i = 0; i < 4; i++) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = emulator::upper_bits(p.a[i]);
        },
        [](const emulator::Product& p, int lane, float (&right)[16][8]) {
          for (int i = 0; i < 2; i++) right[lane % 4 + i * 4][lane / 4] = emulator::upper_bits(p.b[i]);
        });
  });
  memcpy(c, mine.c, sizeof(c));
}

template <bool BFLOAT>
u32 pack_halves(float low, float high) {
  return emulator::float_to_half(low, BFLOAT) | u32(emulator::float_to_half(high, BFLOAT)) << 16;
}

template <bool BFLOAT>
void unpack_halves(float& low, float& high, u32 x) {
  low = emulator::half_to_float(x, BFLOAT), high = emulator::half_to_float(x >> 16, BFLOAT);
}

inline float exp2_of(float x) { return exp2f(x); }

inline u32 anew(u32 x) { return x; }

namespace emulator {

inline std::function<void()> body;

inline void enter() {
  body();
  threads[current].done = true;
  alive--, turns = 0;
  _longjmp(scheduler, 1);
}

// The same numbers every time, below `end`.
inline int random(int end) {
  static u64 state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return int((state >> 33) % end);
}

// Runs a kernel: `run` is what every thread does.
inline void launch(const int* grid, int count, bool copies_late, std::function<void()> run) {
  body = run, late = copies_late;
  threads.clear();
  threads.resize(count);
  for (Thread& thread : threads) thread.stack.resize(STACK);
  gridDim.x = grid[0], gridDim.y = grid[1], gridDim.z = grid[2];
  const auto turned = [&](int i, int axis) { return late ? grid[axis] - 1 - i : i; };
  for (int z = 0; z < grid[2]; z++)
    for (int y = 0; y < grid[1]; y++)
      for (int x = 0; x < grid[0]; x++) {
        memset(raw, 0xFF, sizeof(raw));
        blockIdx.x = turned(x, 0), blockIdx.y = turned(y, 1), blockIdx.z = turned(z, 2);
        alive = count, turns = 0;
        for (Thread& thread : threads) {
          getcontext(&thread.beginning);
          thread.beginning.uc_stack.ss_sp = thread.stack.data();
          thread.beginning.uc_stack.ss_size = STACK;
          makecontext(&thread.beginning, enter, 0);
          thread.begun = thread.done = thread.waited = false;
        }
        while (alive) {
          const int warp = random(count / LANES);
          int rounds = random(LONGEST);
          u64 before;
          do {
            before = turns;
            for (current = warp * LANES; current < (warp + 1) * LANES; current++)
              if (!threads[current].done) {
                threadIdx.x = current;
                resume(threads[current]);
              }
          } while (rounds-- > 0 && turns < before + LANES);  // until it waits for others
        }
        if (!under_way.empty()) fprintf(stderr, "a block ends before its copies\n"), std::abort();
      }
}

}  // namespace emulator

// What all kernels share.

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// A value that compilers hold in a register where they would work it out anew, time and again.
INLINE u32 held(u32 x) { return __shfl_xor_sync(~0u, x, 0); }

// Where shared memory begins; a swizzle's pattern begins there too.
INLINE u32 shared_start(const void* raw) {
  const u32 start = shared_address(raw);
  if (start % 1024) __trap();
  return start;
}

// A map as its numbers lie in memory.
template <typename Number>
struct alignas(64) StridedMap {
  Number* data;
  long long image, channel, row, column;  // steps
};

// The product of two pairs of halves: of the first ones plus of the second ones.
INLINE float product_of_two(u32 a, u32 b) {
  float a0, a1, b0, b1;
  unpack_halves<BF16>(a0, a1, a);
  unpack_halves<BF16>(b0, b1, b);
  return fmaf(a0, b0, a1 * b1);
}

// The sum, and the maximum, over the four lanes that share a row.
INLINE float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

INLINE float most_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

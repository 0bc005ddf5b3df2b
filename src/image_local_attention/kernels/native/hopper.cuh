// Instructions of sm_90 alone: products that four warps, a group, take together and that run beside what follows them.
// The products themselves, whose operands are as many as they are wide, are written by `products.py`.

// Where rows of PATTERN bytes begin that a copy swizzled, as products take them: 8 rows are a pattern, and patterns follow
// each other. What is wider than a row goes on NEXT bytes later.
template <int PATTERN, int NEXT = 16>
struct SharedRows {
  static_assert(PATTERN == 128 || PATTERN == 64, "patterns of bands");
  static constexpr u32 HIGH = (PATTERN == 128 ? 1u : 2u) << 30 | 8 * PATTERN / 16;

  u32 low;  // of a descriptor: address / 16, and above it NEXT / 16

  INLINE explicit SharedRows(u32 address) : low(u32(NEXT / 16) << 16 | address >> 4) {}
  INLINE SharedRows later(int bytes) const {
    SharedRows other = *this;
    other.low += bytes / 16;
    return other;
  }
  INLINE u64 descriptor() const { return u64(HIGH) << 32 | low; }
};

// The same of numbers that no copy swizzled, whose rows are of the inner axis: blocks of 8 rows of 16 bytes. The next 8
// rows follow, the next 8 columns come NEXT bytes later.
template <int NEXT>
struct SharedBlocks {
  u32 low;

  INLINE explicit SharedBlocks(u32 address) : low(128u / 16 << 16 | address >> 4) {}
  INLINE SharedBlocks later(int bytes) const {
    SharedBlocks other = *this;
    other.low += bytes / 16;
    return other;
  }
  INLINE u64 descriptor() const { return u64(NEXT / 16) << 32 | low; }
};

// Waits for the other threads of a group of four warps.
INLINE void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Before products whose registers were written.
INLINE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

INLINE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Of all but the last few groups of products, each of which was ended.
template <int PENDING>
INLINE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Sums that products have written, for compilers to read them after the wait.
template <int N>
INLINE void written(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// Registers of a thread, of all that the group's threads do from here on.
template <int COUNT>
INLINE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
INLINE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Instructions of sm_90 alone: products that four warps, a group, take together and that run beside what follows them.
// The products themselves, whose operands are as many as they are wide, are written by `walk.py`.

// Where rows of 128 bytes begin that a copy swizzled, as products take it: 8 rows are a pattern, and patterns follow each
// other.
struct SharedRows {
  u32 low;  // of a descriptor: address / 16, and above it what is 1 for swizzled rows

  INLINE explicit SharedRows(u32 address) : low(1u << 16 | address >> 4) {}
  INLINE SharedRows later(int bytes) const {
    SharedRows other = *this;
    other.low += bytes / 16;
    return other;
  }
  INLINE u64 descriptor() const { return u64(0x40000040) << 32 | low; }
};

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

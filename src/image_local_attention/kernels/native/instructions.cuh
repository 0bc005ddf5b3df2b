// Instructions of the GPU that CUDA C++ has no names for. Those of sm_90 alone are in `hopper.cuh`, and their products in
// what `products.py` writes; nothing else here is assembly. Addresses are those of shared memory.

typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

struct alignas(64) TensorMap {
  u64 opaque[16];
};

INLINE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

INLINE void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

INLINE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, for so many bytes to follow.
INLINE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

INLINE void barrier_expect_more(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for all that the barrier expects of its use number `use`.
INLINE void barrier_wait(u32 barrier, int use) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(use & 1)
      : "memory");
}

// Copies the box that begins at (a, b, c, d), or (a, b, c, d, e), the innermost axis first; what lies outside of the
// map is zero.
INLINE void copy_box_in(u32 to, const TensorMap& map, u32 barrier, int a, int b, int c, int d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

INLINE void copy_box_in(u32 to, const TensorMap& map, u32 barrier, int a, int b, int c, int d, int e) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(to), "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e)
      : "memory");
}

// Writes a box; what lies outside of the map is left out.
INLINE void copy_box_out(u32 from, const TensorMap& map, int a, int b, int c, int d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;"
      ::"l"(&map), "r"(from), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// Copies numbers in a row; addresses and `bytes` are multiples of 16.
INLINE void copy_row_in(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

INLINE void copy_row_out(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
}

// Of ordinary reads and writes of shared memory, before a copy overwrites what was read or reads what was written. A
// barrier alone does not keep a copy from overtaking loads that are still under way.
INLINE void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

INLINE void copies_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Lets the stream's next launch begin, once all blocks of this have come here: after they have waited themselves, for that
// may count on what was launched before this.
INLINE void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until all that was launched before has ended: a launch may begin earlier.
INLINE void wait_for_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

INLINE u32 load_half(u32 address) {
  unsigned short x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
  return x;
}

INLINE void load(u32 (&x)[1], u32 address) { asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x[0]) : "r"(address)); }

INLINE void load(u32 (&x)[2], u32 address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address));
}

INLINE void load(u32 (&x)[4], u32 address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

INLINE void store(u32 address, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// To the GPU's memory.
INLINE void store_vector(void* to, const u32 (&x)[4]) { *reinterpret_cast<uint4*>(to) = {x[0], x[1], x[2], x[3]}; }

// Four 8x8 matrices of 16 bits whose rows lie at the lanes' addresses; `ACROSS` are transposed.
template <bool ACROSS>
INLINE void load_matrices(u32 (&r)[4], u32 address) {
  if (ACROSS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

template <bool ACROSS>
INLINE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  if (ACROSS)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// c += a b of bf16 (or fp16), of 16 rows, 16 of the inner axis and 8 columns
template <bool BFLOAT>
INLINE void multiply_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (BFLOAT)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b of bf16, of 16 rows, 8 of the inner axis and 8 columns
INLINE void multiply_8_halves(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// c += a b of the upper 19 bits of floats, of 16 rows, 8 of the inner axis and 8 columns
INLINE void multiply_floats(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to halves, the first in the lower bits.
template <bool BFLOAT>
INLINE u32 pack_halves(float low, float high) {
  u32 packed;
  if (BFLOAT)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <bool BFLOAT>
INLINE void unpack_halves(float& low, float& high, u32 x) {
  if (BFLOAT)
    low = __uint_as_float(x << 16), high = __uint_as_float(x & 0xFFFF0000);
  else
    asm("{.reg .f16 x, y;\nmov.b32 {x, y}, %2;\ncvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;}" : "=f"(low), "=f"(high) : "r"(x));
}

INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A value that compilers work out where it stands, for it not to be held in registers instead.
INLINE u32 anew(u32 x) {
  u32 y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Primitives: copies of tiles and halos into shared memory, fragments of the matrix units, visibility.
//
// A program keeps a tile of TILE_H x TILE_W pixels of GROUP heads and holds its whole halo in shared memory. A warp
// takes a subtile of 4x4 pixels, the 16 rows of a matrix instruction, against only the SEEN pixels of the halo that
// this subtile's windows see: flattened, 16 a step, each row of a fragment has the address of its own pixel. Subtiles
// keep queries and see keys, or keep keys and see queries: pixel t of a subtile meets pixel h of its halo if
// 0 <= h - t < KERNEL, on each axis.
//
// Names in capitals that are not defined here are given when this is compiled.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

#define INLINE __device__ __forceinline__

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int SIDE = 4;  // pixels of a subtile on each axis
constexpr int SUBTILES_X = TILE_W / SIDE, SUBTILES = TILE_H / SIDE * SUBTILES_X;
constexpr int WARP_HEADS = SUBTILES * GROUP / WARPS;  // heads that a warp takes, one after the other
constexpr int SEEN_H = KERNEL_H + SIDE - 1, SEEN_W = KERNEL_W + SIDE - 1, SEEN = SEEN_H * SEEN_W;
constexpr int BLOCKS = ceil_div(SEEN, 8), PAIRS = ceil_div(BLOCKS, 2);
constexpr int HALO_H = TILE_H + KERNEL_H - 1, HALO_W = TILE_W + KERNEL_W - 1;

constexpr int ROW = GROUP * DEPTH * 2;                        // bytes of a pixel, which copies swizzle
constexpr int STEPS = DEPTH / 16;                             // of the matrix units along channels
constexpr int TILE_BYTES = TILE_H * TILE_W * ROW;
constexpr int HALO_BYTES = HALO_H * HALO_W * ROW;
constexpr int HALO_ROOM = ceil_div(HALO_BYTES, 1024) * 1024;  // swizzled copies begin on whole patterns
constexpr int TILE_ROOM = ceil_div(TILE_BYTES, 1024) * 1024;
static_assert(ROW == 32 || ROW == 64 || ROW == 128, "a pixel is a swizzle's span");
static_assert(SUBTILES * GROUP % WARPS == 0 && WARPS % SUBTILES == 0, "a warp keeps to one subtile");

[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

INLINE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- barriers and copies -------------------------------------------------------------------------------------------

INLINE void barrier_init(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

INLINE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for all that the barrier expects; each barrier is used once.
INLINE void barrier_wait(u32 barrier) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n}" ::"r"(barrier)
      : "memory");
}

// Copies the box that begins at (channel, x, y, image); what lies outside of the map is zero.
INLINE void copy_in(u32 to, const TensorMap& map, u32 barrier, int channel, int x, int y, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image)
      : "memory");
}

// Writes a tile that all threads have written to shared memory; what lies outside of the map is left out.
INLINE void copy_out(u32 from, const TensorMap& map, int channel, int x, int y, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;"
      ::"l"(&map), "r"(from), "r"(channel), "r"(x), "r"(y), "r"(image)
      : "memory");
}

// Of ordinary writes to shared memory, before a copy reads them.
INLINE void writes_visible_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

INLINE void copies_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ---- fragments -----------------------------------------------------------------------------------------------------

// Address of this lane's row of a fragment: `half` of the first 16 channels of a pixel, as the copy swizzled it.
INLINE u32 pixel_address(u32 base, int pixel, int half) {
  return base + pixel * ROW + (((pixel * ROW >> 7 & (ROW / 16 - 1)) ^ half) << 4);
}

// The same of the 16 channels that are `step` times 16 later.
INLINE u32 at_step(u32 address, int step) { return address ^ (step * 32); }

INLINE void load_fragments(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

INLINE void load_fragments_across(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

INLINE void store_fragments(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// c += a b, of 16 rows, 16 channels or keys and 8 columns
INLINE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to halves, the first in the lower bits.
INLINE u32 pack(float low, float high) {
  u32 packed;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}

// The product of two pairs of halves: of the first ones plus of the second ones.
INLINE float product_of_two(u32 a, u32 b) {
  float a0, a1, b0, b1;
#if BF16
  a0 = __uint_as_float(a << 16), a1 = __uint_as_float(a & 0xFFFF0000);
  b0 = __uint_as_float(b << 16), b1 = __uint_as_float(b & 0xFFFF0000);
#else
  asm("{.reg .f16 x, y;\nmov.b32 {x, y}, %2;\ncvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;}" : "=f"(a0), "=f"(a1) : "r"(a));
  asm("{.reg .f16 x, y;\nmov.b32 {x, y}, %2;\ncvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;}" : "=f"(b0), "=f"(b1) : "r"(b));
#endif
  return fmaf(a0, b0, a1 * b1);
}

INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

// ---- subtiles and what they see ------------------------------------------------------------------------------------

struct Lane {
  int thread, lane, warp, group, member;  // fragments: rows `group` and `group + 8`, columns 2 * `member` and the next
  int sub_y, sub_x, first_head;           // the subtile's first pixel in the tile, and the warp's first head

  INLINE Lane() {
    thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, group = lane >> 2, member = lane & 3;
    const int subtile = warp % SUBTILES;
    sub_y = subtile / SUBTILES_X * SIDE, sub_x = subtile % SUBTILES_X * SIDE;
    first_head = warp / SUBTILES * WARP_HEADS;
  }

  // This lane's row of the fragments of a kept tile.
  INLINE u32 kept(u32 tile) const {
    const int row = lane & 15;
    return pixel_address(tile, (sub_y + row / SIDE) * TILE_W + sub_x + row % SIDE, lane >> 4);
  }

  // The pixel of the halo that this subtile sees as number `seen`; numbers past the last are of that.
  INLINE int halo_pixel(int seen) const {
    const int number = min(seen, SEEN - 1), y = number / SEEN_W;
    return (sub_y + y) * HALO_W + sub_x + number - y * SEEN_W;
  }

  // The same of an even number, whose successor lies beside it where there is one, in rows of even width.
  INLINE int halo_pixel_of_two(int seen) const {
    const int number = min(seen, SEEN - 2), y = number / SEEN_W;
    return (sub_y + y) * HALO_W + sub_x + number - y * SEEN_W;
  }

  // This lane's row of the fragments of 16 pixels of a halo.
  INLINE u32 streamed(u32 halo, int pair) const {
    return pixel_address(halo, halo_pixel(16 * pair + (lane & 15)), lane >> 4);
  }
};

// Visibility is a product of two small matrices, which starts the sum of a score instead of zero: a row of the first
// tells in which row and in which column of the subtile a pixel lies, a column of the second has, for each of these,
// zero or HIDDEN. Its operands are bfloat16, whatever maps are.
constexpr u32 HIDDEN = 0xFE80;  // -2^126: what it is added to vanishes beside it, and two of them are finite
constexpr u32 ONE = 0x3F80;

struct alignas(8) Hidden {
  u32 block[2];
};

struct HiddenTable {
  Hidden of[PAIRS + 1][32];  // the last tells of pixels past all that are seen

  constexpr HiddenTable() : of() {
    for (int pair = 0; pair <= PAIRS; pair++)
      for (int lane = 0; lane < 32; lane++)
        for (int block = 0; block < 2; block++) {
          const int seen = 16 * pair + 8 * block + lane / 4, member = lane % 4;
          const int at = member < 2 ? seen / SEEN_W : seen % SEEN_W, kernel = member < 2 ? KERNEL_H : KERNEL_W;
          u32 word = 0;
          for (int i = 0; i < 2; i++) {
            const int kept = member % 2 * 2 + i;
            const bool met = seen < SEEN && at >= kept && at - kept < kernel;
            word |= (met ? 0u : HIDDEN) << 16 * i;
          }
          of[pair][lane].block[block] = word;
        }
  }
};

__device__ constexpr HiddenTable hidden_table;

struct Visibility {
  u32 low, high;  // the first matrix's rows `group` and `group + 8`

  INLINE Visibility(const Lane& l) {
    low = place(l.group, l.member), high = place(l.group + 8, l.member);
  }

  static INLINE u32 place(int row, int member) {
    const int at = member < 2 ? row / SIDE : row % SIDE, kept = member % 2 * 2;
    return (at == kept ? ONE : 0) | (at == kept + 1 ? ONE << 16 : 0);
  }

  // c = 0 where the pair of pixels meet, else HIDDEN or twice that
  INLINE void start(float (&c)[4], u32 hidden) const {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(low), "r"(high), "r"(hidden), "f"(0.0f));
  }
};

// Scores of a subtile with 16 pixels of a halo: two blocks of 8 columns.
INLINE void scores(float (&s)[2][4], const u32 (&kept)[STEPS][4], u32 streamed, int first_step) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_fragments(r, at_step(streamed, first_step + step));
    multiply(s[0], kept[step], r[0], r[2]);
    multiply(s[1], kept[step], r[1], r[3]);
  }
}

// sum += weights @ the same 16 pixels
INLINE void add_weighted(float (&sum)[2 * STEPS][4], const u32 (&weights)[4], u32 streamed, int first_step) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_fragments_across(r, at_step(streamed, first_step + step));
    multiply(sum[2 * step], weights, r[0], r[1]);
    multiply(sum[2 * step + 1], weights, r[2], r[3]);
  }
}

template <int N>
INLINE void zero(float (&sum)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
}

INLINE void pack_weights(u32 (&packed)[4], const float (&p)[2][4]) {
  packed[0] = pack(p[0][0], p[0][1]), packed[1] = pack(p[0][2], p[0][3]);
  packed[2] = pack(p[1][0], p[1][1]), packed[3] = pack(p[1][2], p[1][3]);
}

INLINE void load_kept(u32 (&r)[STEPS][4], u32 kept, int first_step) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) load_fragments(r[step], at_step(kept, first_step + step));
}

// Rows `group` times `low`, the others times `high`, to where this warp's subtile lies in a tile.
INLINE void store_kept(u32 kept, int first_step, const float (&sum)[2 * STEPS][4], float low, float high) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const float(&a)[4] = sum[2 * step], (&b)[4] = sum[2 * step + 1];
    store_fragments(at_step(kept, first_step + step), pack(a[0] * low, a[1] * low), pack(a[2] * high, a[3] * high),
                    pack(b[0] * low, b[1] * low), pack(b[2] * high, b[3] * high));
  }
}

// ---- programs ------------------------------------------------------------------------------------------------------

struct Place {
  int channel, first_head, x, y, image;

  // groups of heads lie side by side along the grid's first axis
  INLINE Place(int heads) {
    const int groups = heads / GROUP, tile_x = blockIdx.x / groups;
    first_head = (blockIdx.x - tile_x * groups) * GROUP;
    channel = first_head * DEPTH, x = tile_x * TILE_W, y = blockIdx.y * TILE_H, image = blockIdx.z;
  }
};

// Where shared memory begins; a swizzle's pattern begins there too.
INLINE u32 shared_start(const void* raw) {
  const u32 start = shared_address(raw);
  if (start % 1024) __trap();
  return start;
}

// Primitives: copies of tiles and halos into shared memory, fragments of the matrix units, visibility.
//
// A program keeps a tile of TILE_H x TILE_W pixels of GROUP heads and holds its whole halo in shared memory. A warp
// takes a subtile of 16 pixels, the rows of a matrix instruction, against only the SEEN pixels of the halo that this
// subtile's windows see, 16 a step. Subtiles keep queries and see keys, or keep keys and see queries: pixel t of a
// subtile meets pixel h of its halo if 0 <= h - t < KERNEL, on each axis.
//
// Where channels lie side by side, subtiles are 4x4 pixels, and pixels are seen one by one: each row of a fragment has
// the address of its own. Where columns do (PLANES), subtiles are 2x8 and pixels are seen in blocks of 8 columns. There
// copies begin on whole vectors, so halos have PAD columns that no window sees before those that they see.
//
// Names in capitals that are not defined here are given when this is compiled.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

#define INLINE __device__ __forceinline__

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int SUB_H = PLANES ? 2 : 4, SUB_W = 16 / SUB_H;  // pixels of a subtile
[[maybe_unused]] constexpr int NEXT_ROWS = 8 / SUB_W;  // from the pixel of a fragment's row to that of 8 rows later
constexpr int SUBTILES_X = TILE_W / SUB_W, SUBTILES = TILE_H / SUB_H * SUBTILES_X;
constexpr int WARP_HEADS = SUBTILES * GROUP / WARPS;  // heads that a warp takes, one after the other
constexpr int SEEN_H = KERNEL_H + SUB_H - 1;
constexpr int SEEN_W = PLANES ? ceil_div(PAD + KERNEL_W + SUB_W - 1, 8) * 8 : KERNEL_W + SUB_W - 1;
constexpr int SEEN = SEEN_H * SEEN_W, BLOCKS = ceil_div(SEEN, 8), PAIRS = ceil_div(BLOCKS, 2);

constexpr int HALO_W = TILE_W - SUB_W + SEEN_W;
// One row more where that makes fragments of channels lie in different banks.
constexpr int HALO_H = TILE_H + KERNEL_H - 1 + (PLANES && (TILE_H + KERNEL_H - 1) % 2 == 0);
constexpr int CHANNELS = GROUP * DEPTH, STEPS = DEPTH / 16;  // steps of the matrix units along channels
constexpr int TILE_PIXELS = TILE_H * TILE_W, HALO_PIXELS = HALO_H * HALO_W;
constexpr int TILE_BYTES = TILE_PIXELS * CHANNELS * 2, HALO_BYTES = HALO_PIXELS * CHANNELS * 2;
constexpr int HALO_ROOM = ceil_div(HALO_BYTES, 1024) * 1024;  // swizzled copies begin on whole patterns
constexpr int TILE_ROOM = ceil_div(TILE_BYTES, 1024) * 1024;
static_assert(SUBTILES * GROUP % WARPS == 0 && WARPS % SUBTILES == 0, "a warp keeps to one subtile");
static_assert(PLANES ? GROUP == 1 && TILE_PIXELS % 32 == 0 : CHANNELS == 16 || CHANNELS == 32 || CHANNELS == 64,
              "what is swizzled together is a whole pattern, or a whole part of one");

[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

INLINE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

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
      ::"r"(to), "l"(&map), "r"(barrier), "r"(PLANES ? x : channel), "r"(PLANES ? y : x), "r"(PLANES ? channel : y),
      "r"(image)
      : "memory");
}

// Writes a tile that all threads have written to shared memory; what lies outside of the map is left out.
INLINE void copy_out(u32 from, const TensorMap& map, int channel, int x, int y, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;"
      ::"l"(&map), "r"(from), "r"(PLANES ? x : channel), "r"(PLANES ? y : x), "r"(PLANES ? channel : y), "r"(image)
      : "memory");
}

// Of ordinary writes to shared memory, before a copy reads them.
INLINE void writes_visible_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

INLINE void copies_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// A copy swizzles 16 bytes within 128: their number by that of the 128 bytes, up to the pattern's width.
INLINE u32 swizzled(u32 offset, int width) { return offset ^ (offset >> 7 & (width / 16 - 1)) << 4; }

// Address of a lane's row of a fragment, in a tile or halo of so many PIXELS: 16 bytes of 8 channels of one pixel, or,
// in planes, of 8 columns of one channel. Of its four matrices lanes 8 to 15 have the pixels 8 later, lanes 16 to 31
// the channels 8 later.
template <int PIXELS, int PATTERN>
INLINE u32 address_of(u32 start, int lane, int pixel) {
  if (!PLANES) return start + swizzled(pixel * CHANNELS * 2, PATTERN) ^ (lane >> 4) << 4;
  const int channel = (lane & 7) + (lane >> 4) * 8;
  return start + swizzled((channel * PIXELS + pixel) * 2, PATTERN);
}

// The same of the channels that are `step` times 16 later.
template <int PIXELS>
INLINE u32 at_step(u32 address, int step) {
  return PLANES ? address + step * 16 * PIXELS * 2 : address ^ step * 32;
}

// Four 8x8 matrices whose rows lie at the lanes' addresses; `ACROSS` are transposed.
template <bool ACROSS>
INLINE void load_fragments(u32 (&r)[4], u32 address) {
  if (ACROSS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

INLINE void store_fragments(u32 address, u32 a, u32 b, u32 c, u32 d) {
  if (PLANES)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// c += a b, of 16 rows, 16 channels or keys and 8 columns
INLINE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
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

struct Lane {
  int thread, lane, warp, group, member;  // fragments: rows `group` and `group + 8`, columns 2 * `member` and the next
  int sub_y, sub_x, first_head;           // the subtile's first pixel in the tile, and the warp's first head

  INLINE Lane() {
    thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, group = lane >> 2, member = lane & 3;
    const int subtile = warp % SUBTILES;
    sub_y = subtile / SUBTILES_X * SUB_H, sub_x = subtile % SUBTILES_X * SUB_W;
    first_head = warp / SUBTILES * WARP_HEADS;
  }

  // This lane's row of the fragments of a kept tile.
  INLINE u32 kept(u32 tile) const {
    const int row = PLANES ? lane & 8 : lane & 15;
    const int pixel = (sub_y + row / SUB_W) * TILE_W + sub_x + row % SUB_W;
    return address_of<TILE_PIXELS, TILE_PATTERN>(tile, lane, pixel);
  }

  // The pixel of the halo that this subtile sees as number `seen`; numbers past the last are of one before `last`.
  INLINE int halo_pixel(int seen, int last = SEEN - 1) const {
    const int number = min(seen, last), y = number / SEEN_W;
    return (sub_y + y) * HALO_W + sub_x + number - y * SEEN_W;
  }

  // This lane's row of the fragments of 16 pixels of a halo.
  INLINE u32 streamed(u32 halo, int pair) const {
    const int pixel = PLANES ? halo_pixel(16 * pair + (lane & 8), SEEN - 8) : halo_pixel(16 * pair + (lane & 15));
    return address_of<HALO_PIXELS, HALO_PATTERN>(halo, lane, pixel);
  }
};

// Visibility is a product of two small matrices, which starts the sum of a score instead of zero: a row of the first
// tells in which column and in which row of the subtile a pixel lies, a column of the second has, for each of these,
// zero or HIDDEN. Its operands are bfloat16, whatever maps are.
constexpr u32 HIDDEN = 0xFE80;  // -2^126: what it is added to vanishes beside it, and two of them are finite
constexpr u32 ONE = 0x3F80;
constexpr int WORDS = PLANES ? 2 : 1;  // registers of a column: 8 columns and 2 rows of a subtile are more than 8

struct alignas(8 * WORDS) Hidden {
  u32 block[2][WORDS];
};

struct HiddenTable {
  Hidden of[PAIRS + 1][32];  // the last tells of pixels past all that are seen

  constexpr HiddenTable() : of() {
    for (int pair = 0; pair <= PAIRS; pair++)
      for (int lane = 0; lane < 32; lane++)
        for (int block = 0; block < 2; block++)
          for (int word = 0; word < WORDS; word++) {
            const int seen = 16 * pair + 8 * block + lane / 4;
            u32 hidden = 0;
            for (int i = 0; i < 2; i++) {
              const int place = 8 * word + lane % 4 * 2 + i;
              const bool of_column = place < SUB_W;
              const int kept = of_column ? place : place - SUB_W;
              const int at = of_column ? seen % SEEN_W - PAD : seen / SEEN_W, kernel = of_column ? KERNEL_W : KERNEL_H;
              const bool met = seen < SEEN && at >= kept && at - kept < kernel;
              hidden |= (met || place >= SUB_W + SUB_H ? 0u : HIDDEN) << 16 * i;
            }
            of[pair][lane].block[block][word] = hidden;
          }
  }
};

__device__ constexpr HiddenTable hidden_table;

struct Visibility {
  u32 low[WORDS], high[WORDS];  // the first matrix's rows `group` and `group + 8`

  INLINE Visibility(const Lane& l) {
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
      low[word] = place(l.group, 8 * word + 2 * l.member), high[word] = place(l.group + 8, 8 * word + 2 * l.member);
    }
  }

  // One where `first` or the place after it is the row's column, or, past all columns, its row of the subtile.
  static INLINE u32 place(int row, int first) {
    const int column = row % SUB_W, after = SUB_W + row / SUB_W;
    return (first == column || first == after ? ONE : 0) |
           (first + 1 == column || first + 1 == after ? ONE << 16 : 0);
  }

  // s = 0 where pixels meet, else HIDDEN or twice that
  INLINE void start(float (&s)[2][4], const Hidden& hidden) const {
    start_block(s[0], hidden.block[0]);
    start_block(s[1], hidden.block[1]);
  }

  INLINE void start_block(float (&c)[4], const u32 (&hidden)[WORDS]) const {
    if constexpr (WORDS == 1)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
          : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
          : "r"(low[0]), "r"(high[0]), "r"(hidden[0]), "f"(0.0f));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%10, %10, %10, %10};"
          : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
          : "r"(low[0]), "r"(high[0]), "r"(low[WORDS - 1]), "r"(high[WORDS - 1]), "r"(hidden[0]),
            "r"(hidden[WORDS - 1]), "f"(0.0f));
  }
};

// Scores of a subtile with 16 pixels of a halo: two blocks of 8 columns.
INLINE void scores(float (&s)[2][4], const u32 (&kept)[STEPS][4], u32 streamed, int first_step) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_fragments<PLANES>(r, at_step<HALO_PIXELS>(streamed, first_step + step));
    multiply(s[0], kept[step], r[0], r[2]);
    multiply(s[1], kept[step], r[1], r[3]);
  }
}

// sum += weights @ the same 16 pixels
INLINE void add_weighted(float (&sum)[2 * STEPS][4], const u32 (&weights)[4], u32 streamed, int first_step) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_fragments<!PLANES>(r, at_step<HALO_PIXELS>(streamed, first_step + step));
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
  for (int step = 0; step < STEPS; step++)
    load_fragments<PLANES>(r[step], at_step<TILE_PIXELS>(kept, first_step + step));
}

// Logits are products by a positive scale, for what is hidden to stay far below: their signs are those of `kept`. flip:
// the sign bits of two halves, or 0.
INLINE void flip_signs(u32 (&kept)[STEPS][4], u32 flip) {
#pragma unroll
  for (int step = 0; step < STEPS; step++)
    kept[step][0] ^= flip, kept[step][1] ^= flip, kept[step][2] ^= flip, kept[step][3] ^= flip;
}

// Rows `group` times `low`, the others times `high`, to where this warp's subtile lies in a tile.
INLINE void store_kept(u32 kept, int first_step, const float (&sum)[2 * STEPS][4], float low, float high) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const float(&a)[4] = sum[2 * step], (&b)[4] = sum[2 * step + 1];
    store_fragments(at_step<TILE_PIXELS>(kept, first_step + step), pack(a[0] * low, a[1] * low),
                    pack(a[2] * high, a[3] * high), pack(b[0] * low, b[1] * low), pack(b[2] * high, b[3] * high));
  }
}

struct Place {
  int channel, first_head, x, y, image;

  // groups of heads lie side by side along the grid's first axis
  INLINE Place(int heads) {
    const int groups = heads / GROUP, tile_x = blockIdx.x / groups;
    first_head = (blockIdx.x - tile_x * groups) * GROUP;
    channel = first_head * DEPTH, x = tile_x * TILE_W, y = blockIdx.y * TILE_H, image = blockIdx.z;
  }

  // Where the pixel (y, x) of a head of the group lies in floats [B, heads, H, W].
  template <typename Arguments>
  INLINE long long pixel(const Arguments& a, int head, int y, int x) const {
    return (((long long)image * a.heads + first_head + head) * a.height + y) * a.width + x;
  }
};

// Where shared memory begins; a swizzle's pattern begins there too.
INLINE u32 shared_start(const void* raw) {
  const u32 start = shared_address(raw);
  if (start % 1024) __trap();
  return start;
}

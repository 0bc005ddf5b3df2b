// Maps of halves: fragments and their products, and tiles that are kept in shared memory.

// Columns of a kept map's tile as it is copied: OFFSET before its own, and some behind them.
constexpr int KEPT_W = TILE_W + (OFFSET ? 8 : 0);
constexpr int TILE_BYTES = TILE_H * KEPT_W * CHANNELS * 2, TILE_ROOM = ceil_div(TILE_BYTES, 1024) * 1024;
static_assert(PARTS == 1, "tiles and bands are copied at once");

using KeptMap = TensorMap;

struct Fragments {  // of a unit's 16 pixels
  u32 of[STEPS][4];
};

struct Weights {  // of 16 pixels, the rows, and 16 that are seen
  u32 of[4];
};

// Four 8x8 matrices are loaded at once: two blocks of 8 pixels with 16 channels. Each lane has a row of one of them, 16
// bytes: 8 channels of a pixel or, in planes, 8 columns of a channel.

// Between rows of so many columns, in pixels; rows of planes are as far apart as their channels make them.
constexpr int row_step(int columns) { return PLANES ? CHANNELS * columns : columns; }

// Bytes to row number `row` of a matrix in a tile or band of so many COLUMNS, before they are swizzled. pixel: of this
// row or, in planes, the matrix's first. later: whether it has the channels that are 8 later.
template <int COLUMNS>
constexpr INLINE int matrix_row(int pixel, bool later, int row) {
  return pixel * PIXEL_BYTES + (PLANES ? (later * 8 + row) * COLUMNS * 2 : later * 16);
}

// An address, of the channels that are `step` times 16 later.
template <int COLUMNS, int PATTERN>
INLINE u32 at_step(u32 address, int step) {
  static_assert(!PLANES || PATTERN == 16 || 32 * COLUMNS % (8 * PATTERN) == 0, "16 channels are whole patterns");
  return PLANES ? address + step * 16 * COLUMNS * 2 : address ^ step * 32;
}

// Logits are in powers of two, by one operation with that of a weight: these are known to no more than 8 or 11 bits.
INLINE float weight_of(float product, float factor, float less) { return exp2_of(fmaf(product, factor, -less)); }
INLINE float power_of(float logit) { return exp2_of(logit); }
INLINE float from_natural(float logit) { return logit * LOG2E; }
INLINE float log_sum_exp(float most, float sum) { return (most + __log2f(sum)) * LN2; }

// Of products' sum less some number: what the sum begins with, and what is then made of it.
INLINE float begin_less(float number) { return -number; }
INLINE float end_less(float sum, float) { return sum; }

INLINE u32 pack(float low, float high) { return pack_halves<BF16>(low, high); }

INLINE void pack_weights(Weights (&packed)[UNITS], const float (&p)[UNITS][2][4]) {
#pragma unroll
  for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
    for (int i = 0; i < 4; i++) packed[unit].of[i] = pack(p[unit][i / 2][i % 2 * 2], p[unit][i / 2][i % 2 * 2 + 1]);
}

using Number = unsigned short;  // of a map, as it lies in memory

INLINE Number number_of(float x) { return pack(x, 0.0f); }

INLINE void pack_weights(Weights (&packed)[UNITS], const Number (&p)[UNITS][2][4]) {
#pragma unroll
  for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      packed[unit].of[i] = p[unit][i / 2][i % 2 * 2] | u32(p[unit][i / 2][i % 2 * 2 + 1]) << 16;
}

// The tile of a kept map, or of results, in shared memory, as a warp sees its subtile. Matrices are loaded at once where
// their rows lie on whole vectors, else number by number.
struct Kept {
  static constexpr int ROOM = TILE_ROOM;

  const TensorMap& map;
  const Place& at;
  const Lane& l;
  u32 tile;

  INLINE Kept(u32 tile, const TensorMap& map, const Place& at, const Lane& l) : map(map), at(at), l(l), tile(tile) {}

  // By one thread, which the barrier still waits for.
  INLINE void copy_in(u32 barrier) const {
    barrier_expect_more(barrier, TILE_BYTES);
    ::copy_in(tile, map, barrier, at.channel, at.x - OFFSET, at.y, at.image);
  }

  // By one thread, when all have stored what is theirs.
  INLINE void copy_out() const { ::copy_out(tile, map, at.channel, at.x, at.y, at.image); }

  // Address of this lane's row of a unit's fragments, of a step along channels.
  INLINE u32 row(int unit, int step) const {
    const int number = PLANES ? l.lane & 8 : l.lane & 15;
    const int pixel = (l.sub_y + row_y(unit, number)) * row_step(TILE_W) + l.sub_x + row_x(unit, number);
    const int bytes = matrix_row<TILE_W>(pixel, l.lane >> 4, l.lane & 7);
    return at_step<TILE_W, TILE_PATTERN>(swizzled(tile + bytes, TILE_PATTERN), step);
  }

  // A lane's register of a unit's fragments, of planes.
  INLINE u32 word(int unit, int step, int i) const {
    const int number = l.group + i % 2 * 8, channel = 16 * step + i / 2 * 8 + 2 * l.member;
    const int y = l.sub_y + row_y(unit, number), x = l.sub_x + row_x(unit, number) + OFFSET;
    const u32 first = tile + ((y * CHANNELS + channel) * KEPT_W + x) * 2;
    return load_half(first) | load_half(first + 2 * KEPT_W) << 16;
  }

  INLINE void fragment(u32 (&of)[4], int unit, int step) const {
    if (OFFSET == 0) {
      load_matrices<PLANES>(of, row(unit, step));
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) of[i] = word(unit, step, i);
  }

  // flip: the sign bits of two halves, or 0
  INLINE void load(Fragments (&kept)[UNITS], int head, u32 flip = 0) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        fragment(kept[unit].of[step], unit, head * STEPS + step);
#pragma unroll
        for (int i = 0; i < 4; i++) kept[unit].of[step][i] ^= flip;
      }
  }

  // The sums over channels of this tile's times another's.
  INLINE void products(Pair (&sums)[UNITS], const Fragments (&other)[UNITS], int head) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      float low = 0.0f, high = 0.0f;
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 mine[4];
        const u32(&of)[4] = other[unit].of[step];
        fragment(mine, unit, head * STEPS + step);
        low += product_of_two(of[0], mine[0]) + product_of_two(of[2], mine[2]);
        high += product_of_two(of[1], mine[1]) + product_of_two(of[3], mine[3]);
      }
      sums[unit] = {sum_of_row(low), sum_of_row(high)};
    }
  }

  // Sums times a factor of their pixel.
  INLINE void store(int head, const float (&sums)[UNITS][SUMS][4], const Pair (&factors)[UNITS]) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        const float(&a)[4] = sums[unit][2 * step], (&b)[4] = sums[unit][2 * step + 1];
        const float low = factors[unit].low, high = factors[unit].high;
        store_matrices<PLANES>(row(unit, head * STEPS + step), pack(a[0] * low, a[1] * low),
                               pack(a[2] * high, a[3] * high), pack(b[0] * low, b[1] * low),
                               pack(b[2] * high, b[3] * high));
      }
  }
};

// Results of planes whose rows begin amid a vector, where no copy can: each lane writes its own.
struct Scattered {
  const StridedMap<Number>& map;
  const Place& at;
  const Lane& l;

  INLINE Scattered(u32, const StridedMap<Number>& map, const Place& at, const Lane& l) : map(map), at(at), l(l) {}

  INLINE void store(int, const float (&sums)[UNITS][SUMS][4], const Pair (&factors)[UNITS]) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const Rows rows(at, l, unit);
      Number* low = map.data + at.image * map.image + (at.channel + 2 * l.member) * map.channel;
      low += rows.y * map.row + rows.x;
      if (rows.low_there) store(low, sums[unit], 0, factors[unit].low);
      if (rows.high_there) store(low + NEXT_ROWS * map.row, sums[unit], 2, factors[unit].high);
    }
  }

  // first: of the two of a fragment that belong to this row
  INLINE void store(Number* to, const float (&sums)[SUMS][4], int first, float factor) const {
#pragma unroll
    for (int n = 0; n < SUMS; n++, to += 8 * map.channel) {
      const u32 both = pack(sums[n][first] * factor, sums[n][first + 1] * factor);
      to[0] = both, to[map.channel] = both >> 16;
    }
  }
};

template <bool SCATTERED>
struct ResultsOf {
  using Map = TensorMap;
  using Type = Kept;
};
template <>
struct ResultsOf<true> {
  using Map = StridedMap<Number>;
  using Type = Scattered;
};
using ResultMap = ResultsOf<(OFFSET > 0)>::Map;
using Results = ResultsOf<(OFFSET > 0)>::Type;

INLINE void copy_out_all(const Lane&, const Scattered&) {}
INLINE void copy_out_all(const Lane&, const Scattered&, const Scattered&) {}

// Writes tiles, of which all warps have stored theirs, to their maps.
template <typename... Tiles>
INLINE void copy_out_all(const Lane& l, const Tiles&... tiles) {
  before_copies();
  __syncthreads();
  if (l.thread == 0) {
    (tiles.copy_out(), ...);
    copies_have_read();
  }
}

// Addresses of a lane's rows of 16 pixels of a band, from `base` on. Registers that a product takes together are loaded
// side by side: for scores those of either half of the channels, to be weighted those of either block.
struct Seen {
  u32 scored, weighted, base;
};

// first: pixel of a block
INLINE u32 seen_matrix_row(int first, bool later, const Lane& l) {
  constexpr int STEP = row_step(HALO_W);
  const int row = l.lane & 7;
  const int pixel = PLANES ? l.band_pixel<STEP>(first, SEEN - 8) : l.band_pixel<STEP>(first + row);
  return swizzled(matrix_row<HALO_W>(pixel, later, row), HALO_PATTERN);
}

INLINE Seen seen_of(u32 band, int pair, const Lane& l) {
  const int first = l.lane >> 3 & 1, second = l.lane >> 4;  // bits of the number of this lane's matrix
  return {seen_matrix_row(16 * pair + 8 * second, first, l), seen_matrix_row(16 * pair + 8 * first, second, l), band};
}

INLINE Seen held(const Seen& seen) { return {held(seen.scored), held(seen.weighted), seen.base}; }

// s += scores of a subtile with 16 pixels of a band, whose map lies `map` bytes later: two blocks of 8 columns
INLINE void add_scores(float (&s)[UNITS][2][4], const Fragments (&kept)[UNITS], const Seen& seen, u32 map, int head) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_matrices<PLANES>(r, at_step<HALO_W, HALO_PATTERN>(seen.scored, head * STEPS + step) + seen.base + map);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      multiply_halves<BF16>(s[unit][0], kept[unit].of[step], r[0], r[1]);
      multiply_halves<BF16>(s[unit][1], kept[unit].of[step], r[2], r[3]);
    }
  }
}

// sums += weights @ the same 16 pixels
INLINE void add_weighted(float (&sums)[UNITS][SUMS][4], const Weights (&weights)[UNITS], const Seen& seen, u32 map,
                         int head) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_matrices<!PLANES>(r, at_step<HALO_W, HALO_PATTERN>(seen.weighted, head * STEPS + step) + seen.base + map);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      multiply_halves<BF16>(sums[unit][2 * step], weights[unit].of, r[0], r[1]);
      multiply_halves<BF16>(sums[unit][2 * step + 1], weights[unit].of, r[2], r[3]);
    }
  }
}

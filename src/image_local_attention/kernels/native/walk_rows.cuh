// Maps whose channels lie side by side, 64 of a head, where blocks walk: a pixel is 128 bytes, which a copy swizzles.

constexpr int PIXEL_BYTES = 128, COLUMN_BYTES = PIXEL_BYTES;
constexpr int KEPT_BYTES = 64 * PIXEL_BYTES;  // of a map's tile
static_assert(DEPTH == 64 && ABREAST == 1, "a pixel is a row of a pattern, and tiles see all of a band");

using PixelRows = SharedRows<PIXEL_BYTES>;

constexpr int MOVED_BYTES = 0;  // products take tiles from where they were copied to
constexpr int KEPT_SLOTS = GROUPS;

INLINE void copy_halo(u32 to, const TensorMap& map, u32 barrier, int y, int x, const Place& at) {
  copy_box_in(to, map, barrier, at.head * DEPTH, x, y, at.image);
}

INLINE void copy_kept(u32 to, const TensorMap& map, u32 barrier, int y, const Place& at) {
  copy_halo(to, map, barrier, y, at.x, at);
}

// Word m of four lanes' chunks 0 to 3 becomes words 0 to 3 of chunk m, m the number of the lane.
INLINE void transpose(u32 (&words)[4], int member) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const bool later = member & bit;
      const u32 got = __shfl_xor_sync(~0u, later ? words[i] : words[i | bit], bit);
      words[i] = later ? got : words[i], words[i | bit] = later ? words[i | bit] : got;
    }
}

// The kept pixels of a map: where products take them from.
struct Kept {
  static constexpr bool MOVED = false;

  u32 tile;

  INLINE Kept(u32, u32 from, const Lane&) : tile(from) {}

  // Writes a tile's sums, times a factor of their pixel.
  INLINE void store_sums(const StridedMap<Number>& map, const float (&sums)[SUMS], float low, float high,
                         const Place& at, int y, const Lane& l) const {
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const int row = y + l.y(kept), x = at.x + l.x(kept);
      const float factor = kept ? high : low;
      Number* to = at.row(map, 0, row) + x * map.column;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int first = 4 * (4 * half + i) + 2 * kept;
          words[i] = pack_halves<BF16>(sums[first] * factor, sums[first + 1] * factor);
        }
        transpose(words, l.member);
        if (row < at.height && x < at.width)
          *reinterpret_cast<uint4*>(to + 32 * half + 8 * l.member) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
};

// scores = kept pixels' products with those of a band
INLINE void make_scores(float (&scores)[SCORES], const Kept& kept, u32 band) {
  const PixelRows a(kept.tile), b(band);
#pragma unroll
  for (int step = 0; step < DEPTH / 16; step++)
    multiply_pixels(scores, a.later(32 * step), b.later(32 * step), step > 0);
}

// sums += weights' with a band's channels
INLINE void add_weighted(float (&sums)[SUMS], const Weights& weights, u32 band, bool more) {
  const PixelRows b(band);
#pragma unroll
  for (int i = 0; i < BLOCKS / 2; i++)
    multiply_channels(sums, weights.of[i], b.later(i * 16 * PIXEL_BYTES), more || i > 0);
}

// Maps whose channels lie side by side, where blocks walk: bands and tiles come in parts of 64 channels, 128 bytes of a
// pixel, which a copy swizzles.

constexpr int PIXEL_BYTES = 128, COLUMN_BYTES = PIXEL_BYTES, PARTS = DEPTH / 64;
constexpr int TILE_PART = 64 * PIXEL_BYTES, BAND_PART = BAND_PIXELS * PIXEL_BYTES;
constexpr int KEPT_BYTES = PARTS * TILE_PART;  // of a map's tile
static_assert(DEPTH % 64 == 0 && CHANNELS == DEPTH, "a pixel of a part is a row of a pattern");
static_assert(TILE_W == 8 && ABREAST == 1, "tiles see all of a band");

using PixelRows = SharedRows<PIXEL_BYTES>;

constexpr int MOVED_BYTES = 0;  // products take tiles from where they were copied to
constexpr int KEPT_SLOTS = GROUPS;

// bytes: of a part
INLINE void copy_parts(u32 to, int bytes, const TensorMap& map, u32 barrier, int y, int x, const Place& at) {
#pragma unroll
  for (int part = 0; part < PARTS; part++)
    copy_box_in(to + part * bytes, map, barrier, at.head * DEPTH + 64 * part, x, y, at.image);
}

INLINE void copy_halo(u32 to, const TensorMap& map, u32 barrier, int y, int x, const Place& at) {
  copy_parts(to, BAND_PART, map, barrier, y, x, at);
}

INLINE void copy_kept(u32 to, const TensorMap& map, u32 barrier, int y, const Place& at) {
  copy_parts(to, TILE_PART, map, barrier, y, at.x, at);
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
      for (int quarter = 0; quarter < DEPTH / 32; quarter++) {  // 32 channels
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int first = 4 * (4 * quarter + i) + 2 * kept;
          words[i] = pack_halves<BF16>(sums[first] * factor, sums[first + 1] * factor);
        }
        transpose(words, l.member);
        if (row < at.height && x < at.width)
          store_vector(to + 32 * quarter + 8 * l.member, words);
      }
    }
  }

  // Of each of a lane's pixels, the sum over channels of these times another map's, which was copied to `from`.
  // Over planes it is also told where addresses of shared memory count from.
  INLINE void products(float (&sums)[2], const unsigned char*, u32 from, const Lane& l) const {
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const int pixel = l.y(kept) * TILE_W + l.x(kept);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < DEPTH / 32; i++) {
        const u32 vector = i / 2 * TILE_PART + pixel * PIXEL_BYTES + ((4 * (i % 2) + l.member) ^ pixel % 8) * 16;
        u32 mine[4], other[4];
        load(mine, tile + vector), load(other, from + vector);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += product_of_two(mine[j], other[j]);
      }
      sums[kept] = sum_of_row(sum);
    }
  }
};

// scores = kept pixels' products with those of a band
INLINE void make_scores(float (&scores)[SCORES], const Kept& kept, u32 band) {
  const PixelRows a(kept.tile), b(band);
#pragma unroll
  for (int step = 0; step < DEPTH / 16; step++) {
    const int part = step / 4, first = step % 4 * 32;
    multiply_pixels(scores, a.later(part * TILE_PART + first), b.later(part * BAND_PART + first), step > 0);
  }
}

// sums += weights' with a band's channels
INLINE void add_weighted(float (&sums)[SUMS], const Weights& weights, u32 band, bool more) {
  const PixelRows b(band);
#pragma unroll
  for (int i = 0; i < BLOCKS / 2; i++)
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      float(&of_part)[32] = reinterpret_cast<float(&)[32]>(sums[32 * part]);
      multiply_channels(of_part, weights.of[i], b.later(part * BAND_PART + i * 16 * PIXEL_BYTES), more || i > 0);
    }
}

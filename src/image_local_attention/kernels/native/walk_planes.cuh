// Maps whose columns lie side by side, where blocks walk: bands of rows, each of DEPTH channels of HALO_W columns.
//
// Copies begin on whole vectors of 8 columns. So do halos: of tiles that are 16 wide they have PAD columns that none of
// these sees, and tiles that are 8 wide begin where halos can. Such tiles of a kept map are copied with OFFSET columns
// before them and some behind. A group moves its tile to where products take it from.

constexpr int OFFSET = BEFORE ? 8 - BEFORE : 0, KEPT_W = ABREAST * TILE_W + (OFFSET ? 8 : 0);
constexpr int COLUMN_BYTES = 2, PATTERN = COLUMN_BYTES * HALO_W, ROW_BYTES = DEPTH * PATTERN;
constexpr int KEPT_BYTES = TILE_H * DEPTH * KEPT_W * 2;  // of a map's tiles, as they are copied
// Products take a tile as blocks of 8 pixels side by side, a vector of each channel, NEXT_BLOCK bytes apart. Of tiles that
// are 16 wide two blocks are moved at once: 64 bytes more put them into different banks.
constexpr int NEXT_BLOCK = DEPTH * 16 + (TILE_W == 16 ? 64 : 0), MOVED_BYTES = 7 * NEXT_BLOCK + DEPTH * 16;
constexpr int KEPT_SLOTS = 1;  // groups soon move a tile away
static_assert(HALO_W == 32 || HALO_W == 64, "a row of a channel is a row of a pattern");

using PlaneRows = SharedRows<PATTERN, ROW_BYTES>;
using PlaneBlocks = SharedBlocks<NEXT_BLOCK>;

// Whether rows of a tile are whole vectors of the map, whose width is one of these: `walk.py` sees to that.
constexpr bool IN_VECTORS = TILE_W == 16;

INLINE void copy_halo(u32 to, const TensorMap& map, u32 barrier, int y, int x, const Place& at) {
  if (CHANNELS < DEPTH)  // channels end with the head's
    copy_box_in(to, map, barrier, x, 0, y, at.head, at.image);
  else
    copy_box_in(to, map, barrier, x, at.head * DEPTH, y, at.image);
}

INLINE void copy_kept(u32 to, const TensorMap& map, u32 barrier, int y, const Place& at) {
  copy_halo(to, map, barrier, y, at.x - OFFSET, at);
}

// The kept pixels of a map: where products take them from.
struct Kept {
  static constexpr bool MOVED = true;

  u32 tile;

  // By the group: moves what was copied to `from`.
  INLINE Kept(u32 tile, u32 from, const Lane& l) : tile(tile) {
    constexpr int ACROSS = TILE_W / 8;  // vectors of a row of the tile
#pragma unroll
    for (int i = 0; i < 8 * DEPTH; i += GROUP_THREADS) {
      const int first = l.thread % ACROSS, number = (i + l.thread) / ACROSS;
      const int channel = number % DEPTH, row = number / DEPTH;
      const u32 vectors = from + ((row * DEPTH + channel) * KEPT_W + l.left + 8 * first) * 2;
      u32 words[8];
      load(reinterpret_cast<u32(&)[4]>(words[0]), vectors);
      if (OFFSET) load(reinterpret_cast<u32(&)[4]>(words[4]), vectors + 16);
      u32 moved[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int word = OFFSET / 2 + j;
        moved[j] = OFFSET % 2 ? __funnelshift_r(words[word], words[word + 1], 16) : words[word];
      }
      store(tile + (row * ACROSS + first) * NEXT_BLOCK + channel * 16, moved);
    }
  }

  // By the group, once it has no more use for the tile: writes sums of its pixels, times a factor of each.
  INLINE void store_sums(const StridedMap<Number>& map, const float (&sums)[SUMS], float low, float high,
                         const Place& at, int y, const Lane& l) const {
    if (IN_VECTORS)
      store_vectors(map, sums, low, high, at, y, l);
    else
      store_numbers(map, sums, low, high, at, y, l);
  }

  // A warp turns its row of the tile in the tile's place.
  INLINE void store_vectors(const StridedMap<Number>& map, const float (&sums)[SUMS], float low, float high,
                            const Place& at, int y, const Lane& l) const {
    const u32 row = tile + l.warp * DEPTH * 32;
    const int matrix = l.lane >> 3, later = matrix >> 1 << 3 | l.lane & 7;
    sync_group(l.group);
#pragma unroll
    for (int block = 0; block < DEPTH / 8; block += 2) {
      u32 words[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int kept = 0; kept < 2; kept++) {
          const float* of = sums + 4 * (block + i) + 2 * kept;
          const float factor = kept ? high : low;
          words[i][kept] = pack_halves<BF16>(of[0] * factor, of[1] * factor);
        }
      const u32 to = turned(row, 8 * block + later, matrix & 1);
      store_matrices<true>(to, words[0][0], words[0][1], words[1][0], words[1][1]);
    }
    __syncwarp();
    const int x = at.x + l.lane % 2 * 8;
    if (!at.has(y + l.warp, x)) return;
    Number* to = at.row(map, 0, y + l.warp) + x;
#pragma unroll
    for (int channel = l.lane / 2; channel < CHANNELS; channel += 16) {
      u32 words[4];
      load(words, turned(row, channel, l.lane % 2));
      store_vector(to + channel * map.channel, words);
    }
  }

  // Where a vector of a row lies while it is turned: rows of four channels differ in their banks from the next four's.
  static INLINE u32 turned(u32 row, int channel, int vector) {
    return row + channel * 32 + (vector ^ channel >> 2 & 1) * 16;
  }

  // A lane writes its own.
  INLINE void store_numbers(const StridedMap<Number>& map, const float (&sums)[SUMS], float low, float high,
                            const Place& at, int y, const Lane& l) const {
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const int row = y + l.y(kept), x = at.x + l.x(kept);
      const float factor = kept ? high : low;
      if (!at.has(row, x)) continue;
      Number* to = at.row(map, 2 * l.member, row) + x;
#pragma unroll
      for (int block = 0; block < DEPTH / 8; block++, to += 8 * map.channel) {
        const float* of = sums + 4 * block + 2 * kept;
        const u32 word = pack_halves<BF16>(of[0] * factor, of[1] * factor);
        const int channel = 8 * block + 2 * l.member;
        if (channel < CHANNELS) to[0] = word;
        if (channel + 1 < CHANNELS) to[map.channel] = word >> 16;
      }
    }
  }

  // Of each of a lane's pixels, the sum over channels of these times another map's, which was copied to `from`.
  // shared: where addresses of shared memory count from.
  INLINE void products(float (&sums)[2], const unsigned char* shared, u32 from, const Lane& l) const {
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const int number = (l.y(kept) * TILE_W + l.x(kept)) / 8;
      const Number* mine = reinterpret_cast<const Number*>(shared + tile) + number * NEXT_BLOCK / 2 + l.column;
      const Number* other = reinterpret_cast<const Number*>(shared + from) + l.left + l.x(kept) + OFFSET;
      other += l.y(kept) * DEPTH * KEPT_W;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < DEPTH / 4; i += 2) {
        const int channel = 4 * i + 2 * l.member;
        sum += product_of_two(mine[channel * 8] | u32(mine[channel * 8 + 8]) << 16,
                              other[channel * KEPT_W] | u32(other[(channel + 1) * KEPT_W]) << 16);
      }
      sums[kept] = sum_of_row(sum);
    }
  }
};

// scores = kept pixels' products with those of a band
INLINE void make_scores(float (&scores)[SCORES], const Kept& kept, u32 band) {
  constexpr int PRODUCTS = SEEN_W == HALO_W ? 1 : BAND_H;  // where rows are seen whole, one goes on with the next
  constexpr int COUNT = SCORES / PRODUCTS;
  const PlaneBlocks a(kept.tile);
  const PlaneRows b(band);
#pragma unroll
  for (int row = 0; row < PRODUCTS; row++) {
    float(&of_row)[COUNT] = reinterpret_cast<float(&)[COUNT]>(scores[row * COUNT]);
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++)
      multiply_pixels(of_row, a.later(step * 256), b.later(row * ROW_BYTES + step * 16 * PATTERN), step > 0);
  }
}

// sums += weights' with a band's channels
INLINE void add_weighted(float (&sums)[SUMS], const Weights& weights, u32 band, bool more) {
  constexpr int STEPS = SEEN_W / 16;
  const PlaneRows b(band);
#pragma unroll
  for (int i = 0; i < BLOCKS / 2; i++)
    multiply_channels(sums, weights.of[i], b.later(i / STEPS * ROW_BYTES + i % STEPS * 32), more || i > 0);
}

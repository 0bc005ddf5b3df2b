// Kernels whose blocks walk down a map: 8x8 tiles of kept pixels, one below the other, past the halo that they share.
//
// Groups of four warps take turns at the tiles; one more copies. A tile is the rows of products of 64 rows: warp w of a
// group has the tile's rows 2w and 2w + 1, a lane one pixel of either. The halo is as wide as what a tile sees, and
// passes in bands of four rows through SLOTS places of shared memory. Tile t sees bands 2t to 2t + TILE_BANDS - 1.
//
// Maps are of halves whose channels lie side by side, 64 of a head: a pixel is 128 bytes. Names in capitals that are
// not defined here are given when this is compiled.

constexpr int SIDE = 8, BAND_H = 4, PIXEL_BYTES = 128;
constexpr int TILE_BYTES = SIDE * SIDE * PIXEL_BYTES;
constexpr int HALO_W = ceil_div(SIDE + KERNEL_W - 1, 4) * 4, BAND_PIXELS = BAND_H * HALO_W;
constexpr int BAND_BYTES = BAND_PIXELS * PIXEL_BYTES;
constexpr int TILE_BANDS = ceil_div(SIDE + KERNEL_H - 1, BAND_H);
constexpr int BLOCKS = BAND_PIXELS / 8, HALF_BLOCKS = BLOCKS / 2;  // of 8 pixels: of a band, and of two of its rows
constexpr int GROUP_THREADS = 128;

using Number = unsigned short;  // of a map, as it lies in memory

struct Lane {
  int lane, group, warp;  // of the warp, of the block, of the group
  int column, member;     // of the tile, of the lanes that share its pixels

  INLINE Lane() {
    const int thread = threadIdx.x;
    lane = held(thread & 31), column = lane >> 2, member = lane & 3;
    group = __shfl_sync(~0u, thread / GROUP_THREADS, 0), warp = __shfl_sync(~0u, thread / 32 % 4, 0);
  }
};

struct Place {
  int heads, height, width;
  int head, x, image, y;  // where this block's first tile begins
  int tiles, bands;

  INLINE Place(int heads, int height, int width) : heads(heads), height(height), width(width) {
    const int rows = ceil_div(height, SIDE), most = ceil_div(rows, gridDim.y), first = blockIdx.y * most;
    x = blockIdx.x / heads * SIDE, head = blockIdx.x % heads, image = blockIdx.z, y = first * SIDE;
    tiles = min(most, rows - first), bands = 2 * (tiles - 1) + TILE_BANDS;
  }

  // Where the pixel (y, x) lies in floats [B, heads, H, W].
  INLINE long long pixel(int y, int x) const {
    return (((long long)image * heads + head) * height + y) * width + x;
  }
};

// A use of a place in shared memory, which some fill and others read: its number, and how often it was used before.
struct Use {
  int slot, turn;

  INLINE Use(int number, int slots) : slot(number % slots), turn(number / slots) {}

  // Of what comes next.
  INLINE void next(int slots) {
    const bool again = ++slot == slots;
    slot = again ? 0 : slot, turn += again;
  }
};

// Barriers of places: a place is full; all readers are through with it.
struct Barriers {
  u32 first;

  static constexpr int BYTES = 16;  // of a place

  INLINE u32 full(const Use& use) const { return first + use.slot * BYTES; }
  INLINE u32 read(const Use& use) const { return full(use) + 8; }

  // By one thread. fillers, readers: how many arrive.
  INLINE void init(int slots, int fillers, int readers) const {
    for (int slot = 0; slot < slots; slot++) {
      const Use use(slot, slots);
      barrier_init(full(use), fillers), barrier_init(read(use), readers);
    }
  }

  // Before a place is filled anew.
  INLINE void wait_for_readers(const Use& use) const {
    if (use.turn > 0) barrier_wait(read(use), use.turn - 1);
  }

  INLINE void wait(const Use& use) const { barrier_wait(full(use), use.turn); }

  // By every thread that reads.
  INLINE void release(const Use& use) const { barrier_arrive(read(use)); }
};

// Which of a lane's pairs of pixels side by side are seen, as bits of two halves: of the blocks of two rows of a band.
// Where a row ends amid a block, members 0 and 1 have its end, others the next row's begin.
struct Seen {
  u32 columns[HALF_BLOCKS];
  bool at_end;

  INLINE Seen(const Lane& l) : at_end(l.member < 2) {
#pragma unroll
    for (int block = 0; block < HALF_BLOCKS; block++) {
      const int x = (8 * block + 2 * l.member) % HALO_W - l.column;
      const u32 seen = (sees(x) ? 0xFFFF : 0) | (sees(x + 1) ? 0xFFFF0000 : 0);
      columns[block] = always(block) ? seen : held(seen);
    }
  }

  static constexpr INLINE bool sees(int x) { return x >= 0 && x < KERNEL_W; }

  // Whether all columns of the tile see all of a block's.
  static constexpr bool always(int block) {
    for (int i = 0; i < 8; i++) {
      const int x = (8 * block + i) % HALO_W;
      if (x < SIDE - 1 || x >= KERNEL_W) return false;
    }
    return true;
  }

  // first, second: all bits or none, for the rows
  INLINE u32 of(int block, u32 first, u32 second) const {
    const u32 row = 8 * block + 8 <= HALO_W ? first : 8 * block >= HALO_W ? second : at_end ? first : second;
    return always(block) ? row : columns[block] & row;
  }
};

// Which rows of the halo the warp's pixels see, of two rows of a band and the two of the tile: all bits or none.
struct SeenRows {
  u32 of[2][2];  // of the warp's first and second row, the halo's

  // y: of the first of the halo's rows, from that which the tile's first row sees first
  INLINE SeenRows(int y, const Lane& l) {
#pragma unroll
    for (int kept = 0; kept < 2; kept++)
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const int from = y + row - 2 * l.warp - kept;
        of[kept][row] = from >= 0 && from < KERNEL_H ? ~0u : 0;
      }
  }

  INLINE bool any() const { return of[0][0] | of[0][1] | of[1][0] | of[1][1]; }
};

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

// Writes the sums of a tile's 64 channels, times a factor.
INLINE void store(const StridedMap<Number>& map, const float (&sums)[32], float factor, const Place& at, int y, const Lane& l) {
  const int x = at.x + l.column;
#pragma unroll
  for (int kept = 0; kept < 2; kept++) {
    const int row = y + 2 * l.warp + kept;
    Number* to = map.data + at.image * map.image + at.head * 64 * map.channel + row * map.row + x * map.column;
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

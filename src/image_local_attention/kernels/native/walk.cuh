// Kernels whose blocks walk down a map: tiles of 64 kept pixels, one below the other, past the halo that they share.
//
// GROUPS groups of four warps have ABREAST tiles side by side, in TURNS turns; one more copies. A tile is the rows of
// products of 64 rows, of which warp w of a group has 16: where tiles are 8 wide two rows of the tile, where they are 16
// wide one. A lane has two pixels, its kept ones. The halo is as wide as what these tiles see, or a copy of planes, and
// passes in bands of BAND_H rows through SLOTS places of shared memory; products of a tile take SEEN_W of its columns.
// Tile t, counted down, sees bands t * TILE_STEP to t * TILE_STEP + TILE_BANDS - 1.
//
// Where windows are so large that a tile's bands cannot be held for the next, sets of tiles, TURNS of them one below the
// other, are APART: each has its SET_BANDS bands to itself, HALO_W columns of the halo after the other, in CHUNKS.
//
// Maps are of halves. A head has CHANNELS of them a pixel, and room for DEPTH: the rest is zero. Names in capitals that
// are not defined here are given when this is compiled.

constexpr int BAND_PIXELS = BAND_H * HALO_W, BAND_BYTES = BAND_PIXELS * DEPTH * 2;
constexpr int TILE_STEP = TILE_H / BAND_H, TILE_BANDS = ceil_div(TILE_H + KERNEL_H - 1, BAND_H);
constexpr int ROW_BLOCKS = SEEN_W / 8, BLOCKS = BAND_H * SEEN_W / 8;  // of 8 pixels: of a band's row, and of a band
constexpr int SCORES = BAND_H * SEEN_W / 2, SUMS = DEPTH / 2;         // of a lane, of its two pixels
constexpr int GROUP_THREADS = 128, TURNS = GROUPS / ABREAST;
constexpr int SET_BANDS = TILE_STEP * (TURNS - 1) + TILE_BANDS;  // of a chunk

static_assert(TILE_H * TILE_W == 64 && TILE_H % BAND_H == 0, "tiles begin with a band");
static_assert(SLOTS > 1 && GROUPS > 1 && GROUPS < 8, "a band is held while the next comes; threads of a block");
static_assert(BLOCKS % 2 == 0, "products take 16 pixels at once");
static_assert(GROUPS % ABREAST == 0 && TILE_W * (ABREAST - 1) + SEEN_W <= HALO_W, "products see no other row");
static_assert(APART || TILE_BANDS <= SLOTS + TILE_STEP * TURNS,
              "a tile's last band comes while those are held that the next sees again");
static_assert(CHUNKS == 1 || (APART && ABREAST == 1), "tiles see all of a chunk");

using Number = unsigned short;  // of a map, as it lies in memory

struct Lane {
  int lane, group, warp;  // of the warp, of the block, of the group
  int thread;             // of the group
  int turn, left;         // of the group: among tiles one below the other; columns from the block's first to its own
  int column, member;     // of the tile's first 8, of the lanes that share its pixels

  INLINE Lane() {
    const int number = threadIdx.x;
    lane = held(number & 31), column = lane >> 2, member = lane & 3;
    group = __shfl_sync(~0u, number / GROUP_THREADS, 0), warp = __shfl_sync(~0u, number / 32 % 4, 0);
    thread = warp * 32 + lane, turn = group / ABREAST, left = group % ABREAST * TILE_W;
  }

  // Of a kept pixel, 0 or 1, in the tile.
  INLINE int y(int kept) const { return TILE_W == 8 ? 2 * warp + kept : warp; }
  INLINE int x(int kept) const { return TILE_W == 8 ? column : column + 8 * kept; }

  // Of what the tile sees of the halo, the first column that it sees itself.
  INLINE int first(int kept) const { return x(kept) + PAD; }
};

struct Place {
  int heads, height, width;
  int head, x, image, y;  // where this block's first tile begins
  int tiles, bands;

  INLINE Place(int heads, int height, int width) : heads(heads), height(height), width(width) {
    constexpr int UNIT = APART ? TURNS : 1;  // rows of tiles that blocks share a map by
    const int columns = gridDim.x / heads, block = blockIdx.y * gridDim.x + blockIdx.x;
    const int column = APART ? block % columns : blockIdx.x / heads;
    const int part = APART ? block / columns % gridDim.y : blockIdx.y;
    head = APART ? block / columns / gridDim.y : blockIdx.x % heads, image = blockIdx.z;
    const int rows = ceil_div(height, TILE_H), most = ceil_div(rows, gridDim.y * UNIT) * UNIT, first = part * most;
    x = column * (TILE_W * ABREAST) - BEFORE, y = first * TILE_H;
    tiles = min(most, rows - first);
    bands = APART ? ceil_div(tiles, TURNS) * CHUNKS * SET_BANDS : TILE_STEP * (tiles - 1) + TILE_BANDS;
  }

  INLINE bool has(int y, int x) const { return y < height && x >= 0 && x < width; }

  // Where the tiles of a group begin.
  INLINE Place of(const Lane& l) const {
    Place other = *this;
    other.x += l.left;
    return other;
  }

  // Where a map has column 0 of row y, of the head's channel.
  INLINE Number* row(const StridedMap<Number>& map, int channel, int y) const {
    return map.data + image * map.image + (head * CHANNELS + channel) * map.channel + y * map.row;
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

// Products' first operands: what 64 kept pixels have for 16 of a band.
struct Weights {
  u32 of[BLOCKS / 2][4];

  INLINE u32& word(int block, int kept) { return of[block / 2][block % 2 * 2 + kept]; }
};

// What a program keeps and what it sees, and where its pixels lie.
//
// A program keeps a tile of TILE_H x TILE_W pixels of GROUP heads. A warp takes a subtile of SUB_H x SUB_W against only the
// pixels of the halo that this subtile's windows see, 16 a step. A subtile is one unit of 16 pixels, the rows of a matrix
// instruction, or two, which see more between them but share what is read of it. Subtiles keep queries and see keys, or
// keep keys and see queries: pixel t of a subtile meets pixel h of its halo if 0 <= h - t < KERNEL, on each axis.
//
// The halo comes in bands of BAND_H rows: all in one, or several, which take turns in SLOTS places of shared memory. Its
// columns are those that are seen and, where copies begin on whole vectors or addresses ask for it, PAD more before and
// some behind; subtiles see a band's columns from their own first one and SKIP on.
//
// Where channels lie side by side, or numbers are floats, units are 4x4 pixels, and pixels are seen one by one.
// Where columns of halves do, units are 2x8, and pixels are seen in blocks of 8 columns. Tiles may begin BEFORE the
// map, so that halos begin with such a block and need no PAD.
//
// Names in capitals that are not defined here are given when this is compiled.

constexpr int UNITS = SUB_H * SUB_W / 16, UNITS_X = SUB_W / UNIT_W;
constexpr int NEXT_ROWS = 8 / UNIT_W;  // from the pixel of a fragment's row to that of 8 rows later
constexpr int SUBTILES_X = TILE_W / SUB_W, SUBTILES = TILE_H / SUB_H * SUBTILES_X;
constexpr int WARP_HEADS = SUBTILES * SHARED_BY * GROUP / WARPS;  // heads that a warp takes, one after the other
constexpr bool WHOLE = BANDS == 1;
constexpr int SEEN_ROWS = WHOLE ? SEEN_H : BAND_H, SEEN_BANDS = ceil_div(SEEN_H, SEEN_ROWS);
constexpr int SEEN = SEEN_ROWS * SEEN_W, BLOCKS = ceil_div(SEEN, 8), PAIRS = ceil_div(BLOCKS, 2);  // of a band
constexpr int STEPS_OF_BAND = ceil_div(PAIRS, AT_ONCE);  // of pairs that are unrolled together
constexpr int ROUNDED_PAIRS = STEPS_OF_BAND * AT_ONCE;   // those past the last see nothing

// Two columns of a lane's fragment are pixels side by side, the first on an even place.
[[maybe_unused]] constexpr bool SIDE_BY_SIDE = SEEN_W % 2 == 0 && HALO_W % 2 == 0;

constexpr int CHANNELS = GROUP * DEPTH;
constexpr int STEPS = DEPTH * ELEMENT / 32;  // of the matrix units along channels: 32 bytes of them
constexpr int SUMS = DEPTH / 8;              // fragments of a row of results
[[maybe_unused]] constexpr int TILE_PIXELS = TILE_H * TILE_W;
constexpr int BAND_PIXELS = BAND_H * HALO_W;
// Planes of halves are copied row by row, each with all channels; those of floats channel by channel.
constexpr bool ROWS_OF_PLANES = PLANES && ELEMENT == 2;
// Channels of more than 128 bytes are copied one part after the other, for they are swizzled within 128.
constexpr int PARTS = PLANES ? 1 : ceil_div(CHANNELS * ELEMENT, 128), PART_BYTES = CHANNELS * ELEMENT / PARTS;
constexpr int PART_ROOM = ceil_div(BAND_PIXELS * PART_BYTES, 1024) * 1024;  // swizzled copies begin on whole patterns
constexpr int BAND_BYTES = BAND_PIXELS * CHANNELS * ELEMENT, BAND_ROOM = PARTS * PART_ROOM;

constexpr int PIXEL_BYTES = PLANES ? ELEMENT : PART_BYTES;  // from a pixel of a band to the next

static_assert(SUBTILES * SHARED_BY * GROUP % WARPS == 0 && WARPS % (SUBTILES * SHARED_BY) == 0,
              "a warp keeps to one subtile");
static_assert(!WHOLE || SHARED_BY == 1, "warps take turns at bands");
static_assert(WHOLE || (WARP_HEADS == 1 && SUB_H % BAND_H == 0), "bands pass once, and subtiles begin with one");
static_assert(PLANES ? GROUP == 1 : PARTS == 1 || (GROUP == 1 && PART_BYTES == 128),
              "what is swizzled together is a whole pattern, or a whole part of one");

// number / SEEN_W, by a multiplication.
constexpr INLINE int seen_row(int number) { return number * (65536 / SEEN_W + 1) >> 16; }
constexpr bool rows_are_right() {
  for (int number = 0; number < SEEN; number++)
    if (seen_row(number) != number / SEEN_W) return false;
  return true;
}
static_assert(rows_are_right(), "a row is found by a multiplication");

struct Lane {
  int thread, lane, warp, group, member;  // fragments: rows `group` and `group + 8`, columns 2 * `member` and the next
  int sub_y, sub_x, first_head;           // the subtile's first pixel in the tile, and the warp's first head
  int share;                              // number of the warp among the SHARED_BY that take turns at bands

  INLINE Lane() {
    thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, group = lane >> 2, member = lane & 3;
    const int subtile = warp / SHARED_BY % SUBTILES;
    share = warp % SHARED_BY;
    sub_y = subtile / SUBTILES_X * SUB_H, sub_x = subtile % SUBTILES_X * SUB_W;
    first_head = GROUP == 1 ? 0 : warp / (SUBTILES * SHARED_BY) * WARP_HEADS;
  }

  // The number of a band among those that this subtile sees, which are numbered up to SEEN_BANDS.
  INLINE int seen_band(int band) const { return WHOLE ? 0 : band - sub_y / BAND_H; }

  // Whether this warp takes it.
  INLINE bool takes(int seen_band) const {
    return seen_band >= 0 && seen_band < SEEN_BANDS && (SHARED_BY == 1 || seen_band % SHARED_BY == share);
  }

  // The pixel of a band that this subtile sees as number `seen` of it; numbers past `last` count as it.
  // Rows are ROW pixels apart.
  template <int ROW = HALO_W>
  INLINE int band_pixel(int seen, int last = SEEN - 1) const {
    const int number = 16 * ROUNDED_PAIRS == SEEN ? seen : min(seen, last), y = seen_row(number);
    return ((WHOLE ? sub_y : 0) * ROW + sub_x + SKIP) + number + y * (ROW - SEEN_W);
  }
};

struct Place {
  int heads, height, width;              // of the maps
  int channel, first_head, x, y, image;  // where this program's tile begins

  // Groups of heads lie side by side along the grid's first axis, whose blocks come STRIP by STRIP where these are given.
  INLINE Place(int heads, int height, int width) : heads(heads), height(height), width(width) {
    int column = blockIdx.x, row = blockIdx.y;
    if (STRIP) {
      const int columns = gridDim.x, rows = gridDim.y, block = row * columns + column;
      const int first = block / (max(STRIP, 1) * rows) * STRIP, across = min(STRIP, columns - first);
      row = (block - first * rows) / across, column = first + (block - first * rows) % across;
    }
    const int groups = heads / GROUP, tile_x = column / groups;
    first_head = (column - tile_x * groups) * GROUP;
    channel = first_head * DEPTH, x = tile_x * TILE_W - BEFORE, y = row * TILE_H, image = blockIdx.z;
  }

  // Where the pixel (y, x) of a head of the group lies in floats [B, heads, H, W].
  INLINE long long pixel(int head, int y, int x) const {
    return (((long long)image * heads + first_head + head) * height + y) * width + x;
  }
};

// Where a row of a unit's fragments lies in its subtile.
constexpr INLINE int row_y(int unit, int row) { return unit / UNITS_X * UNIT_H + row / UNIT_W; }
constexpr INLINE int row_x(int unit, int row) { return unit % UNITS_X * UNIT_W + row % UNIT_W; }

// A number of each of a lane's two kept pixels of a unit, those of the rows `group` and `group + 8` of its fragments.
struct Pair {
  float low, high;
};

// These pixels.
struct Rows {
  int y, x;  // of the first
  bool low_there, high_there;

  INLINE Rows(const Place& at, const Lane& l, int unit) {
    y = at.y + l.sub_y + row_y(unit, l.group), x = at.x + l.sub_x + row_x(unit, l.group);
    const bool across = x < at.width && (BEFORE == 0 || x >= 0);
    low_there = across && y < at.height, high_there = across && y + NEXT_ROWS < at.height;
  }
};

template <int N>
INLINE void zero(float (&sum)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
}

template <int N>
INLINE void zero(float (&sums)[UNITS][N][4]) {
#pragma unroll
  for (int unit = 0; unit < UNITS; unit++) zero(sums[unit]);
}

// Which pixels of the halo the kept ones see, where blocks walk. Of several chunks that is worked out as each begins.

constexpr INLINE bool in_window(int distance, int kernel) { return distance >= 0 && distance < kernel; }

// How many of a block's 8 columns are seen by all of the tile's first 8 columns (kept 0) or its last (kept 1), or by any.
constexpr int columns_seen(int block, int kept, bool by_all) {
  int count = 0;
  for (int i = 0; i < 8; i++) {
    int seen = 0;
    for (int column = 0; column < 8; column++)
      seen += in_window((8 * block + i) % SEEN_W - PAD - column - (TILE_W == 8 ? 0 : 8 * kept), KERNEL_W);
    count += by_all ? seen == 8 : seen > 0;
  }
  return count;
}
constexpr bool always(int block, int kept) { return CHUNKS == 1 && columns_seen(block, kept, true) == 8; }
constexpr bool never(int block, int kept) { return CHUNKS == 1 && columns_seen(block, kept, false) == 0; }

// Of a row of the halo, which of a lane's kept pixels see it.
struct RowSeen {
  bool by[2];

  // y: of the row, from that which the tile's first row sees first
  INLINE RowSeen(int y, const Lane& l) {
    by[0] = in_window(y - l.y(0), KERNEL_H), by[1] = in_window(y - l.y(1), KERNEL_H);
  }

  INLINE bool any() const { return by[0] || by[1]; }
  INLINE bool both() const { return TILE_W == 16 || (by[0] && by[1]); }
};

// What is added to logits of a row's columns: minus a number of the kept pixel or, where that does not see the column,
// infinity.
struct Less {
  float numbers[2], columns[2][ROW_BLOCKS][2];

  INLINE Less(float low, float high, int chunk, const Lane& l) : numbers{low, high} {
    for_each([&](int kept, int block, int i) {
      const bool seen = in_window(chunk * HALO_W + 8 * block + 2 * l.member + i - l.first(kept), KERNEL_W);
      columns[kept][block][i] = seen ? -numbers[kept] : -__uint_as_float(0x7F800000);
    });
  }

  INLINE float of(int kept, int block, int i) const {
    return always(block, kept) ? -numbers[kept] : columns[kept][block][i];
  }

  // The same of numbers that are as much larger.
  INLINE void grow(float low, float high) {
    numbers[0] += low, numbers[1] += high;
    for_each([&](int kept, int block, int i) { columns[kept][block][i] -= kept ? high : low; });
  }

  template <typename Do>
  static INLINE void for_each(Do act) {
#pragma unroll
    for (int kept = 0; kept < 2; kept++)
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; block++)
#pragma unroll
        for (int i = 0; i < 2; i++) act(kept, block, i);
  }
};

// Of a row of the halo, a lane's pairs of numbers as products take them; of what is not seen they are 0.
struct RowWords {
  u32 of[ROW_BLOCKS][2] = {};  // of kept pixels

  // Of a row that is seen. pack: gives the pair of a block and a kept pixel, of those that may be seen.
  template <typename Pack>
  INLINE void fill(const RowSeen& seen, Pack pack) {
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; block++)
#pragma unroll
      for (int kept = 0; kept < 2; kept++)
        if (!never(block, kept)) of[block][kept] = pack(block, kept);
    if (seen.both()) return;
#pragma unroll
    for (int kept = 0; kept < 2; kept++)
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; block++) of[block][kept] = seen.by[kept] ? of[block][kept] : 0;
  }

  INLINE void put(Weights& to, int row) const {
#pragma unroll
    for (int kept = 0; kept < 2; kept++)
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; block++) to.word(row * ROW_BLOCKS + block, kept) = of[block][kept];
  }
};

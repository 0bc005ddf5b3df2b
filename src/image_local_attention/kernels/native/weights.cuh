// Weights [B, heads, H, W, WINDOW] of queries and the slots of their windows: which pixels meet in a slot, and the
// weights of a tile of queries in shared memory.

constexpr int WINDOW = KERNEL_H * KERNEL_W;  // slots

// Places of an axis that one pixel meets, in a subtile's view: that of all it sees, whose first pixel is number 0.
struct Met {
  int first, count;

  Met() = default;

  INLINE Met(int first, int count) : first(first), count(count) {}

  // Of these, the ones in a map that ends `size` pixels after its first, where the view begins at `start`.
  INLINE Met in_map(int start, int size) const {
    const int from = max(first, -start);
    return {from, max(min(first + count, size - start) - from, 0)};
  }

  INLINE bool has(int place) const { return u32(place - first) < u32(count); }
};

// What a lane's two kept pixels of a unit meet, those of the rows `group` and `group + 8` of its fragments.
struct PairsOfUnit {
  Met low, high, columns;
};

struct Pairs {
  PairsOfUnit of[UNITS];

  INLINE Pairs(const Lane& l) {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const int y = row_y(unit, l.group), x = row_x(unit, l.group);
      of[unit] = {{y, KERNEL_H}, {y + NEXT_ROWS, KERNEL_H}, {x, KERNEL_W}};
    }
  }

  // Those whose seen pixel lies in the map.
  INLINE Pairs(const Lane& l, const Place& at, const Halos& halos) : Pairs(l) {
    const int y = halos.y + l.sub_y, x = halos.x + PAD + l.sub_x;
#pragma unroll
    for (PairsOfUnit& unit : of)
      unit = {unit.low.in_map(y, at.height), unit.high.in_map(y, at.height), unit.columns.in_map(x, at.width)};
  }

  // Calls `take(unit, block, column, y, x, low_meets, high_meets)` for each column of a lane's part of 16 pixels seen.
  template <typename Take>
  INLINE void for_each_column(int seen_band, int pair, const Lane& l, Take take) const {
#pragma unroll
    for (int block = 0; block < 2; block++) {
      int y, x;
#pragma unroll
      for (int column = 0; column < 2; column++) {
        if (column == 0 || SEEN_W % 2) {
          const int number = 16 * pair + 8 * block + 2 * l.member + column, row = number / SEEN_W;
          x = number - row * SEEN_W + SKIP - PAD;
          y = WHOLE || row < SEEN_ROWS ? seen_band * SEEN_ROWS + row : SEEN_H;  // past a band there are none
        } else {
          x++;
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
          const bool meets = of[unit].columns.has(x);
          take(unit, block, column, y, x, meets && of[unit].low.has(y), meets && of[unit].high.has(y));
        }
      }
    }
  }
};

// The weights of a tile of queries, [GROUP, TILE_H, TILE_W, WINDOW] in shared memory and in rows of the map.
struct WeightTile {
  static constexpr int ROW = TILE_W * WINDOW;  // numbers
  static constexpr int NEXT = NEXT_ROWS * (ROW - KERNEL_W);  // from a key's slot to its slot of the query 8 later
  static_assert(ROW * ELEMENT % 16 == 0, "rows of a tile are copied whole");

  Number* numbers;
  u32 address;
  const Place& at;
  int rows, row;  // of the tile in the map, and numbers of each

  INLINE WeightTile(unsigned char* raw, u32 offset, const Place& at)
      : numbers(reinterpret_cast<Number*>(raw + offset)), address(shared_address(raw + offset)), at(at),
        rows(min(TILE_H, at.height - at.y)), row(min(TILE_W, at.width - at.x) * WINDOW) {}

  // The place of a lane's first kept query of a unit, less what `slot` counts of it.
  INLINE int query(int unit, int head, const Lane& l) const {
    const int y = row_y(unit, l.group), x = row_x(unit, l.group);
    return ((head * TILE_H + l.sub_y + y) * TILE_W + l.sub_x + x) * WINDOW - slot(y, x);
  }

  static INLINE int slot(int y, int x) { return y * KERNEL_W + x; }

  // Whether rows of the map begin on whole vectors, and so those of tiles.
  INLINE bool by_copies() const { return (long long)at.width * WINDOW * ELEMENT % 16 == 0; }

  // Calls `take(number in the tile, number in the map)` of each row, and its head.
  template <typename Take>
  INLINE void for_each_row(Take take) const {
#pragma unroll 1
    for (int i = 0; i < rows * GROUP; i++) {
      const int head = i / rows, y = i - head * rows;
      take((head * TILE_H + y) * ROW, at.pixel(head, at.y + y, at.x) * WINDOW);
    }
  }

  // By one thread, which the barrier still waits for.
  INLINE void copy_in(const Number* from, u32 barrier) const {
    if (!by_copies()) return;
    barrier_expect_more(barrier, rows * GROUP * row * ELEMENT);
    for_each_row([&](int in_tile, long long in_map) {
      copy_row_in(address + in_tile * ELEMENT, from + in_map, row * ELEMENT, barrier);
    });
  }

  // By all threads, before they meet.
  INLINE void load(const Number* from, const Lane& l) const {
    if (by_copies()) return;
    for_each_row([&](int in_tile, long long in_map) {
      for (int i = l.thread; i < row; i += WARPS * 32) numbers[in_tile + i] = from[in_map + i];
    });
  }

  // By all threads, when each has written what is its own.
  INLINE void copy_out(Number* to, const Lane& l) const {
    before_copies();
    __syncthreads();
    if (by_copies()) {
      if (l.thread) return;
      for_each_row([&](int in_tile, long long in_map) {
        copy_row_out(to + in_map, address + in_tile * ELEMENT, row * ELEMENT);
      });
      copies_have_read();
    } else {
      for_each_row([&](int in_tile, long long in_map) {
        for (int i = l.thread; i < row; i += WARPS * 32) to[in_map + i] = numbers[in_tile + i];
      });
    }
  }
};

// Weights [B, heads, H, W, WINDOW] of queries and the slots of their windows: which pixels meet in a slot, and the weights
// of a tile of queries in shared memory.

constexpr int WINDOW = KERNEL_H * KERNEL_W;  // slots

// Places of an axis that one pixel meets, in a subtile's view: that of all it sees, whose first pixel is number 0.
struct Met {
  int first, count;

  INLINE Met(int first, int kernel) : first(first), count(kernel) {}

  // Of these, the ones in a map that ends `size` pixels after its first, where the view begins at `start`.
  INLINE Met in_map(int start, int size) const {
    const int from = max(first, -start);
    return {from, max(min(first + count, size - start) - from, 0)};
  }

  INLINE bool has(int place) const { return u32(place - first) < u32(count); }
};

// A lane's two kept pixels, those of the rows `group` and `group + 8` of its fragments, and what they meet.
struct Pairs {
  int kept_y, kept_x;  // of the first, in the subtile
  Met low, high, columns;

  INLINE Pairs(const Lane& l)
      : kept_y(l.group / SUB_W), kept_x(l.group % SUB_W), low(kept_y, KERNEL_H), high(kept_y + NEXT_ROWS, KERNEL_H),
        columns(kept_x, KERNEL_W) {}

  // Those whose seen pixel lies in the map.
  INLINE Pairs(const Lane& l, const Place& at, const Halos& halos) : Pairs(l) {
    const int y = halos.y + l.sub_y, x = halos.x + PAD + l.sub_x;
    low = low.in_map(y, at.height), high = high.in_map(y, at.height), columns = columns.in_map(x, at.width);
  }

  // Calls `take(block, column, y, x, low_meets, high_meets)` for each column of a lane's part of 16 pixels seen.
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
        const bool meets = columns.has(x);
        take(block, column, y, x, meets && low.has(y), meets && high.has(y));
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

  // The place of a lane's first kept query, less what `slot` counts of it.
  INLINE int query(int head, const Pairs& pairs, const Lane& l) const {
    const int pixel = (head * TILE_H + l.sub_y + pairs.kept_y) * TILE_W + l.sub_x + pairs.kept_x;
    return pixel * WINDOW - slot(pairs.kept_y, pairs.kept_x);
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

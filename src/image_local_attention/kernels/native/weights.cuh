// Weights [B, heads, H, W, WINDOW] of queries and the slots of their windows: which pixels meet in a slot, and the
// weights of a tile of queries in shared memory.

constexpr int WINDOW = KERNEL_H * KERNEL_W;  // slots

// Which of a lane's numbers are weights: its kept pixels of a unit, those of the rows `group` and `group + 8` of its
// fragments, with its columns of the pairs of blocks that are unrolled together. A bit each, as they lie in fragments.
struct Meeting {
  static constexpr int BITS = 8 * UNITS, PAIRS_OF_WORD = 32 / BITS;  // of a pair
  static constexpr u32 OF_EVERY_UNIT = UNITS == 1 ? 1 : 0x101;

  u32 bits[ceil_div(AT_ONCE, PAIRS_OF_WORD)] = {};

  static constexpr int bit(int number, int unit, int block, int i) {
    return number % PAIRS_OF_WORD * BITS + 8 * unit + 4 * block + i;
  }

  // number: of the pair among those that are unrolled together. i: of a fragment's four.
  INLINE bool has(int number, int unit, int block, int i) const {
    return bits[number / PAIRS_OF_WORD] >> bit(number, unit, block, i) & 1;
  }
};

struct MeetingTable {
  static constexpr int STEPS_OF_ALL = SEEN_BANDS * STEPS_OF_BAND;

  Meeting of[STEPS_OF_ALL + 1][32];  // in the step after the last nobody meets

  constexpr MeetingTable() : of() {
    for (int step = 0; step < STEPS_OF_ALL; step++)
      for (int lane = 0; lane < 32; lane++)
        for (int number = 0; number < AT_ONCE; number++)
          for (int unit = 0; unit < UNITS; unit++)
            for (int n = 0; n < 8; n++) {
              const int block = n / 4, i = n % 4;
              const int seen = 16 * (step % STEPS_OF_BAND * AT_ONCE + number) + 8 * block + lane % 4 * 2 + i % 2;
              const bool met = meets(step / STEPS_OF_BAND, seen, unit, lane / 4 + i / 2 * 8);
              of[step][lane].bits[number / Meeting::PAIRS_OF_WORD] |= u32(met) << Meeting::bit(number, unit, block, i);
            }
  }

  // Whether the pixel seen as number `seen` of a band meets that of a row of a unit's fragments.
  static constexpr bool meets(int band, int seen, int unit, int row) {
    const int y = band * SEEN_ROWS + seen / SEEN_W - row_y(unit, row);
    const int x = seen % SEEN_W + SKIP - PAD - row_x(unit, row);
    return seen < SEEN && y >= 0 && y < KERNEL_H && x >= 0 && x < KERNEL_W;
  }
};

__device__ constexpr MeetingTable meeting_table;

// Of the pairs of a step, of what a subtile sees of a band.
INLINE Meeting meeting_of(int seen_band, int step, const Lane& l) {
  return meeting_table.of[seen_band * STEPS_OF_BAND + step][l.lane];
}

// What a subtile sees, as far as it lies in the map.
struct InMap {
  const Lane& l;
  int y, x, height, width;  // its first pixel; of the map
  bool whole;

  INLINE InMap(const Lane& l, const Place& at, const Halos& halos)
      : l(l), y(halos.y + l.sub_y), x(halos.x + PAD + l.sub_x), height(at.height), width(at.width) {
    whole = y >= 0 && x >= 0 && y + KERNEL_H + SUB_H - 1 <= height && x + KERNEL_W + SUB_W - 1 <= width;
  }

  // Of the pairs of a step, without those whose seen pixel lies outside.
  INLINE Meeting meeting_of(int seen_band, int step) const {
    return there(::meeting_of(seen_band, step, l), seen_band, step);
  }

  // Of those that meet in a step, those whose seen pixel lies in the map.
  INLINE Meeting there(Meeting meeting, int seen_band, int step) const {
    if (whole) return meeting;
#pragma unroll
    for (int number = 0; number < AT_ONCE; number++) {
      u32 outside = 0;
#pragma unroll
      for (int column = 0; column < 4; column++) {
        const int seen = 16 * (step * AT_ONCE + number) + column / 2 * 8 + 2 * l.member + column % 2;
        const int row = seen / SEEN_W, at_y = y + seen_band * SEEN_ROWS + row;
        const int at_x = x + seen - row * SEEN_W + SKIP - PAD;
        const bool there = u32(at_y) < u32(height) && u32(at_x) < u32(width);
        outside |= there ? 0 : 5 * Meeting::OF_EVERY_UNIT << (column / 2 * 4 + column % 2);
      }
      meeting.bits[number / Meeting::PAIRS_OF_WORD] &= ~(outside << Meeting::bit(number, 0, 0, 0));
    }
    return meeting;
  }
};

// Where a lane finds weights of its first kept pixel, by rows ROW and columns NEXT numbers apart, of pairs of a band. Those
// of pairs that repeat are found once.
template <typename Row, int NEXT>
struct WeightPlaces {
  const Lane& l;
  Row row;
  u32 of[PERIOD][2][2];  // bytes, of pairs, blocks and columns

  INLINE WeightPlaces(const Lane& l, Row row) : l(l), row(row) {
#pragma unroll
    for (int i = 0; REPEATS && i < 2 * PERIOD; i++) {
      u32(&columns)[2] = of[i / 2][i % 2];
      columns[0] = held(u32(place(i / 2, i % 2, 0) * ELEMENT));
      columns[1] = SEEN_W % 2 ? held(u32(place(i / 2, i % 2, 1) * ELEMENT)) : columns[0] + NEXT * ELEMENT;
    }
  }

  INLINE Row place(int pair, int block, int column) const {
    const int seen = 16 * pair + 8 * block + 2 * l.member + (SEEN_W % 2 ? column : 0), y = seen / SEEN_W;
    return y * row + (seen - y * SEEN_W + SKIP - PAD) * NEXT + (SEEN_W % 2 ? 0 : column * NEXT);
  }

  // Calls `take(unit, block, i, weight)` for each of a lane's numbers of a pair. i: of a fragment's four. weight: of the
  // column and the first kept pixel. band: where the first pixel of a band has it.
  template <typename N, typename Take>
  INLINE void for_each(N* band, int pair, int number, Take take) const {
    const auto first = reinterpret_cast<const unsigned char*>(band + rows_below(pair, number) * row);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int block = n / 2, column = n % 2;
      N* weight = repeats(number) ? (N*)(first + int(of[number % PERIOD][block][column]))
                                  : band + place(pair, block, column);
#pragma unroll
      for (int unit = 0; unit < UNITS; unit++) take(unit, block, column, weight), take(unit, block, column + 2, weight);
    }
  }
};

// The weights of a tile of queries, [GROUP, TILE_H, TILE_W, WINDOW] in shared memory and in rows of the map.
struct WeightTile {
  static constexpr int ROW = TILE_W * WINDOW;  // numbers
  static_assert(ROW * ELEMENT % 16 == 0, "rows of a tile are copied whole");

  Number* numbers;
  u32 address;
  const Place& at;
  int rows, row;  // of the tile in the map, and numbers of each

  INLINE WeightTile(unsigned char* raw, u32 offset, const Place& at)
      : numbers(reinterpret_cast<Number*>(raw + offset)), address(shared_address(raw + offset)), at(at),
        rows(min(TILE_H, at.height - at.y)), row(min(TILE_W, at.width - at.x) * WINDOW) {}

  // Of the pixels of a view, columns are in slots side by side, and rows in those KERNEL_W later.
  using Places = WeightPlaces<int, 1>;

  // Where a lane's first kept query has the first pixel of what its subtile sees.
  INLINE Number* query(int head, const Lane& l) const {
    return numbers + (head * TILE_H + l.sub_y) * ROW + l.sub_x * WINDOW + later(row_y(0, l.group), row_x(0, l.group));
  }

  // From there to where a query so much later has it.
  static constexpr INLINE int later(int y, int x) { return y * (ROW - KERNEL_W) + x * (WINDOW - 1); }

  // To where that has it which is number `i` of a fragment's four of a unit.
  static constexpr INLINE int later_in_unit(int unit, int i) {
    return later(row_y(unit, 0) + i / 2 * NEXT_ROWS, row_x(unit, 0));
  }

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

// What a block that walks holds, and the warps that copy it: a ring of bands, of two maps of the halo, and tiles of the
// maps whose pixels are kept, which come STAGED maps at once.

constexpr int BAND_ROOM = 2 * BAND_BYTES + ceil_div(BAND_PIXELS * NUMBERS * 4, 1024) * 1024;
constexpr int STAGES = KEPT_MAPS / STAGED;  // of a tile, which come one after the other
// Tiles that come before any band, for bands not to delay the first. Where a tile comes in stages, the thread that copies
// bands would have to wait for readers amid it.
constexpr int FILLED_FIRST = STAGES == 1 ? 1 : 0;
constexpr int TILE_ROOM = ceil_div(KEPT_BYTES, 1024) * 1024, KEPT_ROOM = STAGED * TILE_ROOM;
constexpr int MOVED_ROOM = PRODUCT_MAPS * MOVED_BYTES;  // of a group
constexpr int TILES = SLOTS * BAND_ROOM, MOVED = TILES + KEPT_SLOTS * KEPT_ROOM, BARRIERS = MOVED + GROUPS * MOVED_ROOM;
constexpr int ROOM = BARRIERS + (SLOTS + TURNS * STAGES) * Barriers::BYTES;
static_assert(KEPT_MAPS % STAGED == 0 && (KEPT_SLOTS == 1 || STAGES == 1), "a stage is read before the next comes");

// Of a thread that multiplies, and one that copies: what a block has for all.
constexpr int FEW_REGISTERS = 24;
constexpr int REGISTERS = ((GROUPS + 1) * (512 / (GROUPS + 1) / 8 * 8) - FEW_REGISTERS) / GROUPS / 8 * 8;

struct Block {
  Place at;
  Lane l;
  unsigned char* raw;
  u32 start;
  Barriers bands, stages;

  INLINE Block(int heads, int height, int width, unsigned char* raw)
      : at(heads, height, width), raw(raw), start(shared_start(raw)) {
    bands = {start + BARRIERS}, stages = {bands.first + SLOTS * Barriers::BYTES};
  }

  // Bytes to what is held.
  INLINE u32 band(const Use& use) const { return use.slot * BAND_ROOM; }
  INLINE u32 numbers(const Use& use) const { return band(use) + 2 * BAND_BYTES; }
  INLINE u32 tile(int number, int map) const {
    return TILES + number % KEPT_SLOTS * KEPT_ROOM + map % STAGED * TILE_ROOM;
  }

  // The use of the barriers of the stage in which a tile's map comes.
  INLINE Use stage(int number, int map) const {
    Use use(number, TURNS);
    use.slot = use.slot * STAGES + map / STAGED;
    return use;
  }

  // Addresses of a band's maps, for copies, and of what the group's tiles see of them.
  INLINE u32 whole(const Use& use, int map) const { return start + band(use) + map * BAND_BYTES; }
  INLINE u32 first(const Use& use) const { return whole(use, 0) + l.left * COLUMN_BYTES; }
  INLINE u32 second(const Use& use) const { return first(use) + BAND_BYTES; }

  // Of the halo, where a band begins.
  INLINE int row(int band) const {
    const int set = band / (CHUNKS * SET_BANDS), below = band % SET_BANDS;
    return at.y - SEEN_LEAD_Y + (APART ? set * TURNS * TILE_H + below * BAND_H : band * BAND_H);
  }
  INLINE int column(int band) const {
    return at.x - SEEN_LEAD_X - PAD + (CHUNKS > 1 ? band / SET_BANDS % CHUNKS * HALO_W : 0);
  }

  // By all threads. fillers: arrivals of a band.
  INLINE void init(int fillers) const {
    if (threadIdx.x == 0) {
      bands.init(SLOTS, fillers, GROUPS * GROUP_THREADS), stages.init(TURNS * STAGES, 1, ABREAST * GROUP_THREADS);
      barriers_ready();
    }
    __syncthreads();
  }

  // By one thread: copies all bands.
  INLINE void fill_bands(const TensorMap& a, const TensorMap& b) const {
    Use use(0, SLOTS);
    for (int band = 0; band < at.bands; band++, use.next(SLOTS)) {
      const u32 barrier = bands.full(use);
      bands.wait_for_readers(use);
      barrier_expect(barrier, 2 * BAND_BYTES);
      copy_halo(whole(use, 0), a, barrier, row(band), column(band), at);
      copy_halo(whole(use, 1), b, barrier, row(band), column(band), at);
    }
  }

  // By one thread: copies tiles `from` to `to` of kept maps.
  template <typename... Maps>
  INLINE void fill_tiles(int from, int to, const Maps&... maps) const {
    for (int number = from; number < to; number++) {
      int map = 0;
      (fill_tile(number, map++, maps), ...);
    }
  }

  INLINE void fill_tile(int number, int map, const TensorMap& from) const {
    const u32 barrier = stages.full(stage(number, map));
    if (map % STAGED == 0) {
      if (map > 0)
        wait_for_readers(number, map - 1);
      else if (number >= KEPT_SLOTS)
        wait_for_readers(number - KEPT_SLOTS, KEPT_MAPS - 1);
      before_copies();
      barrier_expect(barrier, STAGED * KEPT_BYTES);
    }
    copy_kept(start + tile(number, map), from, barrier, at.y + number * TILE_H, at);
  }

  INLINE void wait_for_readers(int number, int map) const {
    const Use use = stage(number, map);
    barrier_wait(stages.read(use), use.turn);
  }

  // By the group that has a tile, once all of it have left the last: what products take of a map, moved there.
  INLINE Kept take(int number, int map) const {
    wait_for(number, map);
    const Kept kept(start + MOVED + l.group * MOVED_ROOM + map * MOVED_BYTES, start + tile(number, map), l);
    if (Kept::MOVED) leave(number, map);
    return kept;
  }

  // For a map to have come; and when a thread has read it. The first of a stage is waited for, the last lets go of it.
  INLINE void wait_for(int number, int map) const {
    if (map % STAGED == 0) stages.wait(stage(number, map));
  }
  INLINE void leave(int number, int map) const {
    if ((map + 1) % STAGED == 0) stages.release(stage(number, map));
  }

  // By a thread, once products have taken the last scores of a tile that is not moved.
  INLINE void leave_where_copied(int tile, bool last) const {
    if (!Kept::MOVED && last) leave(tile, KEPT_MAPS - 1);
  }

  // Before and after a tile's maps are moved: until all have seen the last, and until all of this is there.
  INLINE void begin_moving() const {
    if (Kept::MOVED) sync_group(l.group);
  }
  INLINE void end_moving() const {
    if (!Kept::MOVED) return;
    before_copies();
    sync_group(l.group);
  }

  // By a group: waits for bands that it takes no part in.
  INLINE void pass(int from, int to) const {
    for (int band = from; band < to; band++) {
      const Use use(band, SLOTS);
      bands.wait(use);
      bands.release(use);
    }
  }

  // By a group: calls `see(tile, first, next)` for its tiles, every TURNS-th. first: band that a tile sees first; next:
  // that of the group's next tile, or the end of all that it sees.
  template <typename See>
  INLINE void for_each_tile(See see) const {
    if (APART)
      for_each_apart(see);
    else
      for_each_in_turn(see);
  }

  template <typename See>
  INLINE void for_each_apart(See see) const {
#pragma unroll 1
    for (int tile = l.turn, set = 0; set < at.bands; tile += TURNS, set += CHUNKS * SET_BANDS) {
      const bool there = tile < at.tiles;
      const int first = set + TILE_STEP * l.turn, end = first + (CHUNKS - 1) * SET_BANDS + TILE_BANDS;
      pass(set, there ? first : set + CHUNKS * SET_BANDS);
      if (!there) return;
      see(tile, first, end);
      pass(end, set + CHUNKS * SET_BANDS);
    }
  }

  template <typename See>
  INLINE void for_each_in_turn(See see) const {
    pass(0, l.turn < at.tiles ? TILE_STEP * l.turn : at.bands);
#pragma unroll 1
    for (int tile = l.turn; tile < at.tiles; tile += TURNS) {
      const int first = TILE_STEP * tile, next = tile + TURNS < at.tiles ? first + TILE_STEP * TURNS : at.bands;
      see(tile, first, next);
      pass(first + TILE_BANDS, next);
    }
  }
};

// The bands that a tile sees, for the group that has it: one after the other, by number, of each chunk.
struct SeenBands {
  const Block& block;
  const Barriers& bands;
  int first;
  Use now, before;
  int chunk = 0, number = 0, released;  // so many of them the group's next tile does not see again

  // first, next: that the tile and the next one see first
  INLINE SeenBands(const Block& block, int first, int next)
      : block(block), bands(block.bands), first(first), now(first, SLOTS), before(now), released(next - first) {}

  // Goes on to the next chunk, once all bands of the last are released.
  INLINE void begin(int chunk) {
    if (chunk == 0) return;
    const int seen = first + (chunk - 1) * SET_BANDS + TILE_BANDS, next = first + chunk * SET_BANDS;
    block.pass(seen, next);
    this->chunk = chunk, number = 0, now = Use(next, SLOTS);
  }

  INLINE bool left() const { return number < TILE_BANDS; }
  INLINE bool begun() const { return number > 0 || chunk > 0; }
  INLINE bool last() const { return number == TILE_BANDS - 1 && chunk == CHUNKS - 1; }
  INLINE int y() const { return number * BAND_H; }  // of its first row, from the first that the tile sees
  INLINE void wait() const { bands.wait(now); }
  INLINE void step() { before = now, now.next(SLOTS), number++; }

  // Of the band before, once products with it have ended.
  INLINE void release_last() const {
    if (number > 0 && number - 1 < released) bands.release(before);
  }
};

// What the threads of a block do: those of the last group copy, others multiply. a, b: maps whose bands pass. kept: those
// whose tiles are kept. early: whether all these are there before earlier launches end. aid: what other warps of the copying
// group do.
template <typename Aid, typename Walk, typename... Maps>
INLINE void divide(const Block& block, bool early, Aid aid, Walk walk, const TensorMap& a, const TensorMap& b,
                   const Maps&... kept) {
  const Lane& l = block.l;
  if (l.group == GROUPS) {
    fewer_registers<FEW_REGISTERS>();
    if (l.warp > 1) aid();
    if (!early) wait_for_launches();
    if (l.thread == 0) {
      block.fill_tiles(0, FILLED_FIRST, kept...);
      block.fill_bands(a, b);
    }
    if (l.thread == 32) block.fill_tiles(FILLED_FIRST, block.at.tiles, kept...);
    __syncwarp();
    wait_for_launches();
    next_may_begin();
  } else {
    more_registers<REGISTERS>();
    wait_for_launches();
    next_may_begin();
    walk();
  }
}

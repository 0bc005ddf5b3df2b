// dK = scale * sum dS q and dV = sum P g over the queries that see each key, dS = P * (dP - delta), as in
// `grad_key_value.cu`, of blocks that walk: tiles are of keys, bands of queries and of gradients.

struct Arguments {
  TensorMap query, key, value, grad_out;
  StridedMap<Number> grad_key, grad_value;
  const float *lse, *delta;  // [B, heads, H, W]; lse is natural
  int height, width, heads;
  float factor, scale;  // of products, to logits in powers of two: the first is positive
  u32 flip;             // not 0 where the scale is negative
  u32 after_grad_query;  // whether that was launched last, over the same maps: all but delta is there
};

constexpr int GROUPS = 2;
// Of a band: two warps write numbers, and one thread has maps copied.
constexpr int FILLERS = 2 * 32 + 1, READERS = GROUPS * GROUP_THREADS;
static_assert(TILE_BANDS <= SLOTS + 2 * GROUPS, "a tile's last band comes while those are held that the next sees again");
static_assert(HALO_W <= 32, "a lane has a column of numbers");
constexpr int NUMBERS_BYTES = BAND_PIXELS * 4;  // a float of each query
constexpr int BAND_ROOM = 2 * BAND_BYTES + ceil_div(2 * NUMBERS_BYTES, 1024) * 1024, KEPT_ROOM = 2 * TILE_BYTES;
constexpr int ROOM = SLOTS * BAND_ROOM + GROUPS * KEPT_ROOM + (SLOTS + GROUPS) * Barriers::BYTES;

struct Block {
  const Arguments& a;
  Place at;
  Lane l;
  unsigned char* raw;
  u32 start;
  Barriers bands, kept;

  INLINE Block(const Arguments& a, unsigned char* raw)
      : a(a), at(a.heads, a.height, a.width), raw(raw), start(shared_start(raw)) {
    bands = {start + SLOTS * BAND_ROOM + GROUPS * KEPT_ROOM}, kept = {bands.first + SLOTS * Barriers::BYTES};
  }

  INLINE u32 queries(const Use& band) const { return start + band.slot * BAND_ROOM; }
  INLINE u32 grads(const Use& band) const { return queries(band) + BAND_BYTES; }
  // Log-sum-exp in powers of two, and delta.
  INLINE u32 lse(const Use& band) const { return queries(band) + 2 * BAND_BYTES; }
  INLINE u32 delta(const Use& band) const { return lse(band) + NUMBERS_BYTES; }
  INLINE u32 keys(const Use& tile) const { return start + SLOTS * BAND_ROOM + tile.slot * KEPT_ROOM; }
  INLINE u32 values(const Use& tile) const { return keys(tile) + TILE_BYTES; }

  INLINE int row(int band) const { return at.y - (KERNEL_H - 1 - LEAD_Y) + band * BAND_H; }
  INLINE int column() const { return at.x - (KERNEL_W - 1 - LEAD_X); }

  // By one thread: copies queries and gradients of all bands.
  INLINE void fill_maps() const {
    if (!a.after_grad_query) wait_for_launches();
    Use use(0, SLOTS);
    for (int band = 0; band < at.bands; band++, use.next(SLOTS)) {
      const u32 barrier = bands.full(use);
      bands.wait_for_readers(use);
      barrier_expect(barrier, 2 * BAND_BYTES);
      copy_box_in(queries(use), a.query, barrier, at.head * 64, column(), row(band), at.image);
      copy_box_in(grads(use), a.grad_out, barrier, at.head * 64, column(), row(band), at.image);
    }
  }

  // By one thread: copies keys and values of all tiles.
  INLINE void fill_kept() const {
    if (!a.after_grad_query) wait_for_launches();
    Use use(0, GROUPS);
    for (int tile = 0; tile < at.tiles; tile++, use.next(GROUPS)) {
      const u32 barrier = kept.full(use);
      const int y = at.y + tile * SIDE;
      kept.wait_for_readers(use);
      barrier_expect(barrier, KEPT_ROOM);
      copy_box_in(keys(use), a.key, barrier, at.head * 64, at.x, y, at.image);
      copy_box_in(values(use), a.value, barrier, at.head * 64, at.x, y, at.image);
    }
  }

  // By a warp: what queries of two rows of each band have, half 0 or 1. Those outside of the map have no weight.
  INLINE void fill_numbers(int half) const {
    wait_for_launches();
    const int x = column() + l.lane;
    Use use(0, SLOTS);
    for (int band = 0; band < at.bands; band++, use.next(SLOTS)) {
      float lse[2], delta[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int y = row(band) + 2 * half + i;
        lse[i] = __uint_as_float(0x7F800000), delta[i] = 0.0f;
        if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
          const long long from = at.pixel(y, x);
          lse[i] = a.lse[from] * LOG2E, delta[i] = a.delta[from];
        }
      }
      bands.wait_for_readers(use);
      float* to = reinterpret_cast<float*>(raw + (this->lse(use) - start)) + 2 * half * HALO_W + l.lane;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (l.lane < HALO_W) to[i * HALO_W] = lse[i], to[BAND_PIXELS + i * HALO_W] = delta[i];
      barrier_arrive(bands.full(use));
    }
  }

  // By the group that copies.
  INLINE void fill() const {
    if (l.warp == 0 && l.lane == 0) fill_maps();
    if (l.warp == 1 && l.lane == 0) fill_kept();
    if (l.warp > 1) fill_numbers(l.warp - 2);
    __syncwarp();
    wait_for_launches();
    next_may_begin();
  }
};

// Products' first operands: what 64 kept pixels have for 16 of a band.
struct Weights {
  u32 of[BLOCKS / 2][4];

  INLINE u32& word(int block, int kept) { return of[block / 2][block % 2 * 2 + kept]; }
};

// Calls `change(block, of)` for the blocks of those two rows of a band that the warp's pixels see any of. of: floats of
// the lane's two columns. numbers: address of the band's. y: the band's first row, from the first that the tile sees.
template <typename Change>
INLINE void for_each_seen_block(u32 numbers, int y, const Lane& l, Change change) {
#pragma unroll
  for (int pair = 0; pair < 2; pair++)
    if (SeenRows(y + 2 * pair, l).any()) {
#pragma unroll
      for (int half = 0; half < HALF_BLOCKS; half++) {
        const int block = pair * HALF_BLOCKS + half;
        u32 words[2];
        load(words, numbers + (8 * block + 2 * l.member) * 4);
        const float of[2] = {__uint_as_float(words[0]), __uint_as_float(words[1])};
        change(block, of);
      }
    }
}

// s = 2^(s * factor - lse)
INLINE void make_weights(float (&s)[4 * BLOCKS], u32 lse, int y, float factor, const Lane& l) {
  for_each_seen_block(lse, y, l, [&](int block, const float (&of)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[4 * block + i] = exp2_of(fmaf(s[4 * block + i], factor, -of[i % 2]));
  });
}

// d = p * (d - delta)
INLINE void make_grads(float (&d)[4 * BLOCKS], const float (&p)[4 * BLOCKS], u32 delta, int y, const Lane& l) {
  for_each_seen_block(delta, y, l, [&](int block, const float (&of)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) d[4 * block + i] = p[4 * block + i] * (d[4 * block + i] - of[i % 2]);
  });
}

// Numbers that are not seen are 0.
INLINE void pack_seen(Weights& to, const float (&x)[4 * BLOCKS], int y, const Seen& seen, const Lane& l) {
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    const SeenRows rows(y + 2 * pair, l);
#pragma unroll
    for (int half = 0; half < HALF_BLOCKS; half++)
#pragma unroll
      for (int kept = 0; kept < 2; kept++) {
        const int block = pair * HALF_BLOCKS + half, first = 4 * block + 2 * kept;
        const u32 mask = seen.of(half, rows.of[kept][0], rows.of[kept][1]);
        to.word(block, kept) = pack_halves<BF16>(x[first], x[first + 1]) & mask;
      }
  }
}

// sums += weights^T rows
INLINE void add_weighted(float (&sums)[32], const Weights& weights, u32 rows, bool more) {
  const SharedRows first(rows);
#pragma unroll
  for (int i = 0; i < BLOCKS / 2; i++)
    multiply_held(sums, weights.of[i], first.later(i * 16 * PIXEL_BYTES), more || i > 0);
}

// scores = kept pixels' products with those of a band
INLINE void make_scores(float (&scores)[4 * BLOCKS], u32 kept, u32 band) {
  const SharedRows a(kept), b(band);
#pragma unroll
  for (int step = 0; step < 4; step++) multiply_shared(scores, a.later(32 * step), b.later(32 * step), step > 0);
}

// What a group does: every GROUPS-th tile.
INLINE void walk(const Block& block) {
  const Lane& l = block.l;
  const Place& at = block.at;
  const Barriers &bands = block.bands, &kept = block.kept;
  const float factor = __uint_as_float(held(__float_as_uint(block.a.flip ? -block.a.factor : block.a.factor)));
  const auto pass = [&](int from, int to) {
    for (int band = from; band < to; band++) {
      const Use use(band, SLOTS);
      bands.wait(use);
      bands.release(use);
    }
  };
  const Seen seen(l);
  float s[4 * BLOCKS], d[4 * BLOCKS], grad_key[32], grad_value[32];
  Weights p, ds;
  pass(0, l.group < at.tiles ? 2 * l.group : at.bands);
#pragma unroll 1
  for (int tile = l.group; tile < at.tiles; tile += GROUPS) {
    const int first = 2 * tile, next = tile + GROUPS < at.tiles ? first + 2 * GROUPS : at.bands;
    const Use of_tile(tile, GROUPS);
    Use band(first, SLOTS), before = band;
    kept.wait(of_tile);
#pragma unroll 1
    for (int number = 0; number < TILE_BANDS; number++) {
      const int y = number * BAND_H;
      bands.wait(band);
      begin_products();
      make_scores(s, block.keys(of_tile), block.queries(band));
      end_products();
      make_scores(d, block.values(of_tile), block.grads(band));
      end_products();
      wait_for_products<1>();
      written(s), written(grad_key);
      if (number > 0 && first + number - 1 < next) bands.release(before);
      make_weights(s, block.lse(band), y, factor, l);
      wait_for_products<0>();
      written(d);
      if (number == TILE_BANDS - 1) kept.release(of_tile);
      pack_seen(p, s, y, seen, l);
      written(grad_value);
      begin_products();
      add_weighted(grad_value, p, block.grads(band), number > 0);
      end_products();
      make_grads(d, s, block.delta(band), y, l);
      wait_for_products<0>();
      written(grad_value);
      pack_seen(ds, d, y, seen, l);
      written(grad_key);
      begin_products();
      add_weighted(grad_key, ds, block.queries(band), number > 0);
      end_products();
      before = band;
      band.next(SLOTS);
    }
    wait_for_products<0>();
    written(grad_key);
    if (first + TILE_BANDS - 1 < next) bands.release(before);
    store(block.a.grad_key, grad_key, block.a.scale, at, at.y + tile * SIDE, l);
    store(block.a.grad_value, grad_value, 1.0f, at, at.y + tile * SIDE, l);
    pass(first + TILE_BANDS, next);
  }
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP_THREADS, 1)
    walk_grad_key_value(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const Block block(a, raw);
  if (threadIdx.x == 0) {
    block.bands.init(SLOTS, FILLERS, READERS), block.kept.init(GROUPS, 1, GROUP_THREADS);
    barriers_ready();
  }
  __syncthreads();
  if (block.l.group == GROUPS) {
    fewer_registers<24>();
    block.fill();
  } else {
    more_registers<240>();
    wait_for_launches();
    next_may_begin();
    walk(block);
  }
}

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

// Of a band: two warps write numbers, and one thread has maps copied.
constexpr int FILLERS = 2 * 32 + 1, NUMBERS_BYTES = BAND_PIXELS * 4;
static_assert(BAND_H % 2 == 0, "a warp has half of a band's rows");

// By a warp: what queries of half of each band's rows have, half 0 or 1: the log-sum-exp in powers of two and, of all
// queries behind it, delta. Those outside of the map have no weight.
INLINE void fill_numbers(const Block& block, const Arguments& a, int half) {
  constexpr int ROWS = BAND_H / 2, TIMES = ceil_div(HALO_W, 32);  // a lane has a column, or one of each 32
  const Place& at = block.at;
  const Lane& l = block.l;
  wait_for_launches();
  Use use(0, SLOTS);
  for (int band = 0; band < at.bands; band++, use.next(SLOTS)) {
    float lse[ROWS][TIMES], delta[ROWS][TIMES];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int j = 0; j < TIMES; j++) {
        const int y = block.row(band) + ROWS * half + i, x = block.column() + l.lane + 32 * j;
        lse[i][j] = __uint_as_float(0x7F800000), delta[i][j] = 0.0f;
        if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
          const long long from = at.pixel(y, x);
          lse[i][j] = a.lse[from] * LOG2E, delta[i][j] = a.delta[from];
        }
      }
    block.bands.wait_for_readers(use);
    float* to = reinterpret_cast<float*>(block.raw + block.numbers(use)) + ROWS * half * HALO_W + l.lane;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int j = 0; j < TIMES; j++) {
        const int n = i * HALO_W + 32 * j;
        if (l.lane + 32 * j < HALO_W) to[n] = lse[i][j], to[BAND_PIXELS + n] = delta[i][j];
      }
    barrier_arrive(block.bands.full(use));
  }
}

// Which of a lane's pairs of pixels side by side are seen, as bits of two halves: of the blocks of two rows of a band.
// Where a row ends amid a block, members 0 and 1 have its end, others the next row's begin.
struct Seen {
  u32 columns[TILE_W / 8][HALF_BLOCKS];
  bool at_end;

  INLINE Seen(const Lane& l) : at_end(l.member < 2) {
#pragma unroll
    for (int kept = 0; kept < TILE_W / 8; kept++)
#pragma unroll
      for (int block = 0; block < HALF_BLOCKS; block++) {
        const int x = (8 * block + 2 * l.member) % SEEN_W - l.x(kept);
        const u32 seen = (in_window(x, KERNEL_W) ? 0xFFFF : 0) | (in_window(x + 1, KERNEL_W) ? 0xFFFF0000 : 0);
        columns[kept][block] = always(block, kept) ? seen : held(seen);
      }
  }

  // first, second: all bits or none, for the rows
  INLINE u32 of(int block, int kept, u32 first, u32 second) const {
    const u32 row = 8 * block + 8 <= SEEN_W ? first : 8 * block >= SEEN_W ? second : at_end ? first : second;
    return always(block, kept) ? row : columns[kept * (TILE_W / 8 - 1)][block] & row;
  }
};

// Which rows of the halo the warp's pixels see, of two rows of a band and the two of the tile: all bits or none.
struct SeenRows {
  u32 of[2][2];  // of kept pixels, of the halo's

  // y: of the first of the halo's rows, from that which the tile's first row sees first
  INLINE SeenRows(int y, const Lane& l) {
#pragma unroll
    for (int kept = 0; kept < 2; kept++)
#pragma unroll
      for (int row = 0; row < 2; row++) of[kept][row] = in_window(y + row - l.y(kept), KERNEL_H) ? ~0u : 0;
  }

  INLINE bool any() const { return of[0][0] | of[0][1] | of[1][0] | of[1][1]; }
};

// Calls `change(block, of)` for the blocks of those two rows of a band that the warp's pixels see any of. of: floats of
// the lane's two columns. numbers: address of the band's. y: the band's first row, from the first that the tile sees.
template <typename Change>
INLINE void for_each_seen_block(u32 numbers, int y, const Lane& l, Change change) {
#pragma unroll
  for (int pair = 0; pair < BAND_H / 2; pair++)
    if (SeenRows(y + 2 * pair, l).any()) {
#pragma unroll
      for (int half = 0; half < HALF_BLOCKS; half++) {
        const int block = pair * HALF_BLOCKS + half, unseen = 8 * half / SEEN_W * (HALO_W - SEEN_W);
        u32 words[2];
        load(words, numbers + (2 * pair * HALO_W + 8 * half + unseen + l.left + 2 * l.member) * 4);
        const float of[2] = {__uint_as_float(words[0]), __uint_as_float(words[1])};
        change(block, of);
      }
    }
}

// s = 2^(s * factor - lse)
INLINE void make_weights(float (&s)[SCORES], u32 lse, int y, float factor, const Lane& l) {
  for_each_seen_block(lse, y, l, [&](int block, const float (&of)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[4 * block + i] = exp2_of(fmaf(s[4 * block + i], factor, -of[i % 2]));
  });
}

// d = p * (d - delta)
INLINE void make_grads(float (&d)[SCORES], const float (&p)[SCORES], u32 delta, int y, const Lane& l) {
  for_each_seen_block(delta, y, l, [&](int block, const float (&of)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) d[4 * block + i] = p[4 * block + i] * (d[4 * block + i] - of[i % 2]);
  });
}

// Numbers that are not seen are 0.
INLINE void pack_seen(Weights& to, const float (&x)[SCORES], int y, const Seen& seen, const Lane& l) {
#pragma unroll
  for (int pair = 0; pair < BAND_H / 2; pair++) {
    const SeenRows rows(y + 2 * pair, l);
#pragma unroll
    for (int half = 0; half < HALF_BLOCKS; half++)
#pragma unroll
      for (int kept = 0; kept < 2; kept++) {
        const int block = pair * HALF_BLOCKS + half, first = 4 * block + 2 * kept;
        const u32 mask = seen.of(half, kept, rows.of[kept][0], rows.of[kept][1]);
        to.word(block, kept) = pack_halves<BF16>(x[first], x[first + 1]) & mask;
      }
  }
}

// What a group does.
INLINE void walk(const Block& block, const Arguments& a) {
  const Lane& l = block.l;
  const Place at = block.at.of(l);
  const Barriers& bands = block.bands;
  const float factor = __uint_as_float(held(__float_as_uint(a.flip ? -a.factor : a.factor)));
  const Seen seen(l);
  block.for_each_tile([&](int tile, int first, int next) {
    const Use of_tile(tile, TURNS);
    Use band(first, SLOTS), before = band;
    float s[SCORES], d[SCORES], grad_key[SUMS], grad_value[SUMS];
    Weights p, ds;
    block.tiles.wait(of_tile);
    block.begin_moving();
    const Kept keys = block.kept(tile, 0), values = block.kept(tile, 1);
    block.end_moving(of_tile);
#pragma unroll 1
    for (int number = 0; number < TILE_BANDS; number++) {
      const int y = number * BAND_H;
      const u32 lse = block.start + block.numbers(band);
      bands.wait(band);
      begin_products();
      make_scores(s, keys, block.first(band));
      end_products();
      make_scores(d, values, block.second(band));
      end_products();
      wait_for_products<1>();
      written(s), written(grad_key);
      if (number > 0 && first + number - 1 < next) bands.release(before);
      make_weights(s, lse, y, factor, l);
      wait_for_products<0>();
      written(d);
      if (!Kept::MOVED && number == TILE_BANDS - 1) block.tiles.release(of_tile);
      pack_seen(p, s, y, seen, l);
      written(grad_value);
      begin_products();
      add_weighted(grad_value, p, block.second(band), number > 0);
      end_products();
      make_grads(d, s, lse + NUMBERS_BYTES, y, l);
      wait_for_products<0>();
      written(grad_value);
      pack_seen(ds, d, y, seen, l);
      written(grad_key);
      begin_products();
      add_weighted(grad_key, ds, block.first(band), number > 0);
      end_products();
      before = band;
      band.next(SLOTS);
    }
    wait_for_products<0>();
    written(grad_key);
    if (first + TILE_BANDS - 1 < next) bands.release(before);
    store(a.grad_key, grad_key, a.scale, a.scale, at, at.y + tile * TILE_H, l);
    store(a.grad_value, grad_value, 1.0f, 1.0f, at, at.y + tile * TILE_H, l);
  });
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP_THREADS, 1)
    walk_grad_key_value(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const Block block(a.heads, a.height, a.width, raw);
  const Lane& l = block.l;
  block.init(FILLERS);
  divide(
      l,
      [&] {
        if (l.warp > 1) fill_numbers(block, a, l.warp - 2);
        if (!a.after_grad_query) wait_for_launches();
        if (l.thread == 0) block.fill_bands(a.query, a.grad_out);
        if (block.l.thread == 32) block.fill_tiles(a.key, a.value);
      },
      [&] { walk(block, a); });
}

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
constexpr int NUMBER_WARPS = 2, FILLERS = NUMBER_WARPS * 32 + 1, NUMBERS_BYTES = BAND_PIXELS * 4;

// By one of these warps: what every other 32 queries of each band have, the log-sum-exp in powers of two and, of all
// behind it, delta. Those outside of the map have no weight.
INLINE void fill_numbers(const Block& block, const Arguments& a, int warp) {
  constexpr int AT_ONCE = NUMBER_WARPS * 32, TIMES = ceil_div(BAND_PIXELS, AT_ONCE);
  const Place& at = block.at;
  const int first = 32 * warp + block.l.lane;
  wait_for_launches();
  Use use(0, SLOTS);
  for (int band = 0; band < at.bands; band++, use.next(SLOTS)) {
    float lse[TIMES], delta[TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
      const int number = first + i * AT_ONCE, row = number / HALO_W;
      const int y = block.row(band) + row, x = block.column(band) + number - row * HALO_W;
      lse[i] = __uint_as_float(0x7F800000), delta[i] = 0.0f;
      if (number < BAND_PIXELS && y >= 0 && y < a.height && x >= 0 && x < a.width) {
        const long long from = at.pixel(y, x);
        lse[i] = a.lse[from] * LOG2E, delta[i] = a.delta[from];
      }
    }
    block.bands.wait_for_readers(use);
    float* to = reinterpret_cast<float*>(block.raw + block.numbers(use)) + first;
#pragma unroll
    for (int i = 0; i < TIMES; i++)
      if (first + i * AT_ONCE < BAND_PIXELS) to[i * AT_ONCE] = lse[i], to[BAND_PIXELS + i * AT_ONCE] = delta[i];
    barrier_arrive(block.bands.full(use));
  }
}

// Rows of a band that are taken together, so that blocks of 8 fill them; and how many those are.
constexpr int UNIT = PLANES ? 1 : 2, UNIT_BLOCKS = UNIT * SEEN_W / 8;
static_assert(BAND_H % UNIT == 0 && UNIT * SEEN_W % 8 == 0, "blocks fill rows");

// Which of a lane's pairs of pixels side by side are seen, as bits of two halves: of the blocks of a unit. Where a row
// ends amid a block, members 0 and 1 have its end, others the next row's begin.
struct Seen {
  u32 columns[TILE_W / 8][UNIT_BLOCKS];
  bool at_end;

  INLINE Seen(int chunk, const Lane& l) : at_end(l.member < 2) {
#pragma unroll
    for (int kept = 0; kept < TILE_W / 8; kept++)
#pragma unroll
      for (int block = 0; block < UNIT_BLOCKS; block++) {
        const int x = chunk * HALO_W + (8 * block + 2 * l.member) % SEEN_W - l.first(kept);
        const u32 seen = (in_window(x, KERNEL_W) ? 0xFFFF : 0) | (in_window(x + 1, KERNEL_W) ? 0xFFFF0000 : 0);
        columns[kept][block] = always(block, kept) || never(block, kept) ? seen : held(seen);
      }
  }

  // rows: all bits or none
  INLINE u32 of(int block, int kept, const u32 (&rows)[UNIT]) const {
    const u32 row = 8 * block + 8 <= SEEN_W ? rows[0] : 8 * block >= SEEN_W || !at_end ? rows[UNIT - 1] : rows[0];
    return always(block, kept) ? row : never(block, kept) ? 0 : columns[kept * (TILE_W / 8 - 1)][block] & row;
  }
};

// Which rows of a unit the warp's pixels see, of the two of the tile: all bits or none.
struct SeenRows {
  u32 of[2][UNIT];  // of kept pixels

  // y: of the unit's first row, from that which the tile's first row sees first
  INLINE SeenRows(int y, const Lane& l) {
#pragma unroll
    for (int kept = 0; kept < 2; kept++)
#pragma unroll
      for (int row = 0; row < UNIT; row++) of[kept][row] = in_window(y + row - l.y(kept), KERNEL_H) ? ~0u : 0;
  }

  INLINE bool any() const {
    u32 seen = 0;
#pragma unroll
    for (int row = 0; row < UNIT; row++) seen |= of[0][row] | of[1][row];
    return seen;
  }
};

// Calls `change(number, of)` for a lane's numbers of a band in units that the warp's pixels see any of. of: the float of
// the number's column. numbers: address of the band's. y: the band's first row, from the first that the tile sees.
template <typename Change>
INLINE void for_each_seen(u32 numbers, int y, const Lane& l, Change change) {
#pragma unroll
  for (int unit = 0; unit < BAND_H / UNIT; unit++)
    if (SeenRows(y + UNIT * unit, l).any()) {
#pragma unroll
      for (int block = 0; block < UNIT_BLOCKS; block++) {
        if (never(block, 0) && never(block, 1)) continue;
        u32 of[2];
        load(of, numbers + (UNIT * unit * HALO_W + 8 * block + l.left + 2 * l.member) * 4);
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (!never(block, i / 2)) change(4 * (unit * UNIT_BLOCKS + block) + i, __uint_as_float(of[i % 2]));
      }
    }
}

// s = 2^(s * factor - lse)
INLINE void make_weights(float (&s)[SCORES], u32 lse, int y, float factor, const Lane& l) {
  for_each_seen(lse, y, l, [&](int i, float of) { s[i] = exp2_of(fmaf(s[i], factor, -of)); });
}

// d = p * (d - delta)
INLINE void make_grads(float (&d)[SCORES], const float (&p)[SCORES], u32 delta, int y, const Lane& l) {
  for_each_seen(delta, y, l, [&](int i, float of) { d[i] = p[i] * (d[i] - of); });
}

// Numbers that are not seen are 0.
INLINE void pack_seen(Weights& to, const float (&x)[SCORES], int y, const Seen& seen, const Lane& l) {
#pragma unroll
  for (int unit = 0; unit < BAND_H / UNIT; unit++) {
    const SeenRows rows(y + UNIT * unit, l);
#pragma unroll
    for (int block = 0; block < UNIT_BLOCKS; block++)
#pragma unroll
      for (int kept = 0; kept < 2; kept++) {
        const int number = unit * UNIT_BLOCKS + block, first = 4 * number + 2 * kept;
        to.word(number, kept) = pack_halves<BF16>(x[first], x[first + 1]) & seen.of(block, kept, rows.of[kept]);
      }
  }
}

// What a group does.
INLINE void walk(const Block& block, const Arguments& a) {
  const Lane& l = block.l;
  const Place at = block.at.of(l);
  const float factor = __uint_as_float(held(__float_as_uint(a.flip ? -a.factor : a.factor)));
  Seen seen(0, l);
  block.for_each_tile([&](int tile, int first, int next) {
    SeenBands bands(block, first, next);
    float s[SCORES], d[SCORES], grad_key[SUMS], grad_value[SUMS];
    Weights p, ds;
    block.begin_moving();
    const Kept keys = block.take(tile, 0), values = block.take(tile, 1);
    block.end_moving();
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      if (CHUNKS > 1) seen = Seen(chunk, l);
      bands.begin(chunk);
#pragma unroll 1
      for (; bands.left(); bands.step()) {
        const int y = bands.y();
        const u32 lse = block.start + block.numbers(bands.now);
        bands.wait();
        begin_products();
        make_scores(s, keys, block.first(bands.now));
        end_products();
        make_scores(d, values, block.second(bands.now));
        end_products();
        wait_for_products<1>();
        written(s), written(grad_key);
        bands.release_last();
        make_weights(s, lse, y, factor, l);
        wait_for_products<0>();
        written(d);
        block.leave_where_copied(tile, bands.last());
        pack_seen(p, s, y, seen, l);
        written(grad_value);
        begin_products();
        add_weighted(grad_value, p, block.second(bands.now), bands.begun());
        end_products();
        make_grads(d, s, lse + NUMBERS_BYTES, y, l);
        wait_for_products<0>();
        written(grad_value);
        pack_seen(ds, d, y, seen, l);
        written(grad_key);
        begin_products();
        add_weighted(grad_key, ds, block.first(bands.now), bands.begun());
        end_products();
      }
      wait_for_products<0>();
      written(grad_key);
      bands.release_last();
    }
    keys.store_sums(a.grad_key, grad_key, a.scale, a.scale, at, at.y + tile * TILE_H, l);
    values.store_sums(a.grad_value, grad_value, 1.0f, 1.0f, at, at.y + tile * TILE_H, l);
  });
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP_THREADS, 1)
    walk_grad_key_value(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const Block block(a.heads, a.height, a.width, raw);
  block.init(FILLERS);
  const auto fill = [&] { fill_numbers(block, a, block.l.warp - NUMBER_WARPS); };
  divide(block, a.after_grad_query, fill, [&] { walk(block, a); }, a.query, a.grad_out, a.key, a.value);
}

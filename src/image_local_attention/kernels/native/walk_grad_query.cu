// dQ = scale * sum dS k over the keys of each query's window, dS = P * (dP - delta), delta = sum(dO * O) - dlse, of blocks
// that walk: tiles are of queries and of gradients, bands of keys and values.

struct Arguments {
  TensorMap query, key, value, grad_out, out;
  StridedMap<Number> grad_query;
  const float *lse, *grad_lse;  // [B, heads, H, W]; lse is natural, there may be no grad_lse
  float* delta;
  int height, width, heads;
  float factor, scale;  // of products, to logits in powers of two: the first is positive
  u32 flip;             // not 0 where the scale is negative
};

// What the lane's pixels have: the log-sum-exp, infinite outside of the map, and delta, which is also written.
struct Numbers {
  float lse[2], delta[2];

  // products: of a pixel's gradient and output
  INLINE Numbers(const float (&products)[2], const Arguments& a, const Place& at, int y, const Lane& l) {
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const int row = y + l.y(kept), x = at.x + l.x(kept);
      lse[kept] = __uint_as_float(0x7F800000), delta[kept] = 0.0f;
      if (!at.has(row, x)) continue;
      const long long pixel = at.pixel(row, x);
      lse[kept] = a.lse[pixel] * LOG2E;
      delta[kept] = products[kept] - (a.grad_lse ? a.grad_lse[pixel] : 0.0f);
      if (l.member == 0) a.delta[pixel] = delta[kept];
    }
  }
};

// s = 2^(s * factor - lse), of rows of a band that are seen. y: the band's first row, from the first that the tile sees.
INLINE void make_weights(float (&s)[SCORES], const Less& less, int y, float factor, const Lane& l) {
#pragma unroll
  for (int row = 0; row < BAND_H; row++) {
    if (!RowSeen(y + row, l).any()) continue;
    Less::for_each([&](int kept, int block, int i) {
      float& score = s[4 * (row * ROW_BLOCKS + block) + 2 * kept + i];
      if (!never(block, kept)) score = exp2_of(fmaf(score, factor, less.of(kept, block, i)));
    });
  }
}

// d = p * (d - delta), gradients of logits, of rows of a band that are seen.
INLINE void make_grads(float (&d)[SCORES], const float (&p)[SCORES], const float (&delta)[2], int y, const Lane& l) {
#pragma unroll
  for (int row = 0; row < BAND_H; row++) {
    if (!RowSeen(y + row, l).any()) continue;
    Less::for_each([&](int kept, int block, int i) {
      const int number = 4 * (row * ROW_BLOCKS + block) + 2 * kept + i;
      if (!never(block, kept)) d[number] = p[number] * (d[number] - delta[kept]);
    });
  }
}

// A band's numbers as products take them. y: its first row, from the first that the tile sees.
INLINE void pack_seen(Weights& to, const float (&x)[SCORES], int y, const Lane& l) {
#pragma unroll
  for (int row = 0; row < BAND_H; row++) {
    const RowSeen seen(y + row, l);
    RowWords words;
    if (seen.any())
      words.fill(seen, [&](int block, int kept) {
        const int first = 4 * (row * ROW_BLOCKS + block) + 2 * kept;
        return pack_halves<BF16>(x[first], x[first + 1]);
      });
    words.put(to, row);
  }
}

INLINE void walk(const Block& block, const Arguments& a) {
  const Lane& l = block.l;
  const Place at = block.at.of(l);
  const float factor = a.flip ? -a.factor : a.factor;
  block.for_each_tile([&](int tile, int first, int next) {
    const int y = at.y + tile * TILE_H;
    block.begin_moving();
    const Kept query = block.take(tile, 0), grad = block.take(tile, 1);
    block.end_moving();
    float products[2];
    block.wait_for(tile, 2);
    grad.products(products, block.raw - block.start, block.start + block.tile(tile, 2), l);
    if (Kept::MOVED) block.leave(tile, 2);
    const Numbers of(products, a, at, y, l);
    SeenBands bands(block, first, next);
    float s[SCORES], d[SCORES], sums[SUMS];
    Weights ds;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const Less less(of.lse[0], of.lse[1], chunk, l);
      bands.begin(chunk);
#pragma unroll 1
      for (; bands.left(); bands.step()) {
        bands.wait();
        begin_products();
        make_scores(s, query, block.first(bands.now));
        end_products();
        make_scores(d, grad, block.second(bands.now));
        end_products();
        wait_for_products<1>();
        written(s), written(sums);
        bands.release_last();
        make_weights(s, less, bands.y(), factor, l);
        wait_for_products<0>();
        written(d);
        block.leave_where_copied(tile, bands.last());
        make_grads(d, s, of.delta, bands.y(), l);
        pack_seen(ds, d, bands.y(), l);
        written(sums);
        begin_products();
        add_weighted(sums, ds, block.first(bands.now), bands.begun());
        end_products();
      }
      wait_for_products<0>();
      written(sums);
      bands.release_last();
    }
    query.store_sums(a.grad_query, sums, a.scale, a.scale, at, y, l);
  });
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP_THREADS, 1)
    walk_grad_query(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const Block block(a.heads, a.height, a.width, raw);
  block.init(1);
  const bool early = false;
  divide(block, early, [] {}, [&] { walk(block, a); }, a.key, a.value, a.query, a.grad_out, a.out);
}

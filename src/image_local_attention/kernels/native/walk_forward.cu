// O = softmax(scale * <q, k_ij>) v_ij over each query's window, and its log-sum-exp, of blocks that walk: tiles are of
// queries, bands of keys and values.

struct Arguments {
  TensorMap query, key, value;
  StridedMap<Number> out;
  float* lse;  // [B, heads, H, W], natural
  int height, width, heads;
  float factor;  // of products, positive: to logits in powers of two
  u32 flip;      // not 0 where the scale is negative
};

constexpr float LEAST = -1e30f;  // of a maximum: below any logit
constexpr float MOST = 256.0f;   // that a lane's weights of a band may sum up to before the maximum is raised

struct Softmax {
  float most[2], sum[2];  // of the lane's pixels: the maximum, and its own share of the sum
  Less less;              // the maximum

  INLINE explicit Softmax(const Lane& l) : most{LEAST, LEAST}, sum{0.0f, 0.0f}, less(LEAST, LEAST, 0, l) {}

  INLINE void begin(int chunk, const Lane& l) {
    if (chunk > 0) less = Less(most[0], most[1], chunk, l);
  }

  // p = 2^(logit - maximum) of a band, and their sums. y: the band's first row, from the first that the tile sees.
  INLINE void weigh(Weights& p, float (&sums)[2], const float (&s)[SCORES], int y, float factor, const Lane& l) const {
    sums[0] = sums[1] = 0.0f;
#pragma unroll
    for (int row = 0; row < BAND_H; row++) {
      const RowSeen seen(y + row, l);
      RowWords words;
      if (seen.any()) {
        float of_row[2] = {0.0f, 0.0f};
        words.fill(seen, [&](int block, int kept) {
          const float* of = s + 4 * (row * ROW_BLOCKS + block) + 2 * kept;
          const float low = exp2_of(fmaf(of[0], factor, less.of(kept, block, 0)));
          const float high = exp2_of(fmaf(of[1], factor, less.of(kept, block, 1)));
          of_row[kept] += low + high;
          return pack_halves<BF16>(low, high);
        });
#pragma unroll
        for (int kept = 0; kept < 2; kept++) sums[kept] += seen.both() || seen.by[kept] ? of_row[kept] : 0.0f;
      }
      words.put(p, row);
    }
  }

  // Raises the maxima to those of a band, and scales sums down, those of `o` too, if there are any.
  INLINE void raise(const float (&s)[SCORES], int y, float factor, float (&o)[SUMS], bool any, const Lane& l) {
    less.grow(-most[0], -most[1]);  // to 0 where columns are seen
    float larger[2] = {LEAST, LEAST};
#pragma unroll
    for (int row = 0; row < BAND_H; row++) {
      const RowSeen seen(y + row, l);
      if (!seen.any()) continue;
      float of_row[2] = {LEAST, LEAST};
      Less::for_each([&](int kept, int block, int i) {
        if (never(block, kept)) return;
        const float product = s[4 * (row * ROW_BLOCKS + block) + 2 * kept + i];
        of_row[kept] = fmaxf(of_row[kept], fmaf(product, factor, less.of(kept, block, i)));
      });
#pragma unroll
      for (int kept = 0; kept < 2; kept++)
        if (seen.by[kept]) larger[kept] = fmaxf(larger[kept], of_row[kept]);
    }
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const float now = fmaxf(most_of_row(larger[kept]), most[kept]), down = exp2_of(most[kept] - now);
      most[kept] = now, sum[kept] *= down;
      if (any)
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) o[i + 2 * kept] *= down, o[i + 2 * kept + 1] *= down;
    }
    less.grow(most[0], most[1]);
  }

  // The weights of a band.
  INLINE void add(Weights& p, const float (&s)[SCORES], int y, float factor, float (&o)[SUMS], bool first,
                  const Lane& l) {
    float sums[2];
    bool raises = first;
    do {
      if (raises) raise(s, y, factor, o, !first, l);
      weigh(p, sums, s, y, factor, l);
      raises = !raises && __any_sync(~0u, sums[0] > MOST || sums[1] > MOST);
    } while (raises);
    sum[0] += sums[0], sum[1] += sums[1];
  }
};

INLINE void walk(const Block& block, const Arguments& a) {
  const Lane& l = block.l;
  const Place at = block.at.of(l);
  const float factor = a.flip ? -a.factor : a.factor;
  block.for_each_tile([&](int tile, int first, int next) {
    block.begin_moving();
    const Kept query = block.take(tile, 0);
    block.end_moving();
    SeenBands bands(block, first, next);
    Softmax softmax(l);
    float s[SCORES], o[SUMS];
    Weights p;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      bands.begin(chunk), softmax.begin(chunk, l);
#pragma unroll 1
      for (; bands.left(); bands.step()) {
        bands.wait();
        begin_products();
        make_scores(s, query, block.first(bands.now));
        end_products();
        wait_for_products<0>();
        written(s), written(o);
        block.leave_where_copied(tile, bands.last());
        bands.release_last();
        softmax.add(p, s, bands.y(), factor, o, !bands.begun(), l);
        written(o);
        begin_products();
        add_weighted(o, p, block.second(bands.now), bands.begun());
        end_products();
      }
      wait_for_products<0>();
      written(o);
      bands.release_last();
    }
    const int y = at.y + tile * TILE_H;
    float shares[2];
#pragma unroll
    for (int kept = 0; kept < 2; kept++) {
      const float sum = sum_of_row(softmax.sum[kept]);
      const int row = y + l.y(kept), x = at.x + l.x(kept);
      shares[kept] = 1.0f / sum;
      if (l.member == 0 && at.has(row, x)) a.lse[at.pixel(row, x)] = (softmax.most[kept] + __log2f(sum)) * LN2;
    }
    query.store_sums(a.out, o, shares[0], shares[1], at, y, l);
  });
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP_THREADS, 1)
    walk_forward(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const Block block(a.heads, a.height, a.width, raw);
  block.init(1);
  const bool early = false;
  divide(block, early, [] {}, [&] { walk(block, a); }, a.key, a.value, a.query);
}

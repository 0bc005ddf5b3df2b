// Each key gathers scale * W_ij x over the queries in the map that see it in their slot ij.
//
// A weight is read once in all, so they are loaded from where they lie: keys side by side are a query's slots side by
// side, the last first.

struct Arguments {
  TensorMap vector;
  KeptMap out;
  const Number* weights;  // [B, heads, H, W, WINDOW]
  int height, width, heads;
  float scale;
};

struct Gathered {
  Number of[UNITS][2][4];
};

// Weights of so many pairs of blocks are under way at once: latency is what they are waited for. Each has registers of
// its own, so bands are rounded up to pairs that meet nobody.
constexpr int AHEAD = AT_ONCE;

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    aggregate_transpose(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + Kept::ROOM;
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Halos halos(start, barriers, a.vector, at, KERNEL_H - 1 - LEAD_Y, KERNEL_W - 1 - LEAD_X);
  const Kept out(tile, a.out, at, l);
  if (l.thread == 0) {
    halos.init();
    halos.fill_all();
  }
  const Pairs pairs(l, at, halos);
  const int row = a.width * WINDOW;  // of weights
  __syncthreads();

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    // A pixel y, x of the view meets a kept one in slot WINDOW - 1 - (y - kept_y) * KERNEL_W - (x - kept_x).
    const long long first = at.pixel(head, halos.y + l.sub_y, halos.x + PAD + l.sub_x);
    const Number* weights = a.weights + (first + 1) * WINDOW - 1;
    const auto gather = [&](Gathered& p, int seen_band, int pair) {
      pairs.for_each_column(seen_band, pair, l, [&](int unit, int block, int i, int y, int x, bool low, bool high) {
        const int kept = row_y(unit, l.group) * KERNEL_W + row_x(unit, l.group);
        const Number* weight = weights + kept + (long long)y * (row - KERNEL_W) + x * (WINDOW - 1);
        p.of[unit][block][i] = low ? weight[0] : Number(0);
        p.of[unit][block][2 + i] = high ? weight[NEXT_ROWS * KERNEL_W] : Number(0);
      });
    };
    float sum[UNITS][SUMS][4];
    zero(sum);
    Gathered under_way[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) gather(under_way[i], 0, i);
    halos.for_each_band(l, Halos::FIRST, [&](int band, int seen_band) {
#pragma unroll 1
      for (int first = 0; first < ROUNDED_PAIRS; first += AHEAD) {
        const bool last = first + AHEAD == ROUNDED_PAIRS;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          Weights packed[UNITS];
          pack_weights(packed, under_way[i].of);
          gather(under_way[i], seen_band + last, last ? i : first + AHEAD + i);
          if (ROUNDED_PAIRS == PAIRS || first + i < PAIRS)
            add_weighted(sum, packed, seen_of(halos.band(band), first + i, l), 0, head);
        }
      }
    });
    Pair scales[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) scales[unit] = {a.scale, a.scale};
    out.store(head, sum, scales);
  }
  copy_out_all(l, out);
}

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

// From a kept pixel's slot to that of one so much later, of the same query.
constexpr INLINE int slots(int y, int x) { return y * KERNEL_W + x; }

// To that which is number `i` of a fragment's four of a unit.
constexpr INLINE int slots_in_unit(int unit, int i) { return slots(row_y(unit, 0) + i / 2 * NEXT_ROWS, row_x(unit, 0)); }

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
  wait_for_launches();
  next_may_begin();
  if (l.thread == 0) {
    halos.init();
    halos.fill_all();
  }
  const SeenPairs pairs(l);
  // A pixel y, x of the view meets a kept one in slot WINDOW - 1 - (y - kept_y) * KERNEL_W - (x - kept_x).
  const WeightPlaces<long long, WINDOW - 1> places(l, a.width * WINDOW - KERNEL_W);
  const InMap in_map(l, at, halos);
  __syncthreads();

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    const long long first = at.pixel(head, in_map.y, in_map.x);
    const Number* weights = a.weights + (first + 1) * WINDOW - 1 + slots(row_y(0, l.group), row_x(0, l.group));
    const auto gather = [&](Gathered& p, const Meeting& meeting, int seen_band, int pair, int number) {
      const Number* of_band = weights + seen_band * SEEN_ROWS * places.row;
      places.for_each(of_band, pair, number, [&](int unit, int block, int i, const Number* weight) {
        const bool meets = meeting.has(number, unit, block, i);
        p.of[unit][block][i] = meets ? weight[slots_in_unit(unit, i)] : Number(0);
      });
    };
    float sum[UNITS][SUMS][4];
    zero(sum);
    Gathered under_way[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) gather(under_way[i], in_map.meeting_of(0, 0), 0, i, i);
    halos.for_each_band(l, Halos::FIRST, [&](int band, int seen_band) {
#pragma unroll 1
      for (int step = 0; step < STEPS_OF_BAND; step++) {
        const bool last = step + 1 == STEPS_OF_BAND;
        const int next_band = seen_band + last, next = last ? 0 : step + 1;
        const Meeting meeting = in_map.meeting_of(next_band, next);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          const int pair = step * AHEAD + i;
          Weights packed[UNITS];
          pack_weights(packed, under_way[i].of);
          gather(under_way[i], meeting, next_band, next * AHEAD + i, i);
          if (ROUNDED_PAIRS == PAIRS || pair < PAIRS)
            add_weighted(sum, packed, pairs.at(halos.band(band), pair, i), 0, head);
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

// O = scale * sum_ij W_ij v_ij over the keys in the map of each query's window.

struct Arguments {
  TensorMap value;
  KeptMap out;
  const Number* weights;  // [B, heads, H, W, WINDOW]
  int height, width, heads;
  float scale;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) aggregate(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + Kept::ROOM;
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Halos halos(start, barriers, a.value, at, LEAD_Y, LEAD_X);
  const Kept out(tile, a.out, at, l);
  const WeightTile weights(raw, barriers + Halos::BARRIERS - start, at);
  wait_for_launches();
  next_may_begin();
  if (l.thread == 0) {
    halos.init();
    weights.copy_in(a.weights, halos.barrier(0, Halos::FIRST));
    halos.fill_all();
  }
  weights.load(a.weights, l);
  const SeenPairs pairs(l);
  const WeightTile::Places places(l, KERNEL_W);
  const InMap in_map(l, at, halos);  // a weight of a key that is not there may be anything
  __syncthreads();

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    float sum[UNITS][SUMS][4];
    zero(sum);
    Meeting ahead = meeting_of(0, 0, l);  // weights wait for it, and it for memory: asked for a step before
    halos.for_each_band(l, Halos::FIRST, [&](int band, int seen_band) {
      const Number* first = weights.query(head, l) + seen_band * SEEN_ROWS * KERNEL_W;
      const auto meeting_at = [&](int step) {
        const Meeting meeting = in_map.there(ahead, seen_band, step);
        ahead = meeting_of(seen_band, step + 1, l);
        return meeting;
      };
      for_each_pair(meeting_at, [&](int pair, const Meeting& meeting, int number) {
        Number p[UNITS][2][4];
        places.for_each(first, pair, number, [&](int unit, int block, int i, const Number* weight) {
          const bool meets = meeting.has(number, unit, block, i);
          p[unit][block][i] = meets ? weight[weights.later_in_unit(unit, i)] : Number(0);
        });
        Weights packed[UNITS];
        pack_weights(packed, p);
        add_weighted(sum, packed, pairs.at(halos.band(band), pair, number), 0, head);
      });
    });
    Pair scales[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) scales[unit] = {a.scale, a.scale};
    out.store(head, sum, scales);
  }
  copy_out_all(l, out);
}

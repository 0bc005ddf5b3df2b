// W_ij = scale * <q, k_ij> of each query and the keys of its window; keys outside of the map are zeros.

struct Arguments {
  KeptMap query;
  TensorMap key;
  Number* weights;  // [B, heads, H, W, WINDOW]
  int height, width, heads;
  float scale;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) similarity(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + Kept::ROOM;
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Halos halos(start, barriers, a.key, at, LEAD_Y, LEAD_X);
  const Kept query(tile, a.query, at, l);
  const WeightTile weights(raw, barriers + Halos::BARRIERS - start, at);
  if (l.thread == 0) {
    halos.init();
    query.copy_in(halos.barrier(0, Halos::FIRST));
    halos.fill_all();
  }
  const Pairs pairs(l);
  __syncthreads();
  if (Kept::ROOM) halos.wait(0, Halos::FIRST);

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    Fragments q[UNITS];
    query.load(q, head);
    const float scale = a.scale;
    halos.for_each_band(l, Halos::FIRST, [&](int band, int seen_band) {
#pragma unroll AT_ONCE
      for (int pair = l.share; pair < PAIRS; pair += SHARED_BY) {
        float s[UNITS][2][4];
        zero(s);
        add_scores(s, q, seen_of(halos.band(band), pair, l), 0, head);
        pairs.for_each_column(seen_band, pair, l, [&](int unit, int block, int i, int y, int x, bool low, bool high) {
          Number* weight = weights.numbers + weights.query(unit, head, l) + weights.slot(y, x);
          if (low) weight[0] = number_of(s[unit][block][i] * scale);
          if (high) weight[weights.NEXT] = number_of(s[unit][block][2 + i] * scale);
        });
      }
    });
  }
  weights.copy_out(a.weights, l);
}

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
  wait_for_launches();
  next_may_begin();
  if (l.thread == 0) {
    halos.init();
    query.copy_in(halos.barrier(0, Halos::FIRST));
    halos.fill_all();
  }
  const SeenPairs pairs(l);
  const WeightTile::Places places(l, KERNEL_W);
  __syncthreads();
  if (Kept::ROOM) halos.wait(0, Halos::FIRST);

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    Fragments q[UNITS];
    query.load(q, head);
    halos.for_each_band(l, Halos::FIRST, [&](int band, int seen_band) {
      Number* first = weights.query(head, l) + seen_band * SEEN_ROWS * KERNEL_W;
      const auto meeting_at = [&](int step) { return meeting_of(seen_band, step, l); };
      for_each_pair(meeting_at, [&](int pair, const Meeting& meeting, int number) {
        float s[UNITS][2][4];
        zero(s);
        add_scores(s, q, pairs.at(halos.band(band), pair, number), 0, head);
        places.for_each(first, pair, number, [&](int unit, int block, int i, Number* weight) {
          const Number scaled = number_of(s[unit][block][i] * a.scale);
          if (meeting.has(number, unit, block, i)) weight[weights.later_in_unit(unit, i)] = scaled;
        });
      });
    });
  }
  weights.copy_out(a.weights, l);
}

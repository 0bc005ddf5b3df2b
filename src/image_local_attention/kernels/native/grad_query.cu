// dQ = scale * sum_ij dS_ij k_ij over each query's window, dS = P * (dP - delta), and delta = sum(grad_out * out) -
// grad_lse of each query.

struct Arguments {
  KeptMap query;
  TensorMap key, value;
  KeptMap grad_out, out;
  ResultMap grad_query;
  const float *lse, *grad_lse;  // [B, heads, H, W]; lse is natural, no grad_lse is zero
  float* delta;                 // [B, heads, H, W]
  int height, width, heads;
  float factor, scale;  // of products, to logits: the first is positive
  u32 flip;             // of the kept maps' signs, where the scale is negative
};

// Of a lane's pixels in floats [B, heads, H, W]; 0 where there are none.
INLINE Pair read(const float* floats, const Place& at, const Rows& rows, int head) {
  const float* from = floats + at.pixel(head, rows.y, rows.x);
  return {rows.low_there ? from[0] : 0.0f, rows.high_there ? from[NEXT_ROWS * at.width] : 0.0f};
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) grad_query(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + 3 * Kept::ROOM;
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Halos halos(start, barriers, a.key, a.value, at, LEAD_Y, LEAD_X);
  const Kept query(tile, a.query, at, l), grad_out(tile + Kept::ROOM, a.grad_out, at, l);
  const Kept out(tile + 2 * Kept::ROOM, a.out, at, l);
  const Results grad_query(tile, a.grad_query, at, l);
  wait_for_launches();
  next_may_begin();
  if (l.thread == 0) {
    const u32 barrier = halos.barrier(0, Halos::FIRST);
    halos.init();
    query.copy_in(barrier), grad_out.copy_in(barrier), out.copy_in(barrier);
    halos.fill_all();
  }
  const Visibility visibility(l);
  const SeenPairs pairs(l);
  __syncthreads();

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    Pair lse[UNITS], delta[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) lse[unit] = read(a.lse, at, Rows(at, l, unit), head);
    if (Kept::ROOM) halos.wait(0, Halos::FIRST);
    Fragments q[UNITS], g[UNITS];
    query.load(q, head, a.flip);
    grad_out.load(g, head);
    out.products(delta, g, head);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const Rows rows(at, l, unit);
      lse[unit] = {from_natural(lse[unit].low), from_natural(lse[unit].high)};
      if (a.grad_lse) {
        const Pair less = read(a.grad_lse, at, rows, head);
        delta[unit].low -= less.low, delta[unit].high -= less.high;
      }
      float* to = a.delta + at.pixel(head, rows.y, rows.x);
      if (l.member == 0 && rows.low_there) to[0] = delta[unit].low;
      if (l.member == 0 && rows.high_there) to[NEXT_ROWS * a.width] = delta[unit].high;
    }
    float less_delta[UNITS][4];
#pragma unroll
    for (int i = 0; i < 4 * UNITS; i++)
      less_delta[i / 4][i % 4] = begin_less(i % 4 < 2 ? delta[i / 4].low : delta[i / 4].high);
    float sum[UNITS][SUMS][4];
    zero(sum);
    halos.for_each_band(l, Halos::SECOND, [&](int band, int seen_band) {
      const auto hidden_at = [&](int step) { return hidden_of(seen_band, step, l); };
      for_each_pair(hidden_at, [&](int pair, const Hidden& hidden, int number) {
        const Seen seen = pairs.at(halos.band(band), pair, number);
        float s[UNITS][2][4], dp[UNITS][2][4];
        visibility.start(s, hidden, number);
        add_scores(s, q, seen, 0, head);
#pragma unroll
        for (int i = 0; i < 8 * UNITS; i++) dp[i / 8][i / 4 % 2][i % 4] = less_delta[i / 8][i % 4];
        add_scores(dp, g, seen, BAND_ROOM, head);
#pragma unroll
        for (int i = 0; i < 2 * UNITS; i++) {
          const int unit = i / 2;
          float(&p)[4] = s[unit][i % 2];
          const float(&d)[4] = dp[unit][i % 2];
          p[0] = weight_of(p[0], a.factor, lse[unit].low) * end_less(d[0], delta[unit].low);
          p[1] = weight_of(p[1], a.factor, lse[unit].low) * end_less(d[1], delta[unit].low);
          p[2] = weight_of(p[2], a.factor, lse[unit].high) * end_less(d[2], delta[unit].high);
          p[3] = weight_of(p[3], a.factor, lse[unit].high) * end_less(d[3], delta[unit].high);
        }
        Weights ds[UNITS];
        pack_weights(ds, s);
        add_weighted(sum, ds, seen, 0, head);
      });
    });
    Pair scales[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) scales[unit] = {a.scale, a.scale};
    grad_query.store(head, sum, scales);
  }
  copy_out_all(l, grad_query);
}

// dQ = scale * sum_ij dS_ij k_ij over each query's window, dS = P * (dP - delta), and delta = sum(grad_out * out) -
// grad_lse of each query.

struct Arguments {
  KeptMap query;
  TensorMap key, value;
  KeptMap grad_out, out, grad_query;
  const float *lse, *grad_lse;  // [B, heads, H, W]; lse is natural, no grad_lse is zero
  float* delta;                 // [B, heads, H, W]
  int height, width, heads;
  float factor, scale;  // of products, to logits: the first is positive
  u32 flip;             // of the kept maps' signs, where the scale is negative
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) grad_query(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + 3 * Kept::ROOM;
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Rows rows(at, l);
  const Halos halos(start, barriers, a.key, a.value, at, LEAD_Y, LEAD_X);
  const Kept query(tile, a.query, at, l), grad_out(tile + Kept::ROOM, a.grad_out, at, l);
  const Kept out(tile + 2 * Kept::ROOM, a.out, at, l), grad_query(tile, a.grad_query, at, l);
  if (l.thread == 0) {
    const u32 barrier = halos.barrier(0, Halos::FIRST);
    halos.init();
    query.copy_in(barrier), grad_out.copy_in(barrier), out.copy_in(barrier);
    halos.fill_all();
  }
  const Visibility visibility(l);
  __syncthreads();

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    const long long pixel = at.pixel(head, rows.y, rows.x);
    const int next = NEXT_ROWS * a.width;
    const float lse_low = rows.low_there ? from_natural(a.lse[pixel]) : 0.0f;
    const float lse_high = rows.high_there ? from_natural(a.lse[pixel + next]) : 0.0f;
    if (Kept::ROOM) halos.wait(0, Halos::FIRST);
    Fragments q, g;
    query.load(q, head, a.flip);
    grad_out.load(g, head);
    float delta_low, delta_high;
    out.products(delta_low, delta_high, g, head);
    if (a.grad_lse) {
      delta_low -= rows.low_there ? a.grad_lse[pixel] : 0.0f;
      delta_high -= rows.high_there ? a.grad_lse[pixel + next] : 0.0f;
    }
    if (l.member == 0 && rows.low_there) a.delta[pixel] = delta_low;
    if (l.member == 0 && rows.high_there) a.delta[pixel + next] = delta_high;
    float sum[SUMS][4];
    zero(sum);
    halos.for_each_band(l, Halos::SECOND, [&](int band, int seen_band) {
#pragma unroll UNROLL
      for (int pair = 0; pair < PAIRS; pair++) {
        const Seen seen = seen_of(halos.band(band), pair, l);
        float s[2][4], dp[2][4];
        visibility.start(s, hidden_of(seen_band, pair, l));
        add_scores(s, q, seen, 0, head);
        zero(dp);
        add_scores(dp, g, seen, BAND_ROOM, head);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          s[i][0] = weight_of(s[i][0], a.factor, lse_low) * (dp[i][0] - delta_low);
          s[i][1] = weight_of(s[i][1], a.factor, lse_low) * (dp[i][1] - delta_low);
          s[i][2] = weight_of(s[i][2], a.factor, lse_high) * (dp[i][2] - delta_high);
          s[i][3] = weight_of(s[i][3], a.factor, lse_high) * (dp[i][3] - delta_high);
        }
        Weights ds;
        pack_weights(ds, s);
        add_weighted(sum, ds, seen, 0, head);
      }
    });
    grad_query.store(head, sum, a.scale, a.scale);
  }
  copy_out_all(l, grad_query);
}

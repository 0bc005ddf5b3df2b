// dQ = scale * sum_ij dS_ij k_ij over each query's window, dS = P * (dP - delta), and delta = sum(grad_out * out) -
// grad_lse of each query.

struct Arguments {
  TensorMap query, key, value, grad_out, out, grad_query;
  const float *lse, *grad_lse;  // [B, heads, H, W]; lse is natural, no grad_lse is zero
  float* delta;                 // [B, heads, H, W]
  int height, width, heads;
  float scale_log2, scale;  // the first is positive
  u32 flip;                 // of the kept maps' signs, where the scale is negative
};

// sum(grad * out) of the rows `group`, and of those 8 later
INLINE void row_products(float& low, float& high, const u32 (&grad)[STEPS][4], u32 out, int first_step) {
  low = high = 0.0f;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 o[4];
    load_fragments<PLANES>(o, at_step<TILE_PIXELS>(out, first_step + step));
    low += product_of_two(grad[step][0], o[0]) + product_of_two(grad[step][2], o[2]);
    high += product_of_two(grad[step][1], o[1]) + product_of_two(grad[step][3], o[3]);
  }
  low = sum_of_row(low), high = sum_of_row(high);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) grad_query(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 key = shared_start(raw), value = key + HALO_ROOM, query = value + HALO_ROOM, grad = query + TILE_ROOM;
  const u32 out = grad + TILE_ROOM, barrier = out + TILE_ROOM;
  const Place at(a.heads);
  const Lane l;
  if (l.thread == 0) {
    barrier_init(barrier), barriers_ready();
    barrier_expect(barrier, 3 * TILE_BYTES + 2 * HALO_BYTES);
    copy_in(query, a.query, barrier, at.channel, at.x, at.y, at.image);
    copy_in(grad, a.grad_out, barrier, at.channel, at.x, at.y, at.image);
    copy_in(out, a.out, barrier, at.channel, at.x, at.y, at.image);
    copy_in(key, a.key, barrier, at.channel, at.x - LEAD_X - PAD, at.y - LEAD_Y, at.image);
    copy_in(value, a.value, barrier, at.channel, at.x - LEAD_X - PAD, at.y - LEAD_Y, at.image);
  }
  const Visibility visibility(l);
  const u32 kept = l.kept(query);
  const int y = at.y + l.sub_y + l.group / SUB_W, x = at.x + l.sub_x + l.group % SUB_W;
  const int next = NEXT_ROWS * a.width;
  const bool low_there = x < a.width && y < a.height, high_there = x < a.width && y + NEXT_ROWS < a.height;
  __syncthreads();

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    const int step = head * STEPS;
    const long long pixel = at.pixel(a, head, y, x);
    const float lse_low = low_there ? a.lse[pixel] * LOG2E : 0.0f;
    const float lse_high = high_there ? a.lse[pixel + next] * LOG2E : 0.0f;
    barrier_wait(barrier);
    u32 q[STEPS][4], g[STEPS][4];
    load_kept(q, kept, step);
    flip_signs(q, a.flip);
    load_kept(g, kept + (grad - query), step);
    float delta_low, delta_high;
    row_products(delta_low, delta_high, g, kept + (out - query), step);
    if (a.grad_lse) {
      delta_low -= low_there ? a.grad_lse[pixel] : 0.0f;
      delta_high -= high_there ? a.grad_lse[pixel + next] : 0.0f;
    }
    if (l.member == 0 && low_there) a.delta[pixel] = delta_low;
    if (l.member == 0 && high_there) a.delta[pixel + next] = delta_high;
    float sum[2 * STEPS][4];
    zero(sum);
#pragma unroll UNROLL
    for (int pair = 0; pair < PAIRS; pair++) {
      const Hidden hidden = hidden_table.of[pair][l.lane];
      const u32 seen = l.streamed(key, pair);
      float s[2][4], dp[2][4];
      visibility.start(s, hidden);
      scores(s, q, seen, step);
      zero(dp);
      scores(dp, g, seen + (value - key), step);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        s[i][0] = exp2_of(fmaf(s[i][0], a.scale_log2, -lse_low)) * (dp[i][0] - delta_low);
        s[i][1] = exp2_of(fmaf(s[i][1], a.scale_log2, -lse_low)) * (dp[i][1] - delta_low);
        s[i][2] = exp2_of(fmaf(s[i][2], a.scale_log2, -lse_high)) * (dp[i][2] - delta_high);
        s[i][3] = exp2_of(fmaf(s[i][3], a.scale_log2, -lse_high)) * (dp[i][3] - delta_high);
      }
      u32 ds[4];
      pack_weights(ds, s);
      add_weighted(sum, ds, seen, step);
    }
    store_kept(kept, step, sum, a.scale, a.scale);
  }
  writes_visible_to_copies();
  __syncthreads();
  if (l.thread == 0) {
    copy_out(query, a.grad_query, at.channel, at.x, at.y, at.image);
    copies_have_read();
  }
}

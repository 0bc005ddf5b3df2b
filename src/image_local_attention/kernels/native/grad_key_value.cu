// dK = scale * sum dS q and dV = sum P g over the queries that see each key, dS = P * (dP - delta): a gather.

struct Arguments {
  TensorMap query, key, value, grad_out, grad_key, grad_value;
  const float *lse, *delta;  // [B, heads, H, W]; lse is natural
  int height, width, heads;
  float scale_log2, scale;  // the first is positive
  u32 flip;                 // of the kept maps' signs, where the scale is negative
};

constexpr bool ADJACENT = SEEN_W % 2 == 0 && HALO_W % 2 == 0;  // two queries of a lane lie side by side, evenly

struct alignas(8) Row {
  float lse, delta;  // lse in powers of two
};

struct alignas(16) Rows {
  Row first, second;
};

// Log-sum-exp and delta of the halo's queries, of every head: one that is not in the map has no weight.
INLINE void load_rows(Row* rows, const Arguments& a, const Place& at, int thread, int x0, int y0) {
  for (int i = thread; i < HALO_PIXELS * GROUP; i += WARPS * 32) {
    const int head = i / HALO_PIXELS, pixel = i - head * HALO_PIXELS;
    const int y = y0 + pixel / HALO_W, x = x0 + pixel % HALO_W;
    Row row = {__int_as_float(0x7F800000), 0.0f};
    if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
      const long long from = at.pixel(a, head, y, x);
      row = {a.lse[from] * LOG2E, a.delta[from]};
    }
    rows[i] = row;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) grad_key_value(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw);
  const u32 query = start, grad = query + HALO_ROOM, key = grad + HALO_ROOM, value = key + TILE_ROOM;
  const u32 barrier = value + TILE_ROOM;
  Row* rows = reinterpret_cast<Row*>(raw + (barrier + 16 - start));
  const Place at(a.heads);
  const Lane l;
  const int halo_x = at.x - (KERNEL_W - 1 - LEAD_X) - PAD, halo_y = at.y - (KERNEL_H - 1 - LEAD_Y);
  if (l.thread == 0) {
    barrier_init(barrier), barriers_ready();
    barrier_expect(barrier, 2 * (TILE_BYTES + HALO_BYTES));
    copy_in(key, a.key, barrier, at.channel, at.x, at.y, at.image);
    copy_in(value, a.value, barrier, at.channel, at.x, at.y, at.image);
    copy_in(query, a.query, barrier, at.channel, halo_x, halo_y, at.image);
    copy_in(grad, a.grad_out, barrier, at.channel, halo_x, halo_y, at.image);
  }
  load_rows(rows, a, at, l.thread, halo_x, halo_y);
  const Visibility visibility(l);
  const u32 kept = l.kept(key);
  __syncthreads();
  barrier_wait(barrier);

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    const int step = head * STEPS;
    const Row* row = rows + head * HALO_PIXELS;
    u32 k[STEPS][4], v[STEPS][4];
    load_kept(k, kept, step);
    flip_signs(k, a.flip);
    load_kept(v, kept + (value - key), step);
    float sum_k[2 * STEPS][4], sum_v[2 * STEPS][4];
    zero(sum_k);
    zero(sum_v);
#pragma unroll UNROLL
    for (int pair = 0; pair < PAIRS; pair++) {
      const Hidden hidden = hidden_table.of[pair][l.lane];
      const u32 seen = l.streamed(query, pair);
      float p[2][4], dp[2][4];
      visibility.start(p, hidden);
      scores(p, k, seen, step);
      zero(dp);
      scores(dp, v, seen + (grad - query), step);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int first = 16 * pair + 8 * i + 2 * l.member;
        Rows of;
        if (ADJACENT)
          of = *reinterpret_cast<const Rows*>(row + l.halo_pixel(first, SEEN - 2));
        else
          of = {row[l.halo_pixel(first)], row[l.halo_pixel(first + 1)]};
        p[i][0] = exp2_of(fmaf(p[i][0], a.scale_log2, -of.first.lse));
        p[i][1] = exp2_of(fmaf(p[i][1], a.scale_log2, -of.second.lse));
        p[i][2] = exp2_of(fmaf(p[i][2], a.scale_log2, -of.first.lse));
        p[i][3] = exp2_of(fmaf(p[i][3], a.scale_log2, -of.second.lse));
        dp[i][0] = p[i][0] * (dp[i][0] - of.first.delta), dp[i][1] = p[i][1] * (dp[i][1] - of.second.delta);
        dp[i][2] = p[i][2] * (dp[i][2] - of.first.delta), dp[i][3] = p[i][3] * (dp[i][3] - of.second.delta);
      }
      u32 packed[4];
      pack_weights(packed, p);
      add_weighted(sum_v, packed, seen + (grad - query), step);
      pack_weights(packed, dp);
      add_weighted(sum_k, packed, seen, step);
    }
    store_kept(kept, step, sum_k, a.scale, a.scale);
    store_kept(kept + (value - key), step, sum_v, 1.0f, 1.0f);
  }
  writes_visible_to_copies();
  __syncthreads();
  if (l.thread == 0) {
    copy_out(key, a.grad_key, at.channel, at.x, at.y, at.image);
    copy_out(value, a.grad_value, at.channel, at.x, at.y, at.image);
    copies_have_read();
  }
}

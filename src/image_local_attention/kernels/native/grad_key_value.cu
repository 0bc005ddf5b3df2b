// dK = scale * sum dS q and dV = sum P g over the queries that see each key, dS = P * (dP - delta): a gather.

struct Arguments {
  TensorMap query;
  KeptMap key, value;
  TensorMap grad_out;
  ResultMap grad_key, grad_value;
  const float *lse, *delta;  // [B, heads, H, W]; lse is natural
  int height, width, heads;
  float factor, scale;  // of products, to logits: the first is positive
  u32 flip;             // of the kept maps' signs, where the scale is negative
  u32 after_grad_query;  // whether that was launched last, over the same maps: all but delta is there
};

constexpr int HALO_PIXELS = BANDS * BAND_PIXELS;

// Of every head.
INLINE void load_queries(Query* queries, const Arguments& a, const Place& at, int thread, const Halos& halos) {
  for (int i = thread; i < HALO_PIXELS * GROUP; i += WARPS * 32) {
    const int head = i / HALO_PIXELS, pixel = i - head * HALO_PIXELS;
    const int y = halos.y + pixel / HALO_W, x = halos.x + pixel % HALO_W;
    Query query = Query::none();
    if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
      const long long from = at.pixel(head, y, x);
      query = Query::of(a.lse[from], a.delta[from], a.factor);
    }
    queries[i] = query;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) grad_key_value(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + 2 * Kept::ROOM;
  Query* queries = reinterpret_cast<Query*>(raw + (barriers + Halos::BARRIERS - start));
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Halos halos(start, barriers, a.query, a.grad_out, at, KERNEL_H - 1 - LEAD_Y, KERNEL_W - 1 - LEAD_X);
  const Kept key(tile, a.key, at, l), value(tile + Kept::ROOM, a.value, at, l);
  const Results grad_key(tile, a.grad_key, at, l), grad_value(tile + Kept::ROOM, a.grad_value, at, l);
  if (!a.after_grad_query) wait_for_launches();
  if (l.thread == 0) {
    const u32 barrier = halos.barrier(0, Halos::FIRST);
    halos.init();
    key.copy_in(barrier), value.copy_in(barrier);
    halos.fill_all();
  }
  if (a.after_grad_query) wait_for_launches();
  next_may_begin();
  load_queries(queries, a, at, l.thread, halos);
  const Visibility visibility(l);
  const QueryRows rows(l);
  const QueryPlaces places(l);
  const SeenPairs pairs(l);
  __syncthreads();
  if (Kept::ROOM) halos.wait(0, Halos::FIRST);

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    Fragments k[UNITS], v[UNITS];
    key.load(k, head, a.flip);
    value.load(v, head);
    float sum_k[UNITS][SUMS][4], sum_v[UNITS][SUMS][4];
    zero(sum_k);
    zero(sum_v);
    halos.for_each_band(l, Halos::SECOND, [&](int band, int seen_band) {
      const u32 first = shared_address(queries) + (head * HALO_PIXELS + band * BAND_PIXELS) * QueryPlaces::QUERY;
      const auto hidden_at = [&](int step) { return hidden_of(seen_band, step, l); };
      for_each_pair(hidden_at, [&](int pair, const Hidden& hidden, int number) {
        const Seen seen = pairs.at(halos.band(band), pair, number);
        const Queries of(first, places, pair, number);
        float p[UNITS][2][4], dp[UNITS][2][4];
        of.begin(p, dp, visibility, hidden, number, rows);
        add_scores(p, k, seen, 0, head);
        add_scores(dp, v, seen, BAND_ROOM, head);
        of.end(p, dp, a.factor);
        Weights packed[UNITS];
        pack_weights(packed, p);
        add_weighted(sum_v, packed, seen, BAND_ROOM, head);
        pack_weights(packed, dp);
        add_weighted(sum_k, packed, seen, 0, head);
      });
    });
    Pair scales[UNITS], ones[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) scales[unit] = {a.scale, a.scale}, ones[unit] = {1.0f, 1.0f};
    grad_key.store(head, sum_k, scales);
    grad_value.store(head, sum_v, ones);
  }
  copy_out_all(l, grad_key, grad_value);
}

// dK = scale * sum dS q and dV = sum P g over the queries that see each key, dS = P * (dP - delta): a gather.

struct Arguments {
  TensorMap query;
  KeptMap key, value;
  TensorMap grad_out;
  KeptMap grad_key, grad_value;
  const float *lse, *delta;  // [B, heads, H, W]; lse is natural
  int height, width, heads;
  float factor, scale;  // of products, to logits: the first is positive
  u32 flip;             // of the kept maps' signs, where the scale is negative
};

constexpr int HALO_PIXELS = BANDS * BAND_PIXELS;

struct alignas(8) Query {
  float lse, delta;  // lse in the unit of logits
};

struct alignas(16) Queries {
  Query first, second;
};

// Of two blocks of 8 pixels that are seen, the places of a lane's two columns, or of both if these are side by side.
struct alignas(8) QueriesSeen {
  u32 of[2][COLUMNS_APART + 1];

  static constexpr QueriesSeen at(int pair, int lane) {
    QueriesSeen queries = {};
    for (int i = 0; i < 4; i++) {
      const int seen = 16 * pair + i / 2 * 8 + lane % 4 * 2;
      queries.of[i / 2][i % 2 * COLUMNS_APART] = seen_pixel(seen + i % 2 * COLUMNS_APART, SEEN - 2 + COLUMNS_APART);
    }
    return queries;
  }
};

__device__ constexpr Table<QueriesSeen, ROUNDED_PAIRS> queries_table;

// Log-sum-exp and delta of the halo's queries, of every head: one that is not in the map has no weight.
INLINE void load_queries(Query* queries, const Arguments& a, const Place& at, int thread, const Halos& halos) {
  for (int i = thread; i < HALO_PIXELS * GROUP; i += WARPS * 32) {
    const int head = i / HALO_PIXELS, pixel = i - head * HALO_PIXELS;
    const int y = halos.y + pixel / HALO_W, x = halos.x + pixel % HALO_W;
    Query query = {__int_as_float(0x7F800000), 0.0f};
    if (y >= 0 && y < a.height && x >= 0 && x < a.width) {
      const long long from = at.pixel(head, y, x);
      query = {from_natural(a.lse[from]), a.delta[from]};
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
  const Kept grad_key(tile, a.grad_key, at, l), grad_value(tile + Kept::ROOM, a.grad_value, at, l);
  if (l.thread == 0) {
    const u32 barrier = halos.barrier(0, Halos::FIRST);
    halos.init();
    key.copy_in(barrier), value.copy_in(barrier);
    halos.fill_all();
  }
  load_queries(queries, a, at, l.thread, halos);
  const Visibility visibility(l);
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
      const Query* query = queries + head * HALO_PIXELS + band * BAND_PIXELS + l.view();
#pragma unroll AT_ONCE
      for (int pair = 0; pair < PAIRS; pair++) {
        const Seen seen = seen_of(halos.band(band), pair, l);
        float p[UNITS][2][4], dp[UNITS][2][4];
        visibility.start(p, hidden_of(seen_band, pair, l));
        add_scores(p, k, seen, 0, head);
        zero(dp);
        add_scores(dp, v, seen, BAND_ROOM, head);
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const QueriesSeen& at_columns = queries_table.of[pair][l.lane];
          Queries of;
          if (SIDE_BY_SIDE)
            of = *reinterpret_cast<const Queries*>(query + at_columns.of[n][0]);
          else
            of = {query[at_columns.of[n][0]], query[at_columns.of[n][COLUMNS_APART]]};
#pragma unroll
          for (int i = 0; i < 4 * UNITS; i++) {
            const Query& at_column = i % 2 ? of.second : of.first;
            float &weight = p[i / 4][n][i % 4], &d = dp[i / 4][n][i % 4];
            weight = weight_of(weight, a.factor, at_column.lse);
            d = weight * (d - at_column.delta);
          }
        }
        Weights packed[UNITS];
        pack_weights(packed, p);
        add_weighted(sum_v, packed, seen, BAND_ROOM, head);
        pack_weights(packed, dp);
        add_weighted(sum_k, packed, seen, 0, head);
      }
    });
    Pair scales[UNITS], ones[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) scales[unit] = {a.scale, a.scale}, ones[unit] = {1.0f, 1.0f};
    grad_key.store(head, sum_k, scales);
    grad_value.store(head, sum_v, ones);
  }
  copy_out_all(l, grad_key, grad_value);
}

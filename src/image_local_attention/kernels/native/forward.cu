// O = softmax(scale * <q, k_ij>) v_ij over each query's window, and its log-sum-exp.

struct Arguments {
  KeptMap query;
  TensorMap key, value;
  ResultMap out;
  float* lse;  // [B, heads, H, W], natural
  int height, width, heads;
  float factor;  // of products, positive: to logits
  u32 flip;      // of the kept maps' signs, where the scale is negative
};

constexpr int CHUNK = AT_ONCE, CHUNKS = STEPS_OF_BAND;
// Of a maximum: below any logit. Weights of a row that has seen nothing yet are scaled down to 0 when it does.
constexpr float LEAST = -1e30f;
constexpr float SLACK = 8.0f;  // that a logit may exceed the maximum by before sums are scaled down

struct Softmax {  // of a unit
  float low = LEAST, high = LEAST, sum_low = 0.0f, sum_high = 0.0f;

  // Raises the maxima to those of a chunk where these are much larger, and scales sums down, those of `o` too.
  INLINE void raise(const float (&s)[CHUNK][UNITS][2][4], int unit, int blocks, float factor, bool first,
                    float (&o)[SUMS][4]) {
    float most_low = s[0][unit][0][0], most_high = s[0][unit][0][2];
#pragma unroll
    for (int n = 0; n < 2 * CHUNK; n++)
      if (n < blocks) {
        const float(&block)[4] = s[n / 2][unit][n % 2];
        most_low = fmaxf(most_low, fmaxf(block[0], block[1]));
        most_high = fmaxf(most_high, fmaxf(block[2], block[3]));
      }
    const bool larger = fmaf(most_low, factor, -low) > SLACK || fmaf(most_high, factor, -high) > SLACK;
    if (first || __any_sync(~0u, larger)) {
      most_low = fmaxf(__fmul_rn(most_of_row(most_low), factor), low);
      most_high = fmaxf(__fmul_rn(most_of_row(most_high), factor), high);
      if (!first) {
        const float less_low = power_of(low - most_low), less_high = power_of(high - most_high);
        sum_low *= less_low, sum_high *= less_high;
#pragma unroll
        for (int i = 0; i < SUMS; i++)
          o[i][0] *= less_low, o[i][1] *= less_low, o[i][2] *= less_high, o[i][3] *= less_high;
      }
      low = most_low, high = most_high;
    }
  }

  INLINE void weights(float (&s)[2][4], float factor) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      s[n][0] = weight_of(s[n][0], factor, low), s[n][1] = weight_of(s[n][1], factor, low);
      s[n][2] = weight_of(s[n][2], factor, high), s[n][3] = weight_of(s[n][3], factor, high);
      sum_low += s[n][0] + s[n][1], sum_high += s[n][2] + s[n][3];
    }
  }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) forward(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 start = shared_start(raw), tile = start + Halos::ROOM, barriers = tile + Kept::ROOM;
  const Place at(a.heads, a.height, a.width);
  const Lane l;
  const Halos halos(start, barriers, a.key, a.value, at, LEAD_Y, LEAD_X);
  const Kept query(tile, a.query, at, l);
  const Results out(tile, a.out, at, l);
  wait_for_launches();
  next_may_begin();
  if (l.thread == 0) {
    halos.init();
    query.copy_in(halos.barrier(0, Halos::FIRST));
    halos.fill_all();
  }
  const Visibility visibility(l);
  const SeenPairs pairs(l);
  __syncthreads();
  if (Kept::ROOM) halos.wait(0, Halos::FIRST);

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    Fragments q[UNITS];
    query.load(q, head, a.flip);
    Softmax softmax[UNITS];
    float o[UNITS][SUMS][4];
    zero(o);
    halos.for_each_band(l, Halos::FIRST, [&](int band, int seen_band) {
#pragma unroll 1
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        constexpr int blocks = CHUNKS == 1 ? BLOCKS : 2 * CHUNK;
        const Hidden hidden = hidden_of(seen_band, chunk, l);
        float s[CHUNK][UNITS][2][4];
        Seen seen[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
          const int pair = chunk * CHUNK + i;
          visibility.start(s[i], hidden, i);
          seen[i] = pairs.at(halos.band(band), pair, i);
          add_scores(s[i], q, seen[i], 0, head);
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++)
          softmax[unit].raise(s, unit, blocks, a.factor, seen_band == 0 && chunk == 0, o[unit]);
        if (chunk == 0) halos.wait(band, Halos::SECOND);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
#pragma unroll
          for (int unit = 0; unit < UNITS; unit++) softmax[unit].weights(s[i][unit], a.factor);
          Weights p[UNITS];
          pack_weights(p, s[i]);
          add_weighted(o, p, seen[i], BAND_ROOM, head);
        }
      }
    });
    Pair shares[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const float low = sum_of_row(softmax[unit].sum_low), high = sum_of_row(softmax[unit].sum_high);
      shares[unit] = {1.0f / low, 1.0f / high};
      const Rows rows(at, l, unit);
      float* lse = a.lse + at.pixel(head, rows.y, rows.x);
      if (l.member == 0 && rows.low_there) lse[0] = log_sum_exp(softmax[unit].low, low);
      if (l.member == 0 && rows.high_there) lse[NEXT_ROWS * a.width] = log_sum_exp(softmax[unit].high, high);
    }
    out.store(head, o, shares);
  }
  copy_out_all(l, out);
}

// O = softmax(scale * <q, k_ij>) v_ij over each query's window, and its log-sum-exp.

struct Arguments {
  TensorMap query, key, value, out;
  float* lse;  // [B, heads, H, W], natural
  int height, width, heads;
  float scale_log2;  // positive
  u32 flip;          // of the kept maps' signs, where the scale is negative
};

constexpr int CHUNKS = ceil_div(PAIRS, CHUNK);
// Of a maximum: below any logit. Weights of a row that has seen nothing yet are scaled down to 0 when it does.
constexpr float LEAST = -1e30f;
constexpr float SLACK = 8.0f;  // powers of two that a weight may exceed 1 by before sums are scaled down

struct Softmax {
  float o[2 * STEPS][4], low = LEAST, high = LEAST, sum_low = 0.0f, sum_high = 0.0f;

  INLINE Softmax() { zero(o); }

  // Raises the maxima to those of a chunk where these are much larger, and scales sums down.
  INLINE void raise(const float (&s)[2 * CHUNK][4], int blocks, float scale, bool first) {
    float most_low = s[0][0], most_high = s[0][2];
#pragma unroll
    for (int n = 0; n < 2 * CHUNK; n++)
      if (n < blocks) {
        most_low = fmaxf(most_low, fmaxf(s[n][0], s[n][1]));
        most_high = fmaxf(most_high, fmaxf(s[n][2], s[n][3]));
      }
    const bool larger = fmaf(most_low, scale, -low) > SLACK || fmaf(most_high, scale, -high) > SLACK;
    if (first || __any_sync(~0u, larger)) {
      most_low = fmaxf(most_of_row(most_low) * scale, low);
      most_high = fmaxf(most_of_row(most_high) * scale, high);
      if (!first) {
        const float less_low = exp2_of(low - most_low), less_high = exp2_of(high - most_high);
        sum_low *= less_low, sum_high *= less_high;
#pragma unroll
        for (int i = 0; i < 2 * STEPS; i++)
          o[i][0] *= less_low, o[i][1] *= less_low, o[i][2] *= less_high, o[i][3] *= less_high;
      }
      low = most_low, high = most_high;
    }
  }

  INLINE void weights(float (&s)[4], float scale) {
    s[0] = exp2_of(fmaf(s[0], scale, -low)), s[1] = exp2_of(fmaf(s[1], scale, -low));
    s[2] = exp2_of(fmaf(s[2], scale, -high)), s[3] = exp2_of(fmaf(s[3], scale, -high));
    sum_low += s[0] + s[1], sum_high += s[2] + s[3];
  }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) forward(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  const u32 key = shared_start(raw), value = key + HALO_ROOM, query = value + HALO_ROOM;
  const u32 barrier = query + TILE_ROOM, value_barrier = barrier + 8;
  const Place at(a.heads);
  const Lane l;
  if (l.thread == 0) {
    barrier_init(barrier), barrier_init(value_barrier), barriers_ready();
    barrier_expect(barrier, TILE_BYTES + HALO_BYTES);
    copy_in(query, a.query, barrier, at.channel, at.x, at.y, at.image);
    copy_in(key, a.key, barrier, at.channel, at.x - LEAD_X - PAD, at.y - LEAD_Y, at.image);
    barrier_expect(value_barrier, HALO_BYTES);
    copy_in(value, a.value, value_barrier, at.channel, at.x - LEAD_X - PAD, at.y - LEAD_Y, at.image);
  }
  const Visibility visibility(l);
  const u32 kept = l.kept(query);
  __syncthreads();
  barrier_wait(barrier);

#pragma unroll 1
  for (int head = l.first_head; head < l.first_head + WARP_HEADS; head++) {
    const int step = head * STEPS;
    u32 q[STEPS][4];
    load_kept(q, kept, step);
    flip_signs(q, a.flip);
    Softmax softmax;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      constexpr int blocks = CHUNKS == 1 ? BLOCKS : 2 * CHUNK;
      float s[2 * CHUNK][4];
      u32 seen[CHUNK];
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        const int pair = chunk * CHUNK + i;
        const Hidden hidden = hidden_table.of[min(pair, PAIRS)][l.lane];
        float(&block)[2][4] = reinterpret_cast<float(&)[2][4]>(s[2 * i]);
        visibility.start(block, hidden);
        seen[i] = l.streamed(key, pair);
        scores(block, q, seen[i], step);
      }
      softmax.raise(s, blocks, a.scale_log2, chunk == 0);
      if (chunk == 0) barrier_wait(value_barrier);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) {
        float(&block)[2][4] = reinterpret_cast<float(&)[2][4]>(s[2 * i]);
        softmax.weights(block[0], a.scale_log2);
        softmax.weights(block[1], a.scale_log2);
        u32 p[4];
        pack_weights(p, block);
        add_weighted(softmax.o, p, seen[i] + (value - key), step);
      }
    }
    const float low = sum_of_row(softmax.sum_low), high = sum_of_row(softmax.sum_high);
    store_kept(kept, step, softmax.o, 1.0f / low, 1.0f / high);
    const int y = at.y + l.sub_y + l.group / SUB_W, x = at.x + l.sub_x + l.group % SUB_W;
    if (l.member == 0 && x < a.width) {
      float* lse = a.lse + at.pixel(a, head, y, x);
      if (y < a.height) lse[0] = (softmax.low + __log2f(low)) * LN2;
      if (y + NEXT_ROWS < a.height) lse[NEXT_ROWS * a.width] = (softmax.high + __log2f(high)) * LN2;
    }
  }
  writes_visible_to_copies();
  __syncthreads();
  if (l.thread == 0) {
    copy_out(query, a.out, at.channel, at.x, at.y, at.image);
    copies_have_read();
  }
}

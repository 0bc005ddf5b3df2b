// Maps of floats: fragments and their products in TF32, in one pass or in three, and kept pixels read where they lie.
//
// A pass takes the upper 11 bits of a number. Three of them split a number into these, `high`, and the rest, `low`, and
// leave out the product of the rests: products are as exact as those of fp32. Kept and seen numbers are split alike:
// gradients then meet the very logits that the log-sum-exp was made of, errors and all.

constexpr bool EXACT = PASSES == 3;
// Kept fragments are split once where registers hold both parts, else whenever they are multiplied.
constexpr bool SPLIT_ONCE = EXACT && KEPT_MAPS * DEPTH <= 64;
constexpr int VECTOR = PLANES ? 1 : DEPTH < 32 ? 2 : 4;  // channels of a weighted pixel that a lane loads at once
static_assert(!PLANES || (SIDE_BY_SIDE && SKIP % 2 == 0 && BAND_PIXELS % 2 == 0), "pairs of columns are loaded at once");

// Logits are natural, and rounded before anything is taken from them: the largest and the log-sum-exp then hold what
// each was, however large they are.
INLINE float power_of(float logit) { return exp2_of(__fmul_rn(logit, LOG2E)); }
INLINE float weight_of(float product, float factor, float less) {
  return power_of(__fsub_rn(__fmul_rn(product, factor), less));
}
INLINE float from_natural(float logit) { return logit; }
INLINE float log_sum_exp(float most, float sum) { return fmaf(__log2f(sum), LN2, most); }

// Of products' sum less some number: what the sum begins with, and what is then made of it.
INLINE float begin_less(float number) { return EXACT ? 0.0f : -number; }
INLINE float end_less(float sum, float number) { return EXACT ? sum - number : sum; }

// high: the upper bits, to the nearest
INLINE void split(u32& high, u32& low, u32 x) {
  high = x + 0x1000 & 0xFFFFE000;
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

// The same, but whenever it is asked for.
INLINE void split_anew(u32& high, u32& low, u32 x) { split(high, low, anew(x)); }

template <int N>
struct Operand {
  u32 high[N], low[N];

  Operand() = default;

  INLINE Operand(const u32 (&x)[N], void (*split)(u32&, u32&, u32) = ::split) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (EXACT)
        split(high[i], low[i], x[i]);
      else
        high[i] = x[i], low[i] = 0;
    }
  }
};

struct Fragments {  // of a unit's 16 pixels: 8 channels a step
  u32 of[STEPS][4], low[STEPS][4];

  INLINE Operand<4> operand(int step) const {
    if (!SPLIT_ONCE) return {of[step], split_anew};
    Operand<4> both;
#pragma unroll
    for (int i = 0; i < 4; i++) both.high[i] = of[step][i], both.low[i] = low[step][i];
    return both;
  }

  INLINE float number(int step, int i) const {
    const float high = __uint_as_float(of[step][i]);
    return SPLIT_ONCE ? high + __uint_as_float(low[step][i]) : high;
  }
};

struct Weights {  // of 16 pixels, the rows, and two blocks of 8 that are seen
  Operand<4> of[2];
};

// c += a b with b's registers `i` and `j`; products of a high and a low part go to `rest`, which may be `c`.
template <int N>
INLINE void multiply(float (&c)[4], float (&rest)[4], const Operand<4>& a, const Operand<N>& b, int i, int j) {
  if (EXACT) {
    multiply_floats(rest, a.low, b.high[i], b.high[j]);
    multiply_floats(rest, a.high, b.low[i], b.low[j]);
  }
  multiply_floats(c, a.high, b.high[i], b.high[j]);
}

// A row of weights has an even column as number t of the products' inner axis, and the odd one after it as number t + 4:
// so lanes hold what they need, and weigh two pixels side by side.
INLINE void pack_weights(Weights (&packed)[UNITS], const float (&p)[UNITS][2][4]) {
#pragma unroll
  for (int i = 0; i < 2 * UNITS; i++) {
    const float(&of)[4] = p[i / 2][i % 2];
    const u32 block[4] = {__float_as_uint(of[0]), __float_as_uint(of[2]), __float_as_uint(of[1]),
                          __float_as_uint(of[3])};
    packed[i / 2].of[i % 2] = Operand<4>(block);
  }
}

using Number = float;  // of a map

INLINE Number number_of(float x) { return x; }

using KeptMap = StridedMap<float>;

// A kept map, or results, as a lane reads and writes the pixels of its rows.
struct Kept {
  static constexpr int ROOM = 0;

  const KeptMap& map;
  const Place& at;
  const Lane& l;

  INLINE Kept(u32, const KeptMap& map, const Place& at, const Lane& l) : map(map), at(at), l(l) {}

  INLINE void copy_in(u32) const {}

  struct Pixels {  // of a unit
    Rows rows;
    float *low, *high;  // of the first head
  };

  INLINE Pixels pixels(int unit) const {
    const Rows rows(at, l, unit);
    float* low = map.data + at.image * map.image + at.channel * map.channel + rows.y * map.row + rows.x * map.column;
    return {rows, low, low + NEXT_ROWS * map.row};
  }

  // flip: the sign bit, or 0
  INLINE void load(Fragments (&kept)[UNITS], int head, u32 flip = 0) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const Pixels from = pixels(unit);
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 x[4];
        numbers(x, from, head, step);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] ^= flip;
        const Operand<4> both(x);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          kept[unit].of[step][i] = SPLIT_ONCE ? both.high[i] : x[i];
          if (SPLIT_ONCE) kept[unit].low[step][i] = both.low[i];
        }
      }
    }
  }

  // The sums over channels of these pixels' times another's.
  INLINE void products(Pair (&sums)[UNITS], const Fragments (&other)[UNITS], int head) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const Pixels from = pixels(unit);
      float low = 0.0f, high = 0.0f;
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 x[4];
        numbers(x, from, head, step);
        low = fmaf(other[unit].number(step, 0), __uint_as_float(x[0]), low);
        high = fmaf(other[unit].number(step, 1), __uint_as_float(x[1]), high);
        low = fmaf(other[unit].number(step, 2), __uint_as_float(x[2]), low);
        high = fmaf(other[unit].number(step, 3), __uint_as_float(x[3]), high);
      }
      sums[unit] = {sum_of_row(low), sum_of_row(high)};
    }
  }

  INLINE void numbers(u32 (&x)[4], const Pixels& from, int head, int step) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const long long channel = (head * DEPTH + step * 8 + i * 4 + l.member) * map.channel;
      x[2 * i] = from.rows.low_there ? __float_as_uint(from.low[channel]) : 0;
      x[2 * i + 1] = from.rows.high_there ? __float_as_uint(from.high[channel]) : 0;
    }
  }

  // Sums times a factor of their pixel.
  INLINE void store(int head, const float (&sums)[UNITS][SUMS][4], const Pair (&factors)[UNITS]) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const Pixels to = pixels(unit);
      if (to.rows.low_there) store(to.low, head, sums[unit], 0, factors[unit].low);
      if (to.rows.high_there) store(to.high, head, sums[unit], 2, factors[unit].high);
    }
  }

  // first: of the two of a fragment that belong to this row
  INLINE void store(float* to, int head, const float (&sum)[SUMS][4], int first, float factor) const {
#pragma unroll
    for (int n = 0; n < SUMS; n += VECTOR) {
      float* channel = to + (head * DEPTH + n * 8 + 2 * VECTOR * l.member) * map.channel;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if constexpr (VECTOR == 4)
          reinterpret_cast<float4*>(channel)[i] = {sum[n][first + i] * factor, sum[n + 1][first + i] * factor,
                                                   sum[n + 2][first + i] * factor, sum[n + 3][first + i] * factor};
        else if constexpr (VECTOR == 2)
          reinterpret_cast<float2*>(channel)[i] = {sum[n][first + i] * factor, sum[n + 1][first + i] * factor};
        else
          channel[i * map.channel] = sum[n][first + i] * factor;
      }
    }
  }
};

using ResultMap = KeptMap;
using Results = Kept;

template <typename... Maps>
INLINE void copy_out_all(const Lane&, const Maps&...) {}

// Where a lane finds what it loads of 16 pixels of a band, two blocks of 8, from `base` on.
struct Seen {
  u32 scored[2];       // pixel `group` of either block, or, where channels lie side by side, a row of four matrices
  u32 weighted[2][2];  // pixels 2 * `member` and the next of either block
  u32 base;
};

INLINE u32 seen_pixel(int pixel) { return swizzled(pixel * PIXEL_BYTES, HALO_PATTERN); }

INLINE Seen seen_of(u32 band, int pair, const Lane& l) {
  Seen seen;
  seen.base = band;
  if (!PLANES) {
    const int pixel = l.band_pixel(16 * pair + l.lane / 16 * 8 + (l.lane & 7));
    seen.scored[0] = seen_pixel(pixel) ^ (l.lane & 8) << 1;
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int first = 16 * pair + 8 * n, weighted = first + 2 * l.member;
    const int pixel = l.band_pixel(weighted, SIDE_BY_SIDE ? SEEN - 2 : SEEN - 1);
    if (PLANES) {
      seen.scored[n] = (l.member * BAND_PIXELS + l.band_pixel(first + l.group)) * 4;
      seen.weighted[n][0] = (l.group * BAND_PIXELS + pixel) * 4;
    } else {
      const u32 even = seen_pixel(pixel);
      const u32 odd = SIDE_BY_SIDE ? even + PART_BYTES ^ (HALO_PATTERN == 128 ? 16 : 0)
                                   : seen_pixel(l.band_pixel(weighted + 1));
      seen.weighted[n][0] = even ^ l.group * VECTOR * 4, seen.weighted[n][1] = odd ^ l.group * VECTOR * 4;
    }
  }
  return seen;
}

// Six words for each pair of a period are too many to hold.
INLINE Seen held(const Seen& seen) { return seen; }

// Of 8 channels: of either block the first 4, then the others.
INLINE void load_scored(u32 (&r)[4], const Seen& seen, u32 map, int head, int step) {
  if constexpr (PLANES) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      load(reinterpret_cast<u32(&)[1]>(r[i]),
           seen.scored[i / 2] + seen.base + map + (step * 8 + i % 2 * 4) * BAND_PIXELS * 4);
  } else {
    const int number = head * STEPS + step;
    const u32 address = (seen.scored[0] ^ number % 4 * 32) + seen.base + map + number / 4 * PART_ROOM;
    load_matrices<false>(r, address);
  }
}

// s += scores of a subtile with 16 pixels of a band, whose map lies `map` bytes later: two blocks of 8 columns
INLINE void add_scores(float (&s)[UNITS][2][4], const Fragments (&kept)[UNITS], const Seen& seen, u32 map, int head) {
  float rest[UNITS][2][4];  // its sums are of their own, so as not to wait for those
  zero(rest);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    u32 r[4];
    load_scored(r, seen, map, head, step);
    const Operand<4> b(r);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      const Operand<4> a = kept[unit].operand(step);
      multiply(s[unit][0], rest[unit][0], a, b, 0, 1);
      multiply(s[unit][1], rest[unit][1], a, b, 2, 3);
    }
  }
#pragma unroll
  for (int i = 0; EXACT && i < 8 * UNITS; i++) s[i / 8][i / 4 % 2][i % 4] += rest[i / 8][i / 4 % 2][i % 4];
}

// sums += weights @ the same 16 pixels. Matrix units cut off what does not fit into a sum: exact sums of many pixels are
// added up outside of them.
INLINE void add_weighted(float (&sums)[UNITS][SUMS][4], const Weights (&weights)[UNITS], const Seen& seen, u32 map,
                         int head) {
#pragma unroll
  for (int n = 0; n < SUMS; n += VECTOR) {
    float part[UNITS][VECTOR][4];
    zero(part);
#pragma unroll
    for (int block = 0; block < 2; block++) {
      u32 x[2 * VECTOR];  // of both pixels
      if constexpr (PLANES) {
        load(reinterpret_cast<u32(&)[2]>(x), seen.weighted[block][0] + seen.base + map + n * 8 * BAND_PIXELS * 4);
      } else {
#pragma unroll
        for (int i = 0; i < 2; i++)
          load(reinterpret_cast<u32(&)[VECTOR]>(x[i * VECTOR]),
               (seen.weighted[block][i] ^ head * DEPTH * 4) + seen.base + map + n / VECTOR * PART_ROOM);
      }
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const u32 both[2] = {x[i], x[VECTOR + i]};
        const Operand<2> pixels(both);
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
          float(&to)[4] = EXACT ? part[unit][i] : sums[unit][n + i];
          multiply(to, to, weights[unit].of[block], pixels, 0, 1);
        }
      }
    }
#pragma unroll
    for (int i = 0; EXACT && i < 4 * VECTOR * UNITS; i++) {
      const int unit = i / (4 * VECTOR), sum = i / 4 % VECTOR;
      sums[unit][n + sum][i % 4] += part[unit][sum][i % 4];
    }
  }
}

// Log-sum-exp and delta of the queries that are seen, of a halo's pixels in shared memory.
//
// Of floats a lane reads both for each of its columns, and takes them from what products have summed up. Of halves products
// take them too: sums begin with them, each in three bfloat16s whose sum it is, and a lane reads two of these for a block,
// for one query instead of two. That is an eighth of the reads.

constexpr bool IN_PRODUCTS = ELEMENT == 2;
constexpr int QUERY_WORDS = IN_PRODUCTS ? 3 : 2;
constexpr u32 ONE = 0x3F80, LEAST_LOGIT = 0xFE80;  // bfloat16s: 1, and -2^126

struct alignas(IN_PRODUCTS ? 4 : 8) Query {
  u32 words[QUERY_WORDS];  // log-sum-exp, delta; in products three parts of each, less than nothing, two in a word

  // lse: natural
  INLINE static Query of(float lse, float delta, float factor) {
    Query query;
    if (IN_PRODUCTS) {
      u32 parts[6];
      split(parts, -lse * LOG2E / factor);
      split(parts + 3, -delta);
#pragma unroll
      for (int i = 0; i < QUERY_WORDS; i++) query.words[i] = parts[2 * i] | parts[2 * i + 1] << 16;
    } else {
      query.words[0] = __float_as_uint(from_natural(lse)), query.words[1] = __float_as_uint(delta);
    }
    return query;
  }

  // One that is not in the map: it has no weight.
  INLINE static Query none() {
    Query query = {};
    query.words[0] = IN_PRODUCTS ? LEAST_LOGIT : 0x7F800000;
    return query;
  }

  INLINE static void split(u32* parts, float x) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
      parts[i] = pack_halves<true>(x, 0.0f);
      const float rest = x - __uint_as_float(parts[i] << 16);
      x = rest == rest ? rest : 0.0f;  // nothing is left of an infinity
    }
  }
};

// Rows of the products that sums begin with: which of the parts that a lane reads belong to which sum.
struct QueryRows {
  u32 lse, delta;

  INLINE QueryRows(const Lane& l) {
    lse = l.member == 0 ? ONE | ONE << 16 : l.member == 1 ? ONE : 0;
    delta = l.member == 2 ? ONE | ONE << 16 : l.member == 1 ? ONE << 16 : 0;
  }
};

// What a lane reads of two blocks of 8 pixels that are seen.
struct Queries {
  u32 parts[2];         // of pixel `group` of either block
  Query columns[2][2];  // of pixels 2 * `member` and the next

  INLINE Queries(const Query* band, int pair, const Lane& l) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int first = 16 * pair + 8 * n, column = first + 2 * l.member;
      if (IN_PRODUCTS) {
        parts[n] = band[l.band_pixel(first + l.group)].words[min(l.member, 2)];
      } else if (SIDE_BY_SIDE) {
        u32 words[4];
        load(words, shared_address(band + l.band_pixel(column, SEEN - 2)));
#pragma unroll
        for (int i = 0; i < 4; i++) columns[n][i / 2].words[i % 2] = words[i];
      } else {
        columns[n][0] = band[l.band_pixel(column)], columns[n][1] = band[l.band_pixel(column + 1)];
      }
    }
  }

  // What the sums of logits' products and of weights' gradients begin with.
  INLINE void begin(float (&s)[UNITS][2][4], float (&dp)[UNITS][2][4], const Visibility& visibility, const Hidden& hidden,
                    int pair, const QueryRows& rows) const {
    zero(dp);
    if (IN_PRODUCTS) {
      visibility.start(s, hidden, pair, rows.lse, parts);
#pragma unroll
      for (int i = 0; i < 2 * UNITS; i++) multiply_8_halves(dp[i / 2][i % 2], rows.delta, rows.delta, parts[i % 2]);
    } else {
      visibility.start(s, hidden, pair);
    }
  }

  // Of these sums, weights and gradients of logits.
  INLINE void end(float (&s)[UNITS][2][4], float (&dp)[UNITS][2][4], float factor) const {
#pragma unroll
    for (int i = 0; i < 8 * UNITS; i++) {
      float &weight = s[i / 8][i / 4 % 2][i % 4], &d = dp[i / 8][i / 4 % 2][i % 4];
      if (IN_PRODUCTS) {
        weight = power_of(__fmul_rn(weight, factor));
        d *= weight;
      } else {
        const Query& at_column = columns[i / 4 % 2][i % 2];
        weight = weight_of(weight, factor, __uint_as_float(at_column.words[0]));
        d = weight * (d - __uint_as_float(at_column.words[1]));
      }
    }
  }
};

// Log-sum-exp and delta of the queries that are seen, of a halo's pixels in shared memory.
//
// Of floats a lane reads both for each of its columns, and takes them from what products have summed up. Of halves,
// products take them away: sums begin with them, each as three bfloat16s whose sum it is, of which a lane reads two for
// a block. That is a quarter of the reads of shared memory, which are what these kernels wait for. What units cut off
// such a sum makes weights differ from the forward's by 1e-6 of the log-sum-exp or less.

constexpr bool IN_PRODUCTS = ELEMENT == 2;
constexpr int QUERY_WORDS = IN_PRODUCTS ? 3 : 2;
constexpr u32 ONE = 0x3F80, FAR_BELOW = 0xFE80;  // bfloat16s: 1, and -2^126

struct alignas(IN_PRODUCTS ? 4 : 8) Query {
  u32 words[QUERY_WORDS];  // log-sum-exp, delta; in products, three parts of minus each, two in a word

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
    query.words[0] = IN_PRODUCTS ? FAR_BELOW : 0x7F800000;
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
  u32 lse[2], delta[2];  // rows `group` and `group + 8`: alike, but each in a register of its own, as operands are

  INLINE QueryRows(const Lane& l) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      lse[i] = held(l.member == 0 ? ONE | ONE << 16 : l.member == 1 ? ONE : 0);
      delta[i] = held(l.member == 2 ? ONE | ONE << 16 : l.member == 1 ? ONE << 16 : 0);
    }
  }
};

// Where a lane reads them: bytes from a band's first query.
struct QueryPlaces {
  static constexpr int QUERY = sizeof(Query);

  const Lane& l;
  u32 of[PERIOD][2];  // of the pairs of a period, of either block

  INLINE QueryPlaces(const Lane& l) : l(l) {
#pragma unroll
    for (int i = 0; REPEATS && i < 2 * PERIOD; i++) of[i / 2][i % 2] = held(place(i / 2, i % 2));
  }

  // Floats are of the lane's first column.
  INLINE u32 place(int pair, int block) const {
    const int first = 16 * pair + 8 * block;
    if (IN_PRODUCTS) return l.band_pixel(first + l.group) * QUERY + min(l.member, 2) * 4;
    return l.band_pixel(first + 2 * l.member, SIDE_BY_SIDE ? SEEN - 2 : SEEN - 1) * QUERY;
  }

  INLINE u32 at(int pair, int number, int block) const {
    if (!repeats(number)) return place(pair, block);
    return of[number % PERIOD][block] + rows_below(pair, number) * HALO_W * QUERY;
  }
};

// What a lane reads of two blocks of 8 pixels that are seen.
struct Queries {
  u32 parts[2];         // of pixel `group` of either block
  Query columns[2][2];  // of pixels 2 * `member` and the next

  // band: address of its first query
  INLINE Queries(u32 band, const QueryPlaces& places, int pair, int number) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const u32 first = band + places.at(pair, number, n);
      if (IN_PRODUCTS) {
        load(reinterpret_cast<u32(&)[1]>(parts[n]), first);
      } else if (SIDE_BY_SIDE) {
        load(reinterpret_cast<u32(&)[4]>(columns[n]), first);
      } else {
        const Lane& l = places.l;
        load(reinterpret_cast<u32(&)[2]>(columns[n][0]), first);
        const u32 second = band + l.band_pixel(16 * pair + 8 * n + 2 * l.member + 1) * QueryPlaces::QUERY;
        load(reinterpret_cast<u32(&)[2]>(columns[n][1]), second);
      }
    }
  }

  // What the sums of logits' products and of weights' gradients begin with.
  INLINE void begin(float (&s)[UNITS][2][4], float (&dp)[UNITS][2][4], const Visibility& visibility,
                    const Hidden& hidden, int number, const QueryRows& rows) const {
    zero(dp);
    if (IN_PRODUCTS) {
      visibility.start(s, hidden, number, rows.lse, parts);
#pragma unroll
      for (int i = 0; i < 2 * UNITS; i++)
        multiply_8_halves(dp[i / 2][i % 2], rows.delta[0], rows.delta[1], parts[i % 2]);
    } else {
      visibility.start(s, hidden, number);
    }
  }

  // Of these sums, weights and gradients of logits.
  INLINE void end(float (&s)[UNITS][2][4], float (&dp)[UNITS][2][4], float factor) const {
#pragma unroll
    for (int i = 0; i < 8 * UNITS; i++) {
      float &weight = s[i / 8][i / 4 % 2][i % 4], &d = dp[i / 8][i / 4 % 2][i % 4];
      if (IN_PRODUCTS) {
        weight = power_of(weight * factor);
        d *= weight;
      } else {
        const Query& at_column = columns[i / 4 % 2][i % 2];
        weight = weight_of(weight, factor, __uint_as_float(at_column.words[0]));
        d = weight * (d - __uint_as_float(at_column.words[1]));
      }
    }
  }
};

// Visibility is a product of two small matrices, which starts the sum of a score instead of zero: a row of the first
// tells in which column and in which row of the subtile a pixel lies, a column of the second has, for each of these,
// zero or HIDDEN. Its operands are bfloat16, whatever maps are.
constexpr u32 HIDDEN = 0xFE80;  // -2^126: what it is added to vanishes beside it, and two of them are finite
constexpr u32 ONE = 0x3F80;
constexpr int WORDS = ceil_div(SUB_H + SUB_W, 8);  // registers of a column

struct alignas(8 * WORDS) Hidden {  // of two blocks of 8 pixels
  u32 block[2][WORDS];

  static constexpr Hidden at(int row, int lane) {
    Hidden hidden = {};
    for (int block = 0; block < 2; block++) {
      const int seen = 16 * (row % ROUNDED_PAIRS) + 8 * block + lane / 4;
      const int y = row / ROUNDED_PAIRS * SEEN_ROWS + seen / SEEN_W, x = seen % SEEN_W + SKIP - PAD;
      for (int i = 0; i < 2 * WORDS; i++) {
        const int place = i / 2 * 8 + lane % 4 * 2 + i % 2;
        const bool of_column = place < SUB_W;
        const int kept = of_column ? place : place - SUB_W;
        const int at = of_column ? x : y, kernel = of_column ? KERNEL_W : KERNEL_H;
        const bool met = seen < SEEN && at >= kept && at - kept < kernel;
        hidden.block[block][i / 2] |= (met || place >= SUB_W + SUB_H ? 0u : HIDDEN) << i % 2 * 16;
      }
    }
    return hidden;
  }
};

__device__ constexpr Table<Hidden, SEEN_BANDS * ROUNDED_PAIRS> hidden_table;

// Of a pair of blocks of what a subtile sees of a band; pairs past the last are hidden.
INLINE Hidden hidden_of(int seen_band, int pair, const Lane& l) {
  return hidden_table.of[seen_band * ROUNDED_PAIRS + pair][l.lane];
}

struct Visibility {
  u32 low[UNITS][WORDS], high[UNITS][WORDS];  // the first matrix's rows `group` and `group + 8`

  INLINE Visibility(const Lane& l) {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
      for (int word = 0; word < WORDS; word++) {
        low[unit][word] = place(unit, l.group, 8 * word + 2 * l.member);
        high[unit][word] = place(unit, l.group + 8, 8 * word + 2 * l.member);
      }
  }

  // One where `first` or the place after it is the row's column, or, past all columns, its row of the subtile.
  static INLINE u32 place(int unit, int row, int first) {
    const int column = row_x(unit, row), after = SUB_W + row_y(unit, row);
    return (first == column || first == after ? ONE : 0) |
           (first + 1 == column || first + 1 == after ? ONE << 16 : 0);
  }

  // s = 0 where pixels meet, else HIDDEN or twice that
  INLINE void start(float (&s)[UNITS][2][4], const Hidden& hidden) const {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
      for (int n = 0; n < 2; n++) start_block(s[unit][n], low[unit], high[unit], hidden.block[n]);
  }

  static INLINE void start_block(float (&c)[4], const u32 (&low)[WORDS], const u32 (&high)[WORDS],
                                 const u32 (&hidden)[WORDS]) {
    if constexpr (WORDS == 1) {
      product_of_halves(c, low[0], high[0], hidden[0]);
    } else {
      const u32 places[4] = {low[0], high[0], low[WORDS - 1], high[WORDS - 1]};
      c[0] = c[1] = c[2] = c[3] = 0.0f;
      multiply_halves<true>(c, places, hidden[0], hidden[WORDS - 1]);
    }
  }
};

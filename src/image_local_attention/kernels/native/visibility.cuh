// Visibility is a product of two small matrices, which starts the sum of a score instead of zero: a row of the first
// tells in which column and in which row of the subtile a pixel lies, a column of the second has, for each of these,
// zero or NOT_MET. Its operands are bfloat16, whatever maps are.
constexpr u32 HIDING = 0xFE00;   // -2^125, at the places of a row
constexpr u32 NOT_MET = 0x4000;  // 2, a single bit: what -2^126 is added to vanishes beside it, three are finite
constexpr int WORDS = ceil_div(SUB_H + SUB_W, 8);  // registers of a column

// Of the pairs of blocks that are unrolled together, which pixels do not meet: a bit for each number of a column.
struct Hidden {
  static constexpr int PAIRS_OF_WORD = 8 / WORDS;

  u32 bits[ceil_div(AT_ONCE, PAIRS_OF_WORD)] = {};

  // By how many bits a column's are turned to where NOT_MET has its own, in either half of a word.
  static constexpr int turn(int number, int block, int word) {
    return (number % PAIRS_OF_WORD * 2 + block) * WORDS + word;
  }

  // A register of a column. number: of the pair among those that are unrolled together.
  INLINE u32 column(int number, int block, int word) const {
    const u32 bits = this->bits[number / PAIRS_OF_WORD];
    const int turn = Hidden::turn(number, block, word);
    return (bits << turn | bits >> (-turn & 31)) & (NOT_MET | NOT_MET << 16);
  }
};

struct HiddenTable {
  Hidden of[SEEN_BANDS * STEPS_OF_BAND][32];

  constexpr HiddenTable() : of() {
    for (int step = 0; step < SEEN_BANDS * STEPS_OF_BAND; step++)
      for (int lane = 0; lane < 32; lane++)
        for (int number = 0; number < AT_ONCE; number++)
          for (int block = 0; block < 2; block++)
            for (int i = 0; i < 2 * WORDS; i++) {
              const int turn = Hidden::turn(number, block, i / 2);
              const int seen = 16 * (step % STEPS_OF_BAND * AT_ONCE + number) + 8 * block + lane / 4;
              const bool met = meets(step / STEPS_OF_BAND, seen, i / 2 * 8 + lane % 4 * 2 + i % 2);
              of[step][lane].bits[number / Hidden::PAIRS_OF_WORD] |= u32(!met) << (14 + i % 2 * 16 - turn & 31);
            }
  }

  // Whether the pixel seen as number `seen` of a band meets those at a place of rows.
  static constexpr bool meets(int band, int seen, int place) {
    if (place >= SUB_W + SUB_H) return true;
    const int y = band * SEEN_ROWS + seen / SEEN_W, x = seen % SEEN_W + SKIP - PAD;
    const bool of_column = place < SUB_W;
    const int kept = of_column ? place : place - SUB_W;
    const int at = of_column ? x : y, kernel = of_column ? KERNEL_W : KERNEL_H;
    return seen < SEEN && at >= kept && at - kept < kernel;
  }
};

__device__ constexpr HiddenTable hidden_table;

// Of the pairs of a step, of what a subtile sees of a band.
INLINE Hidden hidden_of(int seen_band, int step, const Lane& l) {
  return hidden_table.of[seen_band * STEPS_OF_BAND + step][l.lane];
}

struct Visibility {
  u32 low[UNITS][WORDS], high[UNITS][WORDS];  // the first matrix's rows `group` and `group + 8`

  INLINE Visibility(const Lane& l) {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
      for (int word = 0; word < WORDS; word++) {
        low[unit][word] = held(place(unit, l.group, 8 * word + 2 * l.member));
        high[unit][word] = held(place(unit, l.group + 8, 8 * word + 2 * l.member));
      }
  }

  // HIDING where `first` or the place after it is the row's column, or, past all columns, its row of the subtile.
  static INLINE u32 place(int unit, int row, int first) {
    const int column = row_x(unit, row), after = SUB_W + row_y(unit, row);
    return (first == column || first == after ? HIDING : 0) |
           (first + 1 == column || first + 1 == after ? HIDING << 16 : 0);
  }

  // s = 0 where pixels meet, else -2^126 or twice that
  INLINE void start(float (&s)[UNITS][2][4], const Hidden& hidden, int number) const {
    zero(s);
#pragma unroll
    for (int i = 0; i < 2 * UNITS; i++) {
      const int unit = i / 2, n = i % 2;
      if (WORDS == 1)
        multiply_8_halves(s[unit][n], low[unit][0], high[unit][0], hidden.column(number, n, 0));
      else
        multiply_16(s[unit][n], low[unit][0], high[unit][0], low[unit][WORDS - 1], high[unit][WORDS - 1],
                    hidden.column(number, n, 0), hidden.column(number, n, WORDS - 1));
    }
  }

  // The same, plus the product of rows, `group` and `group + 8` of any unit, with columns of either block.
  INLINE void start(float (&s)[UNITS][2][4], const Hidden& hidden, int number, const u32 (&rows)[2],
                    const u32 (&columns)[2]) const {
    if (WORDS > 1)
      start(s, hidden, number);
    else
      zero(s);
#pragma unroll
    for (int i = 0; i < 2 * UNITS; i++) {
      const int unit = i / 2, n = i % 2;
      if (WORDS == 1)
        multiply_16(s[unit][n], low[unit][0], high[unit][0], rows[0], rows[1], hidden.column(number, n, 0),
                    columns[n]);
      else
        multiply_8_halves(s[unit][n], rows[0], rows[1], columns[n]);
    }
  }

  static INLINE void multiply_16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3};
    multiply_halves<true>(c, a, b0, b1);
  }
};

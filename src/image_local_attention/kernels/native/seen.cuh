// Pairs of blocks of 8 pixels that a subtile sees of a band: in which order they are taken, and where they lie.
//
// To find where takes as many operations as a product. But pairs repeat where a few of them fill whole rows, and whole
// patterns that copies are swizzled in: PERIOD pairs later, they lie PERIOD_ROWS rows below. So those of a period are
// found once, if it is known which of the pairs that are unrolled repeat them. Bands repeat each other in any case.

// Between rows of a band.
constexpr int ROW_BYTES = HALO_W * PIXEL_BYTES * (ROWS_OF_PLANES ? CHANNELS : 1);

constexpr int period_of_pairs() {
  const int pattern = HALO_PATTERN == 16 ? 1 : 8 * HALO_PATTERN;
  for (int pairs = 1; pairs < PAIRS; pairs++)
    if (16 * pairs % SEEN_W == 0 && 16 * pairs / SEEN_W * ROW_BYTES % pattern == 0) return pairs;
  return PAIRS;
}

constexpr int PERIOD = period_of_pairs(), PERIOD_ROWS = 16 * PERIOD / SEEN_W;
constexpr bool REPEATS = 2 * PERIOD <= SEEN_BANDS * PAIRS &&
                         (STEPS_OF_BAND == 1 || (AT_ONCE % PERIOD == 0 && 16 * ROUNDED_PAIRS == SEEN));

// Whether a pair repeats that of number `number % PERIOD`. number: of the pair among those that are unrolled together.
// The last of a band may have fewer pixels than others.
constexpr INLINE bool repeats(int number) {
  return REPEATS && (PERIOD == PAIRS || SEEN % 16 == 0 || number < PAIRS - 1);
}

// From where that one is.
INLINE int rows_below(int pair, int number) { return ((pair - number) / PERIOD + number / PERIOD) * PERIOD_ROWS; }

// Where a lane finds the pairs of a band.
struct SeenPairs {
  const Lane& l;
  Seen of[PERIOD];

  INLINE SeenPairs(const Lane& l) : l(l) {
#pragma unroll
    for (int pair = 0; REPEATS && pair < PERIOD; pair++) of[pair] = held(seen_of(0, pair, l));
  }

  INLINE Seen at(u32 band, int pair, int number) const {
    if (!repeats(number)) return seen_of(band, pair, l);
    Seen seen = of[number % PERIOD];
    seen.base = band + rows_below(pair, number) * ROW_BYTES;
    return seen;
  }
};

// Calls `see(pair, known, number)` for each pair of a band. known: what `know` gives of those that are unrolled together,
// of the number of that step.
template <typename Know, typename See>
INLINE void for_each_pair(Know know, See see) {
  const auto see_some = [&](int first, int count) {
    const auto known = know(first / AT_ONCE);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (i < count) see(first + i, known, i);
  };
  constexpr int REST = PAIRS % AT_ONCE;
#pragma unroll 1
  for (int first = 0; first < PAIRS - REST; first += AT_ONCE) see_some(first, AT_ONCE);
  if (REST) see_some(PAIRS - REST, REST);
}

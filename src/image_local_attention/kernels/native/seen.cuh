// Pairs of blocks of 8 pixels that a subtile sees, band after band: where they lie, and in what order they are taken.

// Where a lane finds the pairs of a band. It works this out for those of a period, and whenever it asks for others.
struct SeenPairs {
  const Lane& l;
  Seen of[PERIOD];

  INLINE SeenPairs(const Lane& l) : l(l) {
#pragma unroll
    for (int pair = 0; REPEATS && pair < PERIOD; pair++) of[pair] = held(seen_of(0, pair, l));
  }

  // number: of the pair among those that are unrolled together
  INLINE Seen at(u32 band, int pair, int number) const {
    if (!repeats(number)) return seen_of(band, pair, l);
    Seen seen = of[number % PERIOD];
    seen.base = band + rows_below(pair, number) * ROW_BYTES;
    return seen;
  }
};

// Calls `see(pair, hidden, number among those of `hidden`)` for each pair of blocks of a band.
template <typename See>
INLINE void for_each_pair(int seen_band, const Lane& l, See see) {
  const auto see_some = [&](int first, int count) {
    const Hidden hidden = hidden_of(seen_band, first / AT_ONCE, l);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (i < count) see(first + i, hidden, i);
  };
  constexpr int REST = PAIRS % AT_ONCE;
#pragma unroll 1
  for (int first = 0; first < PAIRS - REST; first += AT_ONCE) see_some(first, AT_ONCE);
  if (REST) see_some(PAIRS - REST, REST);
}

// What `hopper.cuh` and `products.py` provide, on a CPU. Products run when they are waited for: until then sums are NaN.

template <int PATTERN, int NEXT = 16>
struct SharedRows {
  u32 at;

  explicit SharedRows(u32 address) : at(address) {
    if (address % 16) fprintf(stderr, "rows begin amid a vector\n"), std::abort();
  }
  SharedRows later(int bytes) const { return SharedRows(at + bytes); }
};

template <int NEXT>
struct SharedBlocks {
  u32 at;

  explicit SharedBlocks(u32 address) : at(address) {}
  SharedBlocks later(int bytes) const { return SharedBlocks(at + bytes); }
};

namespace emulator {

// A lane's sums of products under way, away from where they belong.
struct Away {
  float* home;
  std::vector<float> sums;
};

// An operand in shared memory: where its number (row, column) lies before it is swizzled.
struct Matrix {
  u32 at;
  int pattern, next;
  bool blocks;  // of 8x8 numbers, else rows of a pattern

  Matrix() = default;
  template <int PATTERN, int NEXT>
  Matrix(const SharedRows<PATTERN, NEXT>& rows) : at(rows.at), pattern(PATTERN), next(NEXT), blocks(false) {}
  template <int NEXT>
  Matrix(const SharedBlocks<NEXT>& rows) : at(rows.at), pattern(16), next(NEXT), blocks(true) {}

  float number(int row, int column) const {
    const u32 address = at + row * pattern + 2 * column / pattern * next + 2 * column % pattern;
    uint16_t half;
    memcpy(&half, memory_at(address ^ (address >> 7 & pattern / 16 - 1) << 4), 2);
    return half_to_float(half, BF16);
  }
};

// A lane's part in the product of its warp: a group's four do alike with 16 rows each.
struct GroupProduct {
  float* home;  // of the sums
  int columns;
  bool held, across, add;  // the first factor is in registers; rows in shared memory are of the inner axis; it is added
  u32 a[4];
  Matrix left, right;
  float* sums;
};

struct Products {
  std::vector<Away> away;
  std::vector<GroupProduct> issued;
  std::vector<size_t> ends;  // of groups of them
  bool begun = false;
};

inline Products& products() {
  static std::vector<Products> of(1024);
  return of[current];
}

// Rows of the first factor of a warp, and of the second: columns by 16.
inline void multiply_rows(GroupProduct* lanes) {
  static float left[16][16], right[256][16];
  const GroupProduct& one = lanes[0];
  const int warp = current / LANES % 4;
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++) {
      const GroupProduct& from = lanes[row % 8 * 4 + k % 8 / 2];
      left[row][k] = one.held ? half_to_float(from.a[row / 8 + k / 8 * 2] >> 16 * (k % 2), BF16)
                              : one.across ? one.left.number(k, 16 * warp + row) : one.left.number(16 * warp + row, k);
    }
  for (int column = 0; column < one.columns; column++)
    for (int k = 0; k < 16; k++)
      right[column][k] = one.across ? one.right.number(k, column) : one.right.number(column, k);
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < one.columns / 2; i++) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = one.add ? lanes[lane].sums[i] : 0.0;
      for (int k = 0; k < 16; k++) sum += double(left[row][k]) * double(right[column][k]);
      lanes[lane].sums[i] = float(sum);
    }
}

inline void issue(GroupProduct product) {
  Products& mine = products();
  if (!mine.begun) fprintf(stderr, "products that were not begun\n"), std::abort();
  bool there = false;
  for (const Away& away : mine.away) there |= away.home == product.home;
  if (!there) {
    const int count = product.columns / 2;
    mine.away.push_back({product.home, std::vector<float>(product.home, product.home + count)});
    std::fill_n(product.home, count, NAN);
  }
  mine.issued.push_back(product);
}

}  // namespace emulator

inline void sync_group(int group) {
  static emulator::Meeting<int> meetings[8];
  meetings[group].meet(emulator::current % 128, 128, 0, [](int*) {});
}

inline u32 __funnelshift_r(u32 low, u32 high, int shift) { return u64(high) << 32 >> shift | low >> shift; }

inline void store(u32 address, const u32 (&x)[4]) { memcpy(emulator::memory_at(address), x, 16); }

inline void store_vector(void* to, const u32 (&x)[4]) {
  if ((u64)to % 16) fprintf(stderr, "a vector that is stored amid another\n"), std::abort();
  memcpy(to, x, 16);
}

inline void begin_products() { emulator::products().begun = true; }

inline void end_products() { emulator::products().ends.push_back(emulator::products().issued.size()); }

template <int PENDING>
void wait_for_products() {
  using namespace emulator;
  const int groups = int(products().ends.size()) - PENDING;
  const size_t done = groups > 0 ? products().ends[groups - 1] : 0;
  for (size_t i = 0; i < done; i++) {
    GroupProduct product = products().issued[i];
    for (Away& away : products().away)
      if (away.home == product.home) product.sums = away.sums.data();
    in_warp(product, multiply_rows);
  }
  Products& mine = products();
  if (!PENDING && done < mine.issued.size()) fprintf(stderr, "products that did not end\n"), std::abort();
  mine.issued.erase(mine.issued.begin(), mine.issued.begin() + done);
  mine.ends.erase(mine.ends.begin(), mine.ends.begin() + std::max(groups, 0));
  for (size_t& end : mine.ends) end -= done;
  std::vector<Away> under_way;
  for (const Away& away : mine.away) {
    bool done = true;
    for (const GroupProduct& product : mine.issued) done &= product.home != away.home;
    if (done)
      std::copy(away.sums.begin(), away.sums.end(), away.home);
    else
      under_way.push_back(away);
  }
  mine.away = under_way;
  mine.begun = false;
}

// Scores: rows are pixels, or, in planes, channels.
template <int N, typename A, typename B>
void multiply_pixels(float (&sums)[N], const A& a, const B& b, bool add) {
  emulator::issue({sums, 2 * N, false, bool(PLANES), add, {}, a, b});
}

// Weighted sums of channels.
template <int N, typename B>
void multiply_channels(float (&sums)[N], const u32 (&a)[4], const B& b, bool add) {
  emulator::issue({sums, 2 * N, true, !PLANES, add, {a[0], a[1], a[2], a[3]}, {}, b});
}

template <int N>
void written(float (&)[N]) {}

template <int COUNT>
void more_registers() {}

template <int COUNT>
void fewer_registers() {}

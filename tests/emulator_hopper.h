// What `hopper.cuh` and `walk.py` provide, on a CPU. Products run when they are waited for: until then sums are NaN.

struct uint4 {
  u32 x, y, z, w;
};

struct SharedRows {
  u32 at;

  explicit SharedRows(u32 address) : at(address) {
    if (address % 16) fprintf(stderr, "rows begin amid a vector\n"), std::abort();
  }
  SharedRows later(int bytes) const { return SharedRows(at + bytes); }
};

namespace emulator {

// A lane's sums of products under way, away from where they belong.
struct Away {
  float* home;
  std::vector<float> sums;
};

// A lane's part in the product of its warp: a group's four do alike with 16 rows each.
struct GroupProduct {
  float* home;  // of the sums
  int columns;
  bool held, add;  // the first factor is in registers; its product is added
  u32 a[4], a_at, b_at;
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

inline float half_at(u32 address) {
  uint16_t half;
  memcpy(&half, raw + (address ^ (address >> 7 & 7) << 4), 2);
  return half_to_float(half, BF16);
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
                              : half_at(one.a_at + (16 * warp + row) * 128 + 2 * k);
    }
  for (int column = 0; column < one.columns; column++)
    for (int k = 0; k < 16; k++)
      right[column][k] = half_at(one.b_at + (one.held ? k * 128 + 2 * column : column * 128 + 2 * k));
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

template <int N>
void multiply_shared(float (&sums)[N], const SharedRows& a, const SharedRows& b, bool add) {
  emulator::issue({sums, 2 * N, false, add, {}, a.at, b.at});
}

template <int N>
void multiply_held(float (&sums)[N], const u32 (&a)[4], const SharedRows& b, bool add) {
  emulator::issue({sums, 2 * N, true, add, {a[0], a[1], a[2], a[3]}, 0, b.at});
}

template <int N>
void written(float (&)[N]) {}

template <int COUNT>
void more_registers() {}

template <int COUNT>
void fewer_registers() {}

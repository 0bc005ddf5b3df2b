// Copies of tiles and halos between maps and shared memory, and the barriers that tell of them.

// Copies the box that begins at (channel, x, y, image); what lies outside of the map is zero.
INLINE void copy_in(u32 to, const TensorMap& map, u32 barrier, int channel, int x, int y, int image) {
  if (!PLANES)
    copy_box_in(to, map, barrier, channel, x, y, image);
  else if (ROWS_OF_PLANES)
    copy_box_in(to, map, barrier, x, channel, y, image);
  else
    copy_box_in(to, map, barrier, x, y, channel, image);
}

// Writes a tile that all threads have written to shared memory, of channels side by side or of rows of planes; what lies
// outside of the map is left out.
INLINE void copy_out(u32 from, const TensorMap& map, int channel, int x, int y, int image) {
  copy_box_out(from, map, PLANES ? x : channel, PLANES ? channel : x, y, image);
}

// A copy swizzles 16 bytes within 128: their number by that of the 128 bytes, up to the pattern's width.
INLINE u32 swizzled(u32 offset, int width) { return offset ^ (offset >> 7 & (width / 16 - 1)) << 4; }

// The halos of one map or two, band after band: a band lies in slot `band % SLOTS`, that of the second map BAND_ROOM after
// that of the first.
struct Halos {
  static constexpr int ROOM = HALO_MAPS * SLOTS * BAND_ROOM, BARRIERS = 32 * SLOTS;  // bytes
  enum Map { FIRST, SECOND, READ };  // barriers of a slot: either map has come; all warps have read both

  const TensorMap &first, &second;
  const Place& at;
  u32 start, barriers;
  int y, x;  // of the halo's first pixel

  // lead: from the first pixel that a kept one sees to it
  INLINE Halos(u32 start, u32 barriers, const TensorMap& first, const TensorMap& second, const Place& at, int lead_y,
               int lead_x)
      : first(first), second(second), at(at), start(start), barriers(barriers), y(at.y - lead_y),
        x(at.x - lead_x - PAD) {}

  INLINE Halos(u32 start, u32 barriers, const TensorMap& map, const Place& at, int lead_y, int lead_x)
      : Halos(start, barriers, map, map, at, lead_y, lead_x) {}

  INLINE u32 band(int number) const { return start + number % SLOTS * HALO_MAPS * BAND_ROOM; }

  INLINE u32 barrier(int band, Map which) const { return barriers + band % SLOTS * 32 + which * 8; }

  INLINE void init() const {
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
      barrier_init(barrier(slot, FIRST), 1), barrier_init(barrier(slot, SECOND), 1);
      barrier_init(barrier(slot, READ), WARPS);
    }
    barriers_ready();
  }

  INLINE void fill(int number) const {
    fill(number, first, FIRST);
    if (HALO_MAPS == 2) fill(number, second, SECOND);
  }

  INLINE void fill(int number, const TensorMap& map, Map which) const {
    const u32 barrier = this->barrier(number, which);
    barrier_expect(barrier, BAND_BYTES);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      copy_in(band(number) + which * BAND_ROOM + part * PART_ROOM, map, barrier,
              at.channel + part * (PART_BYTES / ELEMENT), x, y + number * BAND_H, at.image);
  }

  // The first bands, into empty slots.
  INLINE void fill_all() const {
#pragma unroll
    for (int slot = 0; slot < min(SLOTS, BANDS); slot++) fill(slot);
  }

  INLINE void wait(int number, Map which) const { barrier_wait(barrier(number, which), number / SLOTS); }

  // Before a band: one of the warps fills the slot of the band before it anew, once all have read that.
  INLINE void refill(int number, const Lane& l) const {
    const int read = number - 1, next = read + SLOTS;
    if (WHOLE || read < 0 || next >= BANDS || read % WARPS != l.warp) return;
    barrier_wait(barrier(read, READ), read / SLOTS);
    if (l.lane == 0) {
      before_copies();
      fill(next);
    }
    __syncwarp();
  }

  // After a band.
  INLINE void release(int number, const Lane& l) const {
    if (WHOLE) return;
    __syncwarp();
    if (l.lane == 0) barrier_arrive(barrier(number, READ));
  }

  // Calls `see(band, seen_band)` for each band that this lane's warp takes, once its maps up to `last` have come.
  template <typename See>
  INLINE void for_each_band(const Lane& l, Map last, See see) const {
#pragma unroll 1
    for (int band = 0; band < BANDS; band++) {
      refill(band, l);
      wait(band, FIRST);
      if (last == SECOND) wait(band, SECOND);
      const int seen_band = l.seen_band(band);
      if (l.takes(seen_band)) see(band, seen_band);
      release(band, l);
    }
  }
};

// The tensor memory accelerator and mbarriers; included into `Machine`.
//
// A tensor map (PTX ISA, "Tensor-map") is opaque memory of 128 bytes; here its fields are kept apart, by address.
// A load arrives when a wait asks for it, or, with `adverse` schedules, its bytes are in place at once; in both cases
// they belong to nobody before a wait on its mbarrier has succeeded: then to the warps that waited, and after the
// next barrier to all. (PTX ISA, "cp.async.bulk.tensor", "mbarrier".)

static int element_bytes(const TensorMap& map) {  // PTX ISA, "tensormap.replace", field elemtype
  const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  return bytes[map.type % 13];
}

// Each row of the box: its bytes in shared memory from `offset` on, and where they are in global memory; nowhere, for
// rows or ends of rows outside of the tensor.
template <class F> bool each_row(const TensorMap& map, const s32* first, F body) {
  const int element = element_bytes(map), n = map.rank + 1;
  const u32 row_bytes = map.box[0] * element;
  u32 rows = 1;
  for (int i = 1; i < n; i++) rows *= map.box[i];
  for (u32 row = 0; row < rows; row++) {
    bool inside = first[0] >= 0;
    u64 address = map.address + (s64)first[0] * element;
    u32 rest = row;
    for (int i = 1; i < n; i++) {
      s64 at = first[i] + (s64)(rest % map.box[i]);
      rest /= map.box[i];
      inside &= at >= 0 && at < map.size[i];
      address += at * map.stride[i - 1];
    }
    s64 held = inside ? std::clamp<s64>(map.size[0] - (s64)first[0], 0, map.box[0]) : 0;
    if (!body(row * row_bytes, row_bytes, address, (u32)(held * element))) return false;
  }
  return true;
}
// Where a byte of the box is: in layouts with a swizzle the address is permuted, see `operand_address`.
static u32 box_address(const TensorMap& map, u32 base, u32 offset) {
  const u32 swizzled[] = {0, 0x10, 0x30, 0x70};
  const u32 address = base + offset;
  return address ^ (address >> 3 & swizzled[map.swizzle & 3]);
}

bool replace_tensor_map(Warp& w, u32 mask, const ReplaceTensorMap& x) {
  LANES(mask) {
    if (x.ordinal > 4) return fail("a tensor map of more than five dimensions");
    TensorMap& map = shared_maps[w.reg<u64>(x.address)[lane] + x.offset];
    const u64 value = x.value_bytes == 8 ? w.reg<u64>(x.value)[lane] : w.reg<u32>(x.value)[lane];
    switch (x.field) {
      case 0: map.address = value; break;
      case 1: map.rank = value; break;
      case 2: map.box[x.ordinal] = value; break;
      case 3: map.size[x.ordinal] = value; break;
      case 4: map.stride[x.ordinal] = value; break;
      case 5: if (value != 1) return fail("a tensor map that skips elements"); break;
      case 6: map.type = value; break;
      case 7: if (value != 0) return fail("an interleaved tensor map"); break;
      case 8: map.swizzle = value; break;
      case 9: if (value != 0) return fail("a tensor map that fills with NaN"); break;
    }
  }
  return true;
}

bool copy_tensor_map(Warp& w, u32 mask, const CopyTensorMap& x) {
  const int lane = __builtin_ctz(mask);
  const u64 from = w.reg<u64>(x.source)[lane] + x.source_offset, to = w.reg<u64>(x.target)[lane] + x.target_offset;
  if (!shared_maps.count(from)) return fail("no tensor map was made there (program %d)", program);
  if (!global(to, 8, w, lane)) return false;
  global_maps[to] = shared_maps[from];
  return true;
}

const TensorMap* tensor_map(u64 address) {
  auto found = global_maps.find(address);
  if (found != global_maps.end()) return &found->second;
  fail("no tensor map at this address (program %d): only those made in the kernel are known", program);
  return nullptr;
}
bool tile_place(Warp& w, int lane, const int* coordinates, int count, const TensorMap& map, s32* first) {
  if (map.rank > 4 || map.box[0] * element_bytes(map) % 16) return fail("a tensor map that is not one: %d dimensions, rows of %d bytes", map.rank + 1, map.box[0] * element_bytes(map));
  if (count != (int)map.rank + 1) return fail("%d coordinates for a tensor map of %d dimensions", count, map.rank + 1);
  for (int i = 0; i < count; i++) first[i] = w.reg<s32>(coordinates[i])[lane];
  return true;
}

bool load_tile(Warp& w, u32 mask, const LoadTile& x) {
  LANES(mask) {
    const u32 target = w.reg<u32>(x.target)[lane] + x.target_offset;
    const TensorMap* map = tensor_map(w.reg<u64>(x.map)[lane] + x.map_offset);
    s32 first[5];
    if (!map || !tile_place(w, lane, x.coordinates, x.count, *map, first)) return false;
    Tile tile = {w.reg<u32>(x.barrier)[lane] + x.barrier_offset, 0, {}, 0};
    bool fine = each_row(*map, first, [&](u32 offset, u32 row_bytes, u64 address, u32 held) {
      std::vector<u8> row(row_bytes, 0);
      for (u32 i = 0; i < held; i += element_bytes(*map)) {
        u8* from = global(address + i, element_bytes(*map), w, lane);
        if (!from) return false;
        check_global(address + i, element_bytes(*map), w, lane, false);
        std::memcpy(&row[i], from, element_bytes(*map));
      }
      for (u32 i = 0; i < row_bytes; i += 16) {
        Copy copy = {box_address(*map, target, offset + i), 16, (u8)lane, {0}};
        if (!shared_place(copy.target, 16, w, lane)) return false;
        std::memcpy(copy.data, &row[i], 16);
        check_shared_write(copy.target, 16, w, lane, PENDING);
        if (S.adverse) std::memcpy(shared_at(copy.target), copy.data, 16);
        tile.pieces.push_back(copy);
      }
      return true;
    });
    if (!fine) return false;
    tiles.push_back(tile);
  }
  return true;
}

void complete(Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) { barrier.phase++; barrier.pending = barrier.expected; }
}

bool init_mbarrier(Warp& w, u32 mask, const InitMbarrier& x) {
  LANES(mask) {
    const u32 address = w.reg<u32>(x.address)[lane] + x.offset, count = w.reg<u32>(x.arrivals)[lane];
    if (!shared_place(address, 8, w, lane)) return false;
    check_shared_write(address, 8, w, lane, WRITTEN);
    mbarriers[address] = {count, count, 0, 0, {0}};
  }
  return true;
}
Mbarrier* mbarrier_at(Warp& w, int lane, int place, int offset) {
  const u32 address = w.reg<u32>(place)[lane] + offset;
  auto found = mbarriers.find(address);
  if (found != mbarriers.end()) {
    check_shared_read(address, 8, w, lane);  // others see it after a barrier only
    return &found->second;
  }
  fail("no mbarrier was initialised there (program %d, warp %d, lane %d)", program, w.index, lane);
  return nullptr;
}
bool end_mbarrier(Warp& w, u32 mask, const EndMbarrier& x) {
  LANES(mask) {
    if (!mbarrier_at(w, lane, x.address, x.offset)) return false;
    mbarriers.erase(w.reg<u32>(x.address)[lane] + x.offset);
  }
  return true;
}
bool expect_bytes(Warp& w, u32 mask, const ExpectBytes& x) {
  LANES(mask) {
    Mbarrier* barrier = mbarrier_at(w, lane, x.address, x.offset);
    if (!barrier) return false;
    if (barrier->pending == 0) return fail("more arrivals than the mbarrier expects (program %d, warp %d)", program, w.index);
    barrier->bytes += w.reg<u32>(x.bytes)[lane];
    barrier->pending--;
    complete(*barrier);
  }
  return true;
}

// Whether the phase of that parity is over. The first try of each warp fails, so that who does not try again goes on
// without; and lets arrive what was asked for, as far as is needed.
bool wait_mbarrier(Warp& w, u32 mask, const WaitMbarrier& x) {
  const int first = __builtin_ctz(mask);  // lanes wait for one mbarrier together
  Mbarrier* barrier = mbarrier_at(w, first, x.address, x.offset);
  if (!barrier) return false;
  const u32 address = w.reg<u32>(x.address)[first] + x.offset, parity = w.reg<u32>(x.parity)[first] & 1;
  auto over = [&] { return (barrier->phase & 1) != parity; };
  const u32 phase = over() ? barrier->phase : barrier->phase + 1;
  const bool done = over() && barrier->tried[w.index] == phase;
  barrier->tried[w.index] = phase;
  LANES(mask) w.reg<u8>(x.result)[lane] = done;
  for (Tile& tile : tiles) {
    if (over()) break;
    if (tile.barrier != address || tile.phase) continue;
    for (const Copy& piece : tile.pieces) {
      std::memcpy(shared_at(piece.target), piece.data, 16);
      barrier->bytes -= 16;
    }
    tile.phase = barrier->phase + 1;
    complete(*barrier);
  }
  if (!done) { w.state = YIELDED; return true; }
  for (u32 number = 0; number < tiles.size(); number++) {
    Tile& tile = tiles[number];
    if (tile.barrier != address || !tile.phase || tile.phase > barrier->phase) continue;
    if (!tile.seen_by) for (const Copy& piece : tile.pieces) each_cell(piece.target, 16, [&](SharedCell& cell, u32) {
      if (cell.state != PENDING) return;  // something else is there by now
      cell.state = ARRIVED;
      cell.written_at = number;
      cell.writer.set(thread(w, first));
    });
    tile.seen_by |= 1u << w.index;
  }
  return true;
}

// Stores read shared memory until a wait for reading: here when they are issued, with `adverse` schedules at the wait.
bool write_tile(Warp& w, const TileStore& store) {
  return each_row(store.map, store.first, [&](u32 offset, u32, u64 address, u32 held) {
    for (u32 i = 0; i < held; i += element_bytes(store.map)) {
      const int size = element_bytes(store.map);
      const u8* value = shared_at(box_address(store.map, store.source, offset + i));
      u8* to = global(address + i, size, w, store.lane);
      if (!to) return false;
      check_global(address + i, size, w, store.lane, true, value);
      std::memcpy(to, value, size);
    }
    return true;
  });
}
bool store_tile(Warp& w, u32 mask, const StoreTile& x) {
  LANES(mask) {
    const TensorMap* map = tensor_map(w.reg<u64>(x.map)[lane] + x.map_offset);
    if (!map) return false;
    TileStore store = {*map, {0}, w.reg<u32>(x.source)[lane] + x.source_offset, (u8)lane, {}};
    if (!tile_place(w, lane, x.coordinates, x.count, *map, store.first)) return false;
    bool fine = each_row(*map, store.first, [&](u32 offset, u32 row_bytes, u64, u32) {
      for (u32 i = 0; i < row_bytes; i += 16) {
        const u32 address = box_address(*map, store.source, offset + i);
        if (!shared_place(address, 16, w, lane)) return false;
        check_shared_read(address, 16, w, lane, true);
        each_cell(address, 16, [&](SharedCell& cell, u32 number) { cell.operands++; store.cells.push_back(number); });
      }
      return true;
    });
    if (!fine || (!S.adverse && !write_tile(w, store))) return false;
    w.stores.push_back(std::move(store));
  }
  return true;
}
bool commit_stores(Warp& w, u32, const CommitStores&) {
  w.store_groups.push_back(std::move(w.stores));
  w.stores.clear();
  return true;
}
bool wait_stores(Warp& w, u32, const WaitStores& x) {
  while (w.store_groups.size() > (size_t)x.groups_left) {
    for (const TileStore& store : w.store_groups.front()) {
      if (S.adverse && !write_tile(w, store)) return false;
      for (u32 number : store.cells) { cells[number].operands--; cells[number].reader.add(thread(w, store.lane)); }
    }
    w.store_groups.pop_front();
  }
  return true;
}

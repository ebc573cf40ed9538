// The operations of `Machine` besides matrix products; included into it. Each gets the lanes that execute it.

bool nothing(Warp&, u32, const Nothing&) { return true; }

bool branch(Warp& w, u32 mask, const Branch& x) {
  if (mask == w.mask) { w.next = x.target; return true; }
  w.others.push_back({x.target, mask});
  w.nearest_other = std::min(w.nearest_other, x.target);
  w.mask &= ~mask;
  return true;
}

bool exit(Warp& w, u32 mask, const Exit&) {
  w.mask &= ~mask;
  w.alive &= ~mask;
  return true;
}

bool trap(Warp& w, u32, const Trap&) { return fail("trap (program %d, warp %d)", program, w.index); }

bool barrier(Warp& w, u32 mask, const Barrier&) {
  w.state = AT_BARRIER;
  w.barrier_at = at;
  return true;
}

bool warp_barrier(Warp& w, u32 mask, const WarpBarrier&) {
  w.step++;
  return true;
}

// Loads and stores of one or several elements. A register may be wider than an element (PTX ISA, "Operand Size
// Exceeding Instruction-Type Size"): loads extend it by zeros or by the sign.
void into_registers(Warp& w, int lane, const u8* from, int count, const int* values, int element_bytes, int register_bytes, bool is_signed) {
  for (int v = 0; v < count; v++) {
    u64 value = 0;
    std::memcpy(&value, from + v * element_bytes, element_bytes);
    if (is_signed && element_bytes < 8 && value >> (8 * element_bytes - 1) & 1) value |= ~0ull << 8 * element_bytes;
    std::memcpy(w.registers + values[v] + lane * register_bytes, &value, register_bytes);
  }
}
void from_registers(Warp& w, int lane, u8* to, int count, const int* values, int element_bytes, int register_bytes) {
  for (int v = 0; v < count; v++) std::memcpy(to + v * element_bytes, w.registers + values[v] + lane * register_bytes, element_bytes);
}
void global_addresses(Warp& w, int place, s64 offset, u64* addresses) {
  for (int lane = 0; lane < 32; lane++) addresses[lane] = w.reg<u64>(place)[lane] + offset;
}
void shared_addresses(Warp& w, int place, int offset, u32* addresses) {
  for (int lane = 0; lane < 32; lane++) addresses[lane] = w.reg<u32>(place)[lane] + offset;
}

bool load_global(Warp& w, u32 mask, const LoadGlobal& x) {
  u64 addresses[32];
  global_addresses(w, x.address, x.offset, addresses);
  const int bytes = x.count * x.element_bytes;
  count_sectors(addresses, mask, bytes);
  LANES(mask) {
    u8* from = global(addresses[lane], bytes, w, lane);
    if (!from) return false;
    check_global(addresses[lane], bytes, w, lane, false);
    into_registers(w, lane, from, x.count, x.values, x.element_bytes, x.register_bytes, x.is_signed);
  }
  return true;
}

bool store_global(Warp& w, u32 mask, const StoreGlobal& x) {
  u64 addresses[32];
  global_addresses(w, x.address, x.offset, addresses);
  const int bytes = x.count * x.element_bytes;
  count_sectors(addresses, mask, bytes);
  LANES(mask) {
    u8 value[32], *to = global(addresses[lane], bytes, w, lane);
    if (!to) return false;
    from_registers(w, lane, value, x.count, x.values, x.element_bytes, x.register_bytes);
    check_global(addresses[lane], bytes, w, lane, true, value);
    std::memcpy(to, value, bytes);
  }
  return true;
}

bool load_shared(Warp& w, u32 mask, const LoadShared& x) {
  u32 addresses[32];
  shared_addresses(w, x.address, x.offset, addresses);
  const int bytes = x.count * x.element_bytes;
  count_wavefronts(addresses, mask, bytes);
  LANES(mask) {
    if (!shared_place(addresses[lane], bytes, w, lane)) return false;
    check_shared_read(addresses[lane], bytes, w, lane);
    into_registers(w, lane, shared_at(addresses[lane]), x.count, x.values, x.element_bytes, x.register_bytes, x.is_signed);
  }
  return true;
}

bool store_shared(Warp& w, u32 mask, const StoreShared& x) {
  u32 addresses[32];
  shared_addresses(w, x.address, x.offset, addresses);
  const int bytes = x.count * x.element_bytes;
  count_wavefronts(addresses, mask, bytes);
  LANES(mask) {
    if (!shared_place(addresses[lane], bytes, w, lane)) return false;
    u8 value[32];
    from_registers(w, lane, value, x.count, x.values, x.element_bytes, x.register_bytes);
    check_shared_write(addresses[lane], bytes, w, lane, WRITTEN, value);
    std::memcpy(shared_at(addresses[lane]), value, bytes);
  }
  return true;
}

// atom and red: lane by lane, so that the order of programs and warps shows in sums of floats.
template <class T> static T combine(int function, T old, T value, T third) {
  switch (function) {
    case ADD_U32: case ADD_U64: case ADD_F32: case ADD_F64: return old + value;
    case MIN_U32: case MIN_S32: case MIN_U64: case MIN_S64: return std::min(old, value);
    case MAX_U32: case MAX_S32: case MAX_U64: case MAX_S64: return std::max(old, value);
    case EXCH_B32: case EXCH_B64: return value;
    case CAS_B32: case CAS_B64: return old == value ? third : old;
  }
  if constexpr (std::is_integral_v<T>) switch (function) {
    case AND_B32: case AND_B64: return old & value;
    case OR_B32: case OR_B64: return old | value;
    case XOR_B32: case XOR_B64: return old ^ value;
  } else if (function == MIN_F32 || function == MAX_F32) return function == MIN_F32 ? minimum(old, value) : maximum(old, value);
  return old;
}
template <class T> void combine_at(Warp& w, u8* at, const Atomic& x, int lane) {
  T old, value = w.reg<T>(x.value)[lane], third = x.third < 0 ? T() : w.reg<T>(x.third)[lane];
  std::memcpy(&old, at, sizeof old);
  T result = combine(x.function, old, value, third);
  std::memcpy(at, &result, sizeof result);
  if (x.old >= 0) w.reg<T>(x.old)[lane] = old;
}
bool atomic(Warp& w, u32 mask, const Atomic& x) {
  u64 addresses[32];
  u32 places[32];
  if (x.is_shared) { shared_addresses(w, x.address, x.offset, places); count_wavefronts(places, mask, x.bytes); }
  else { global_addresses(w, x.address, x.offset, addresses); count_sectors(addresses, mask, x.bytes); }
  LANES(mask) {
    u8* at;
    if (x.is_shared) {
      if (!shared_place(places[lane], x.bytes, w, lane)) return false;
      each_cell(places[lane], x.bytes, [&](SharedCell& cell, u32) { if (S.check && !written(cell)) find(NEVER_WRITTEN, w, SHARED_MEMORY); });
      check_shared_write(places[lane], x.bytes, w, lane, WRITTEN, nullptr, true);
      at = shared_at(places[lane]);
    } else {
      if (!(at = global(addresses[lane], x.bytes, w, lane))) return false;
      check_global(addresses[lane], x.bytes, w, lane, true, nullptr, true);
    }
    switch (x.function) {
      case ADD_F32: case MIN_F32: case MAX_F32: combine_at<f32>(w, at, x, lane); break;
      case ADD_F64: combine_at<f64>(w, at, x, lane); break;
      case MIN_S32: case MAX_S32: combine_at<s32>(w, at, x, lane); break;
      case MIN_S64: case MAX_S64: combine_at<s64>(w, at, x, lane); break;
      default: if (x.bytes == 8) combine_at<u64>(w, at, x, lane); else combine_at<u32>(w, at, x, lane);
    }
  }
  return true;
}

// cp.async (PTX ISA, "Non-bulk copy"): source_bytes of `bytes` are copied, the others become zeros. When they arrive
// is open until the wait; here at the wait, or, with `adverse` schedules, at once: what overwrites too early shows there.
bool copy_async(Warp& w, u32 mask, const CopyAsync& x) {
  u64 sources[32];
  global_addresses(w, x.source, x.source_offset, sources);
  const u32* source_bytes = w.reg<u32>(x.source_bytes);
  u32 reading = 0;
  LANES(mask) if (source_bytes[lane]) reading |= 1u << lane;
  count_sectors(sources, reading, x.bytes);
  LANES(mask) {
    Copy copy = {w.reg<u32>(x.target)[lane] + x.target_offset, x.bytes, (u8)lane, {0}};
    if (!shared_place(copy.target, x.bytes, w, lane)) return false;
    const u32 n = source_bytes[lane];
    if (n > (u32)x.bytes) return fail("cp.async of %u source bytes into %d (program %d, warp %d, lane %d)", n, x.bytes, program, w.index, lane);
    if (n && sources[lane] % x.bytes) return fail("misaligned source of cp.async (program %d, warp %d, lane %d)", program, w.index, lane);
    for (u32 i = 0; i < n; i += n == (u32)x.bytes ? n : 1) {  // whole, or byte by byte
      const int size = n == (u32)x.bytes ? n : 1;
      u8* from = global(sources[lane] + i, size, w, lane);
      if (!from) return false;
      check_global(sources[lane] + i, size, w, lane, false);
      std::memcpy(copy.data + i, from, size);
    }
    check_shared_write(copy.target, x.bytes, w, lane, PENDING);
    if (S.adverse) std::memcpy(shared_at(copy.target), copy.data, x.bytes);
    w.copies.push_back(copy);
  }
  return true;
}

bool commit_copies(Warp& w, u32, const CommitCopies&) {
  w.copy_groups.push_back(std::move(w.copies));
  w.copies.clear();
  return true;
}

// After it the copies of all but the last groups are written, for the lane that asked for them; a barrier shows them
// to others.
bool wait_copies(Warp& w, u32, const WaitCopies& x) {
  while (w.copy_groups.size() > (size_t)x.groups_left) {
    for (const Copy& copy : w.copy_groups.front()) {
      std::memcpy(shared_at(copy.target), copy.data, copy.bytes);
      if (!S.check) continue;
      each_cell(copy.target, copy.bytes, [&](SharedCell& cell, u32) {
        cell.state = WRITTEN;
        cell.writer.set(thread(w, copy.lane));
        cell.written_at = now;
      });
    }
    w.copy_groups.pop_front();
  }
  return true;
}

// PTX ISA, "shfl.sync": segments of lanes by the clamp's bits 8 to 12, the last lane in range by its bits 0 to 4.
bool shuffle(Warp& w, u32 mask, const Shuffle& x) {
  const u32 *values = w.reg<u32>(x.value), *lanes = w.reg<u32>(x.lane), *clamps = w.reg<u32>(x.clamp);
  u32 result[32];
  u8 in_range[32];
  for (int i = 0; i < 32; i++) {
    int by = lanes[i] & 31, segment = clamps[i] >> 8 & 31, end = clamps[i] & 31;
    int last = (i & segment) | (end & ~segment), first = i & segment;
    int from = x.mode == 0 ? i - by : x.mode == 1 ? i + by : x.mode == 2 ? i ^ by : first | (by & ~segment);
    in_range[i] = x.mode == 0 ? from >= last : from <= last;
    result[i] = values[in_range[i] ? from : i];
  }
  std::memcpy(w.reg<u32>(x.result), result, sizeof result);
  if (x.predicate >= 0) std::memcpy(w.reg<u8>(x.predicate), in_range, 32);
  return true;
}

bool vote(Warp& w, u32 mask, const Vote& x) {
  u32 ballot = 0;
  LANES(w.alive) ballot |= (u32)(w.reg<u8>(x.value)[lane] & 1) << lane;
  if (x.mode == 0) { std::fill_n(w.reg<u32>(x.result), 32, ballot); return true; }
  bool result = x.mode == 1 ? ballot != 0 : x.mode == 2 ? ballot == w.alive : ballot == 0 || ballot == w.alive;
  std::fill_n(w.reg<u8>(x.result), 32, result);
  return true;
}

bool elect(Warp& w, u32 mask, const Elect& x) {
  if (x.result >= 0) std::fill_n(w.reg<u32>(x.result), 32, 0);
  for (int i = 0; i < 32; i++) w.reg<u8>(x.predicate)[i] = i == 0;
  return true;
}

bool reduce_warp(Warp& w, u32 mask, const ReduceWarp& x) {
  const u32* values = w.reg<u32>(x.value);
  u32 result = 0;
  bool first = true;
  LANES(w.alive) {
    const u32 value = values[lane];
    if (first) result = value;
    else if (x.function == MIN_S32 || x.function == MAX_S32) result = combine<s32>(x.function, result, value, 0);
    else if (x.function == MIN_F32 || x.function == MAX_F32) result = as<u32>(combine<f32>(x.function, as<f32>(result), as<f32>(value), 0));
    else result = combine<u32>(x.function, result, value, 0);
    first = false;
  }
  std::fill_n(w.reg<u32>(x.result), 32, result);
  return true;
}

// mov between a register and a vector of parts.
bool pack(Warp& w, u32 mask, const Pack& x) {
  LANES(mask) for (int i = 0; i < x.count; i++)
    std::memcpy(w.registers + x.result + lane * x.part_bytes * x.count + i * x.part_bytes, w.registers + x.parts[i] + lane * x.part_bytes, x.part_bytes);
  return true;
}
bool unpack(Warp& w, u32 mask, const Unpack& x) {
  LANES(mask) {
    u8 value[16];
    std::memcpy(value, w.registers + x.value + lane * x.part_bytes * x.count, x.part_bytes * x.count);
    for (int i = 0; i < x.count; i++)
      if (x.parts[i] >= 0) std::memcpy(w.registers + x.parts[i] + lane * x.part_bytes, value + i * x.part_bytes, x.part_bytes);
  }
  return true;
}

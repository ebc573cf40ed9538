// The machine: runs a grid of programs, one after another; of a program its warps in turn, each from barrier to
// barrier; of a warp one instruction at a time for 32 lanes.
//
// Generated beside it are `operations.inc` (operand structures and numbers of `semantics.py`'s OPERATIONS, and their
// dispatch) and `elementwise.inc` (a function for each of its element-wise instructions).
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <vector>
#include "memory.hpp"

struct Instruction { int operation, whole_warp, guard, guard_negated, operands, registers, num_registers; };
// Where: a byte of an argument or, of those below 0, of shared memory or none.
struct Finding { int kind, instruction, count, argument; u64 where; int program, warp; };
enum { SHARED_MEMORY = -1, NOWHERE = -2 };
struct Settings {
  const Instruction* instructions; const int* operands; const Region* regions; const u8* initial_registers;
  int num_instructions, num_regions, register_bytes, threads, shared_bytes, shared_base, shared_shift;
  int grid[3], thread_index, lane_index, warp_index, program_index;
  int check, backwards, adverse;
  const int* programs; int num_programs;
};
// What each instruction did; of accesses: requests, their 32-byte sectors or wavefronts, and the fewest possible.
struct Count { u64 executed, requests, units, ideal, bytes; };
const int MAX_FINDINGS = 64;
struct Result { char error[512]; int error_at, num_findings; Finding findings[MAX_FINDINGS]; u64 executed; };

const u32 MOST_INSTRUCTIONS = 200000000;  // of a program, which else may run for ever
const u32 ALL = 0xffffffffu, POISON = 0x7fffdead;  // a NaN: what registers hold that a product will write

struct Copy { u32 target; int bytes; u8 lane, data[16]; };  // of cp.async
struct Product {                                            // of wgmma
  int group = -1, at = 0;
  const struct Wgmma* operands = nullptr;
  u64 a = 0, b = 0;               // descriptors
  u32 a_registers[4][32];         // as they were
  bool accumulate = false;
  std::vector<f32> initial, result;
  std::vector<u32> cells;         // of shared memory, that it reads
};
struct TensorMap { u64 address, stride[4]; u32 rank, box[5], size[5], type, swizzle; };
struct Mbarrier { u32 expected, pending; s64 bytes; u32 phase, tried[32]; };
struct Tile { u32 barrier, phase; std::vector<Copy> pieces; u32 seen_by; };  // of a load: phase 0 until it arrived
struct TileStore { TensorMap map; s32 first[5]; u32 source; u8 lane; std::vector<u32> cells; };
struct Waiting { int target; u32 mask; };  // lanes, and where
enum WarpState { RUNNING, AT_BARRIER, YIELDED, DONE };
struct Warp {
  u8* registers;
  int index, next, barrier_at, products_issued;
  u32 mask, alive, step;
  std::vector<Waiting> others;    // lanes that went elsewhere
  int nearest_other;              // the lowest instruction where some wait
  WarpState state;
  std::vector<Copy> copies;       // not committed
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<TileStore> stores;
  std::deque<std::vector<TileStore>> store_groups;
  std::deque<Product> products;
  int groups_committed;
  u32 fenced_at, wgmma_fenced_at;
  bool fence_holds;               // no group or wait has ended since
  // Of each register, by its place / 32: whether a product will write it; when it was last read or written.
  std::vector<u8> in_flight;
  std::vector<u32> touched_at;
  template <class T> T* reg(int place) { return (T*)(registers + place); }
};

#define LANES(mask) for (int lane = 0; lane < 32; lane++) if ((mask) >> lane & 1)
#include "elementwise.inc"
#include "operations.inc"
static const int NUM_ELEMENTWISE = sizeof(ELEMENTWISE) / sizeof(*ELEMENTWISE);

struct Machine {
  const Settings& S;
  Result& out;
  Count* counts;
  std::vector<u8> shared;
  std::vector<SharedCell> cells;
  std::vector<Warp> warps;
  std::vector<Tile> tiles;
  std::map<u64, TensorMap> shared_maps, global_maps;
  std::map<u32, Mbarrier> mbarriers;
  u32 epoch = 0, first_epoch = 0, now = 0;
  int program = 0, at = 0;        // the running program and instruction

  Machine(const Settings& s, Result& o, Count* c) : S(s), out(o), counts(c) {}
  const Instruction& current() const { return S.instructions[at]; }
  Count& count() { return counts[at]; }
  Thread thread(const Warp& w, int lane) const { return {first_epoch, epoch, w.step, (u8)w.index, (u8)lane}; }

  bool fail(const char* format, ...) {
    if (out.error[0]) return false;
    va_list list;
    va_start(list, format);
    vsnprintf(out.error, sizeof out.error, format, list);
    va_end(list);
    out.error_at = at;
    return false;
  }
  void find(Kind kind, const Warp& w, int argument = NOWHERE, u64 where = 0, int instruction = -1) {
    if (instruction < 0) instruction = at;
    for (int i = 0; i < out.num_findings; i++)
      if (out.findings[i].kind == kind && out.findings[i].instruction == instruction) { out.findings[i].count++; return; }
    if (out.num_findings < MAX_FINDINGS)
      out.findings[out.num_findings++] = {kind, instruction, 1, argument, where, program, w.index};
  }

  // Global memory. Returns the host's address, nothing after a fault.
  u8* global(u64 address, int bytes, const Warp& w, int lane) {
    u64 number = address >> 36;
    if (number == 0 || number > (u64)S.num_regions) {
      fail("%d bytes at %#llx, which belongs to no argument (program %d, warp %d, lane %d)", bytes,
           (unsigned long long)address, program, w.index, lane);
      return nullptr;
    }
    const Region& r = S.regions[number - 1];
    s64 offset = address - r.base;
    bool inside = offset >= (s64)r.first && offset + bytes <= (s64)r.last;
    if (inside && r.allowed) inside = !std::memchr(r.allowed + offset, 0, bytes);
    if (!inside) {
      fail("out of bounds: %d bytes at byte %lld of argument %d, which has bytes %lld to %lld%s (program %d, warp %d, "
           "lane %d)", bytes, (long long)(offset - r.first), r.index, 0ll, (long long)(r.last - r.first),
           r.allowed ? " with gaps" : "", program, w.index, lane);
      return nullptr;
    }
    if (address % bytes) {
      fail("misaligned: %d bytes at byte %lld of argument %d (program %d, warp %d, lane %d)", bytes,
           (long long)(offset - r.first), r.index, program, w.index, lane);
      return nullptr;
    }
    *r.touched = 1;
    return r.data + offset;
  }
  // `value`: what a write writes. Atomics do not race with one another.
  void check_global(u64 address, int bytes, const Warp& w, int lane, bool write, const u8* value = nullptr, bool atomic = false) {
    const Region& r = S.regions[(address >> 36) - 1];
    if (!r.cells) return;
    u64 offset = address - r.base;
    Thread t = thread(w, lane);
    for (u64 i = offset >> r.cell_shift; i <= (offset + bytes - 1) >> r.cell_shift; i++) {
      GlobalCell& cell = r.cells[i];
      u64 start = std::max(i << r.cell_shift, offset), end = std::min((i + 1) << r.cell_shift, offset + bytes);
      bool same = write && value && !std::memcmp(r.data + start, value + (start - offset), end - start);
      bool both_atomic = atomic && cell.writer.atomic;
      if ((cell.writer.of_another_program(t) && !both_atomic) || (write && cell.reader.of_another_program(t)))
        find(PROGRAMS_COLLIDE, w, r.index, offset - r.first);
      if (cell.writer.races(t) && !same && !both_atomic) {
        bool one_warp = cell.writer.warp == w.index;
        find(!write ? READ_AFTER_WRITE : one_warp ? LANES_COLLIDE : WRITE_AFTER_WRITE, w, r.index, offset - r.first);
      }
      if (write && cell.reader.races(t)) find(WRITE_AFTER_READ, w, r.index, offset - r.first);
      if (write) cell.writer.set(t, atomic); else cell.reader.add(t);
    }
  }
  void count_sectors(const u64* addresses, u32 mask, int bytes) {
    u64 sectors[32 * 2];
    int n = 0, lanes = __builtin_popcount(mask);
    if (!lanes) return;
    LANES(mask) for (u64 s = addresses[lane] >> 5; s <= (addresses[lane] + bytes - 1) >> 5; s++) sectors[n++] = s;
    std::sort(sectors, sectors + n);
    n = std::unique(sectors, sectors + n) - sectors;
    Count& c = count();
    c.requests++; c.units += n; c.ideal += (lanes * bytes + 31) / 32; c.bytes += lanes * bytes;
  }

  // Shared memory, by offset from its start.
  bool shared_place(u32 address, int bytes, const Warp& w, int lane) {
    s64 offset = (s64)address - S.shared_base;
    if (offset < 0 || offset + bytes > S.shared_bytes)
      return fail("out of bounds: %d bytes at byte %lld of %d bytes of shared memory (program %d, warp %d, lane %d)",
                  bytes, (long long)offset, S.shared_bytes, program, w.index, lane);
    if (address % bytes)
      return fail("misaligned: %d bytes at byte %lld of shared memory (program %d, warp %d, lane %d)", bytes,
                  (long long)offset, program, w.index, lane);
    return true;
  }
  u8* shared_at(u32 address) { return &shared[address - S.shared_base]; }
  template <class F> void each_cell(u32 address, int bytes, F body) {
    u32 offset = address - S.shared_base;
    for (u32 i = offset >> S.shared_shift; i <= (offset + bytes - 1) >> S.shared_shift; i++) body(cells[i], i);
  }
  bool written(const SharedCell& cell) const { return cell.state != NEVER && cell.writer.epoch >= first_epoch; }
  void check_shared_read(u32 address, int bytes, const Warp& w, int lane, bool by_product = false) {
    if (!S.check) return;
    Thread t = thread(w, lane);
    each_cell(address, bytes, [&](SharedCell& cell, u32 i) {
      u64 where = (u64)i << S.shared_shift;
      if (!written(cell)) find(NEVER_WRITTEN, w, SHARED_MEMORY, where);
      else if (cell.state == PENDING) find(COPY_PENDING, w, SHARED_MEMORY, where);
      else if (cell.state == ARRIVED) {
        const bool seen = tiles[cell.written_at].seen_by >> w.index & 1;
        if (!seen && cell.writer.races(t)) find(READ_AFTER_WRITE, w, SHARED_MEMORY, where);
      } else {
        if (cell.writer.races(t)) find(READ_AFTER_WRITE, w, SHARED_MEMORY, where);
        if (by_product && warps[cell.writer.warp].fenced_at <= cell.written_at && w.fenced_at <= cell.written_at)
          find(NO_PROXY_FENCE, w, SHARED_MEMORY, where);
      }
      cell.reader.add(t);
    });
  }
  void check_shared_write(u32 address, int bytes, const Warp& w, int lane, u8 state, const u8* value = nullptr, bool atomic = false) {
    if (!S.check) return;
    Thread t = thread(w, lane);
    u32 offset = address - S.shared_base;
    each_cell(address, bytes, [&](SharedCell& cell, u32 i) {
      u64 where = (u64)i << S.shared_shift;
      if (cell.operands) find(OPERAND_OVERWRITTEN, w, SHARED_MEMORY, where);
      if (written(cell)) {
        if (cell.state == PENDING) find(COPY_PENDING, w, SHARED_MEMORY, where);
        u32 size = std::min(1 << S.shared_shift, bytes);
        bool same = value && !std::memcmp(&shared[where], value + (where - offset), size);
        const bool seen = cell.state == ARRIVED && tiles[cell.written_at].seen_by >> w.index & 1;
        if (cell.writer.races(t) && !same && !seen && !(atomic && cell.writer.atomic))
          find(cell.writer.warp == w.index ? LANES_COLLIDE : WRITE_AFTER_WRITE, w, SHARED_MEMORY, where);
      }
      if (cell.reader.races(t)) find(WRITE_AFTER_READ, w, SHARED_MEMORY, where);
      cell.writer.set(t, atomic);
      cell.state = state;
      cell.written_at = now;
    });
  }
  // Wavefronts: at least as many as the most words that lanes want of one of 32 banks; without conflicts, one for
  // 32 words.
  void count_wavefronts(const u32* addresses, u32 mask, int bytes) {
    u32 words[32][64];
    int held[32] = {0}, most = 0, all = 0;
    LANES(mask) for (u32 word = addresses[lane] >> 2; word <= (addresses[lane] + bytes - 1) >> 2; word++) {
      u32* bank = words[word & 31];
      int& n = held[word & 31];
      if (std::find(bank, bank + n, word) == bank + n) { bank[n++] = word; all++; most = std::max(most, n); }
    }
    Count& c = count();
    c.requests++; c.units += most; c.ideal += (all + 31) / 32; c.bytes += __builtin_popcount(mask) * bytes;
  }

#include "operations.hpp"
#include "matrix.hpp"
#include "bulk.hpp"

  bool step(Warp& w);
  bool choose_lanes(Warp& w);
  bool run_warp(Warp& w);
  bool run_program(int number);
};

bool Machine::step(Warp& w) {
  const Instruction& instruction = current();
  u32 mask = w.mask;
  if (instruction.guard >= 0) {
    const u8* predicate = w.reg<u8>(instruction.guard);
    u32 on = 0;
    for (int lane = 0; lane < 32; lane++) on |= (u32)(predicate[lane] & 1) << lane;
    mask &= instruction.guard_negated ? ~on : on;
  }
  if (++now > MOST_INSTRUCTIONS) return fail("program %d does not end within %u million instructions", program, MOST_INSTRUCTIONS / 1000000);
  w.next++;
  if (!mask) return true;
  count().executed++;
  if (instruction.whole_warp && mask != w.alive)
    return fail("a warp-wide instruction for some lanes: %08x of %08x (program %d, warp %d)", mask, w.alive, program, w.index);
  const int* operands = S.operands + instruction.operands;
  for (int i = 0; i < instruction.num_registers; i++) {
    const int place = S.operands[instruction.registers + i] >> 5;
    if (w.in_flight[place]) find(ACCUMULATOR_TOUCHED, w);
    w.touched_at[place] = now;  // see `wgmma`
  }
  if (instruction.operation < NUM_ELEMENTWISE) {
    ELEMENTWISE[instruction.operation](w.registers, operands, mask);
    return true;
  }
  return dispatch(*this, w, mask, instruction.operation - NUM_ELEMENTWISE, operands);
}

// Lanes that parted go on apart until they meet: those furthest back first, but none beyond an instruction that all
// lanes must execute together, as far as others can still come.
bool Machine::choose_lanes(Warp& w) {
  w.others.push_back({w.next, w.mask});
  std::vector<Waiting> groups;
  for (const Waiting& other : w.others) {
    auto same = std::find_if(groups.begin(), groups.end(), [&](const Waiting& g) { return g.target == other.target; });
    if (!other.mask) continue;
    if (same == groups.end()) groups.push_back(other); else same->mask |= other.mask;
  }
  w.others.clear();
  w.nearest_other = S.num_instructions;
  w.mask = 0;
  if (groups.empty()) {
    w.state = DONE;
    bool copies = !w.copies.empty() || !w.stores.empty();
    for (auto& group : w.copy_groups) copies |= !group.empty();
    for (auto& group : w.store_groups) copies |= !group.empty();
    if (copies || !w.products.empty()) find(PENDING_AT_EXIT, w);
    return true;
  }
  auto blocked = [&](const Waiting& g) { return S.instructions[g.target].whole_warp && g.mask != w.alive; };
  std::sort(groups.begin(), groups.end(), [&](const Waiting& a, const Waiting& b) {
    return blocked(a) != blocked(b) ? blocked(b) : a.target < b.target;
  });
  w.next = groups[0].target;
  w.mask = groups[0].mask;
  w.others.assign(groups.begin() + 1, groups.end());
  for (const Waiting& other : w.others) w.nearest_other = std::min(w.nearest_other, other.target);
  at = w.next;
  if (blocked(groups[0]))
    return fail("a warp-wide instruction in a divergent warp: lanes %08x of %08x (program %d, warp %d)", w.mask, w.alive, program, w.index);
  return true;
}

bool Machine::run_warp(Warp& w) {
  while (w.state == RUNNING) {
    if (w.next >= S.num_instructions) return fail("runs beyond the last instruction");
    at = w.next;
    if (current().whole_warp && w.mask != w.alive) {
      if (!choose_lanes(w)) return false;
      at = w.next;
    }
    if (!step(w) || out.error[0]) return false;
    if (w.nearest_other <= w.next || !w.mask)
      if (!choose_lanes(w)) return false;
  }
  return true;
}

bool Machine::run_program(int number) {
  program = number;
  now = 0;
  first_epoch = ++epoch;
  std::fill(shared.begin(), shared.end(), 0xff);  // NaN in every float type
  tiles.clear();
  shared_maps.clear();
  mbarriers.clear();
  for (Warp& w : warps) {
    if (!w.products.empty() || !w.stores.empty() || !w.store_groups.empty())  // left by a program without a wait
      for (SharedCell& cell : cells) cell.operands = 0;
    u8* registers = w.registers;
    int index = w.index;
    u32 steps = w.step;
    w = Warp();
    w.registers = registers; w.index = index; w.step = steps;
    w.next = 0; w.mask = w.alive = ALL; w.nearest_other = S.num_instructions; w.state = RUNNING;
    w.groups_committed = w.products_issued = 0; w.fenced_at = w.wgmma_fenced_at = w.fence_holds = 0;
    w.in_flight.assign(S.register_bytes / 32 + 1, 0);
    w.touched_at.assign(S.register_bytes / 32 + 1, 0);
    std::memcpy(registers, S.initial_registers, S.register_bytes);
    for (int lane = 0; lane < 32; lane++) {
      w.reg<u32>(S.thread_index)[lane] = index * 32 + lane;
      w.reg<u32>(S.lane_index)[lane] = lane;
      w.reg<u32>(S.warp_index)[lane] = index;
      int place = number;
      for (int axis = 0; axis < 3; axis++) {
        w.reg<u32>(S.program_index + 128 * axis)[lane] = place % S.grid[axis];
        place /= S.grid[axis];
      }
    }
  }
  const int n = warps.size();
  int rounds = 0;  // of waits at mbarriers since the last barrier
  for (;;) {
    for (int i = 0; i < n; i++)
      if (!run_warp(warps[S.backwards ? n - 1 - i : i])) return false;
    int done = 0, yielded = 0, waiting = 0;
    for (Warp& w : warps) {
      done += w.state == DONE;
      yielded += w.state == YIELDED;
      if (w.state == AT_BARRIER) waiting = w.barrier_at;
    }
    for (Warp& w : warps)
      if (!yielded && w.products_issued != warps[w.index & ~3].products_issued)
        return fail("warps of a warpgroup issue different numbers of products (program %d, warp %d)", number, w.index);
    if (done == n) return true;
    if (yielded) {  // the others may let those pass that wait at an mbarrier
      if (++rounds > 1000) return fail("%d of %d warps of program %d wait for ever at an mbarrier", yielded, n, number);
      for (Warp& w : warps) if (w.state == YIELDED) w.state = RUNNING;
      continue;
    }
    rounds = 0;
    if (done) {
      fail("%d of %d warps of program %d never reach this barrier", done, n, number);
      out.error_at = waiting;
      return false;
    }
    epoch++;
    for (Warp& w : warps) w.state = RUNNING;
  }
}

extern "C" int run_grid(const Settings* settings, Result* result, Count* counts) {
  const Settings& S = *settings;
  Machine machine(S, *result, counts);
  const int n = (S.threads + 31) / 32;
  machine.shared.resize(S.shared_bytes + 16);
  machine.cells.resize((S.shared_bytes >> S.shared_shift) + 16);
  std::vector<u8> registers((size_t)S.register_bytes * n + 64);
  u8* aligned = (u8*)(((uintptr_t)registers.data() + 63) & ~(uintptr_t)63);
  machine.warps.resize(n);
  for (int i = 0; i < n; i++) {
    machine.warps[i].registers = aligned + (size_t)S.register_bytes * i;
    machine.warps[i].index = i;
    machine.warps[i].step = 0;
  }
  for (int i = 0; i < S.num_programs; i++)
    if (!machine.run_program(S.programs[S.backwards ? S.num_programs - 1 - i : i])) break;
  for (int i = 0; i < S.num_instructions; i++) result->executed += counts[i].executed;
  return result->error[0] != 0;
}

extern "C" int size_of(int what) {
  const int sizes[] = {sizeof(Instruction), sizeof(Region), sizeof(Settings), sizeof(Result), sizeof(Finding), sizeof(Count), sizeof(GlobalCell)};
  return sizes[what];
}

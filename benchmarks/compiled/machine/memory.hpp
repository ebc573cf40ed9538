// Global and shared memory, with who touched each byte last: what finds accesses out of bounds and races.
//
// Two accesses of one byte, at least one of them a write, are a race unless something orders them. Programs are never
// ordered. Warps of a program are ordered by barriers, which are counted: the epoch. Lanes of a warp are ordered by
// bar.warp.sync and by barriers, which are counted apart: the step. (PTX ISA, "Memory Consistency Model", asks for
// no less; that lanes of a warp run in step is not promised since sm_70.) Two writes of one value are let pass;
// who then reads it needs a barrier all the same.
#pragma once
#include "numbers.hpp"

// Kinds of findings, in the order of `program.py`'s sentences.
enum Kind : int {
  READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE, LANES_COLLIDE, PROGRAMS_COLLIDE, NEVER_WRITTEN,
  COPY_PENDING, OPERAND_OVERWRITTEN, NO_PROXY_FENCE, A_REGISTERS_CHANGED, ACCUMULATOR_TOUCHED, NO_WGMMA_FENCE,
  PENDING_AT_EXIT, KINDS
};

// Who accesses, and when. Epochs and steps are counted over the whole run, so that equal ones mean one program.
struct Thread { u32 first_epoch, epoch, step; u8 warp, lane; };

// The last access of some kind; all zero before the first. Of several readers that nothing orders, the fact is kept
// that they were several.
struct Stamp {
  u32 epoch, step;
  u8 warp, lane, other_programs, atomic;
  void set(const Thread& t, bool by_atomic = false) { *this = {t.epoch, t.step, t.warp, t.lane, 0, by_atomic}; }
  void add(const Thread& t) {
    const u8 several = 255;
    bool here = epoch == t.epoch, others = of_another_program(t);
    u8 w = here && warp != t.warp ? several : t.warp;
    u8 l = here && (w == several || (step == t.step && lane != t.lane)) ? several : t.lane;
    *this = {t.epoch, t.step, w, l, others, 0};
  }
  bool of_another_program(const Thread& t) const { return other_programs || (epoch && epoch < t.first_epoch); }
  // Whether nothing orders that access before t, of the same program: by another warp, or another lane of the warp.
  bool races(const Thread& t) const {
    return epoch == t.epoch && (warp != t.warp || (step == t.step && lane != t.lane));
  }
};

struct GlobalCell { Stamp writer, reader; };

// An argument: a view of a storage that others may share. `allowed` says of each byte of the storage whether the view
// has it; without it, it has all from `first` to `last`.
struct Region {
  u64 base;
  u8* data;
  u64 bytes, first, last;
  const u8* allowed;
  GlobalCell* cells;  // of the storage, one for 1 << cell_shift bytes; without them races are not looked for
  u8* touched;        // whether it is read or written at all
  int cell_shift, index;
};

enum : u8 { NEVER, WRITTEN, PENDING, ARRIVED };  // arrived: by the tensor memory accelerator
struct SharedCell {
  Stamp writer, reader;
  u32 written_at;  // instructions before it, for proxy fences; of what arrived, which tile it was
  u16 operands;    // products in flight that read it
  u8 state, unused;
};

// Matrix instructions; included into `Machine`.
//
// Products are summed in float64 and rounded once to float32: more exact than matrix units, whose sums of products
// are cut at some bits beyond float32's.

// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane 4·g + t holds rows g and g + 8 and, of 16-bit types,
// column pairs 2·t and 2·t + 8; of TF32 columns t and t + 4.
struct Place { int row, column; };
static Place a_place(int lane, int i, int per_register) {
  return {lane / 4 + i % 2 * 8, (lane % 4 + i / 2 * 4) * per_register};
}
static Place accumulator_place(int lane, int i) {  // i counts registers: four for 8 columns
  return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2};
}
void load_a(const u32* const* registers, int count, int type, f32 (*a)[16]) {
  for (int i = 0; i < count; i++) for (int lane = 0; lane < 32; lane++) {
    Place p = a_place(lane, i, type == 2 ? 1 : 2);
    u32 value = registers[i][lane];
    if (type == 2) a[p.row][p.column] = cut_to_tf32(as<f32>(value));
    else { a[p.row][p.column] = from_half(value, type); a[p.row][p.column + 1] = from_half(value >> 16, type); }
  }
}

// ldmatrix: matrix m is 8 rows of 16 bytes at the addresses of lanes 8·m to 8·m + 7; lane 4·r + c gets elements
// 2·c and 2·c + 1 of row r, or of column r.
bool load_matrices(Warp& w, u32 mask, const LoadMatrices& x) {
  u32 addresses[32];
  shared_addresses(w, x.address, x.offset, addresses);
  for (int m = 0; m < x.count; m++) {
    u16 rows[8][8];
    count_wavefronts(addresses + 8 * m, 0xff, 16);
    for (int r = 0; r < 8; r++) {
      const u32 address = addresses[8 * m + r];
      if (!shared_place(address, 16, w, 8 * m + r)) return false;
      check_shared_read(address, 16, w, 8 * m + r);
      std::memcpy(rows[r], shared_at(address), 16);
    }
    u32* result = w.reg<u32>(x.values[m]);
    for (int lane = 0; lane < 32; lane++) {
      const int r = lane / 4, c = lane % 4 * 2;
      result[lane] = x.transposed ? (u32)rows[c + 1][r] << 16 | rows[c][r] : (u32)rows[r][c + 1] << 16 | rows[r][c];
    }
  }
  return true;
}

bool store_matrices(Warp& w, u32 mask, const StoreMatrices& x) {
  u32 addresses[32];
  shared_addresses(w, x.address, x.offset, addresses);
  for (int m = 0; m < x.count; m++) {
    u16 rows[8][8];
    count_wavefronts(addresses + 8 * m, 0xff, 16);
    const u32* values = w.reg<u32>(x.values[m]);
    for (int lane = 0; lane < 32; lane++) {
      const int r = lane / 4, c = lane % 4 * 2;
      u16 low = values[lane], high = values[lane] >> 16;
      if (x.transposed) { rows[c][r] = low; rows[c + 1][r] = high; } else { rows[r][c] = low; rows[r][c + 1] = high; }
    }
    for (int r = 0; r < 8; r++) {
      const u32 address = addresses[8 * m + r];
      if (!shared_place(address, 16, w, 8 * m + r)) return false;
      check_shared_write(address, 16, w, 8 * m + r, WRITTEN, (const u8*)rows[r]);
      std::memcpy(shared_at(address), rows[r], 16);
    }
  }
  return true;
}

// mma.sync: D (16, 8) = A (16, k)·B (k, 8) + C. B's register i of lane 4·g + t holds column g and, of 16-bit types,
// rows 2·t + 8·i and the next; of TF32 row t + 4·i.
bool mma(Warp& w, u32 mask, const Mma& x) {
  const int per_register = x.type == 2 ? 1 : 2, num_b = x.k / (4 * per_register), num_a = 2 * num_b;
  f32 a[16][16], b[16][8];
  const u32* a_registers[4];
  for (int i = 0; i < num_a; i++) a_registers[i] = w.reg<u32>(x.a_b_c[i]);
  load_a(a_registers, num_a, x.type, a);
  for (int i = 0; i < num_b; i++) for (int lane = 0; lane < 32; lane++) {
    u32 value = w.reg<u32>(x.a_b_c[num_a + i])[lane];
    const int row = (lane % 4 + 4 * i) * per_register, column = lane / 4;
    if (x.type == 2) b[row][column] = cut_to_tf32(as<f32>(value));
    else { b[row][column] = from_half(value, x.type); b[row + 1][column] = from_half(value >> 16, x.type); }
  }
  f32 result[4][32];
  for (int i = 0; i < 4; i++) for (int lane = 0; lane < 32; lane++) {
    Place p = accumulator_place(lane, i);
    f64 sum = w.reg<f32>(x.a_b_c[num_a + num_b + i])[lane];
    for (int k = 0; k < x.k; k++) sum += (f64)a[p.row][k] * b[k][p.column];
    result[i][lane] = sum;
  }
  const int d[] = {x.d0, x.d1, x.d2, x.d3};
  for (int i = 0; i < 4; i++) std::memcpy(w.reg<f32>(d[i]), result[i], sizeof result[i]);
  return true;
}

// wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation"): D (64, n) = A (64, k)·B (k, n)
// + D by a warpgroup; its warp i has rows 16·i to 16·i + 15. It runs until a wait covers its group. A, from shared
// memory, and B are read at any time until then: here when it is issued, with `adverse` schedules at the wait.
//
// Descriptor ("Matrix Descriptor Format"): bits 0-13 start address, 16-29 leading and 32-45 stride byte offset, all
// in units of 16 bytes; 49-51 base offset; 62-63 swizzle: none, 128, 64, 32 bytes. ("Shared Memory Matrix Layout",
// "Strides".) Core matrices are 8 rows of 16 bytes, and with a swizzle rows of its width; in a swizzled layout,
// address bits 7 to 9 are added without carry to bits 4 to 6, as many as the width has.
static u32 operand_address(u64 descriptor, int row, int k, bool transposed, int element) {
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62, width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  u32 address = start;
  if (!transposed) {  // k runs along the bytes of a row
    address += row / 8 * stride + row % 8 * width;
    address += mode == 0 ? k * element / 16 * leading + k * element % 16 : k * element;
  } else {            // rows of A or columns of B run along the bytes
    const int per = width / element;
    address += row / per * (mode == 0 ? stride : leading) + k / 8 * (mode == 0 ? leading : stride) + k % 8 * width + row % per * element;
  }
  const u32 swizzled[] = {0, 0x70, 0x30, 0x10};
  return address ^ (address >> 3 & swizzled[mode]);
}

template <class F> void each_operand(const Warp& w, const Product& product, F body) {
  const Wgmma& x = *product.operands;
  const int element = x.type == 2 ? 4 : 2;
  if (!x.a_in_registers)
    for (int r = 0; r < 16; r++) for (int k = 0; k < x.k; k++)
      body(operand_address(product.a, w.index % 4 * 16 + r, k, x.transpose_a, element), element, r, k, false);
  for (int n = 0; n < x.n; n++) for (int k = 0; k < x.k; k++)
    body(operand_address(product.b, n, k, x.transpose_b, element), element, n, k, true);
}

void multiply(Warp& w, Product& product) {
  const Wgmma& x = *product.operands;
  static thread_local f32 a[16][16], b[16][256];
  static thread_local f64 sums[16][256];
  if (x.a_in_registers) {
    const int places[] = {x.a0, x.a1, x.a2, x.a3};
    const u32* registers[4];
    for (int i = 0; i < 4; i++) registers[i] = S.adverse ? w.reg<u32>(places[i]) : product.a_registers[i];
    load_a(registers, 4, x.type, a);
  }
  each_operand(w, product, [&](u32 address, int element, int i, int k, bool is_b) {
    f32 value;
    if (element == 4) { std::memcpy(&value, shared_at(address), 4); value = cut_to_tf32(value); }
    else { u16 bits; std::memcpy(&bits, shared_at(address), 2); value = from_half(bits, x.type); }
    if (is_b) b[k][i] = value; else a[i][k] = value;
  });
  const f32 sign = x.negate_a == x.negate_b ? 1 : -1;
  for (int r = 0; r < 16; r++) {
    std::fill_n(sums[r], x.n, 0.);
    for (int k = 0; k < x.k; k++) for (int n = 0; n < x.n; n++) sums[r][n] += (f64)(sign * a[r][k]) * b[k][n];
  }
  product.result.resize(x.count * 32);
  for (int i = 0; i < x.count; i++) for (int lane = 0; lane < 32; lane++) {
    Place p = accumulator_place(lane, i);
    product.result[i * 32 + lane] = sums[p.row][p.column] + (product.accumulate ? product.initial[i * 32 + lane] : 0.f);
  }
}

static bool same_accumulators(const Product& p, const Product& q) {
  return p.operands->count == q.operands->count && !std::memcmp(p.operands->d, q.operands->d, p.operands->count * sizeof(int));
}

bool wgmma(Warp& w, u32 mask, const Wgmma& x) {
  Product product;
  product.operands = &x;
  product.at = at;
  w.products_issued++;
  const int descriptors[] = {x.a0, x.b};
  for (int i = x.a_in_registers; i < 2; i++) {
    const u64* values = w.reg<u64>(descriptors[i]);
    for (int lane = 1; lane < 32; lane++) if (values[lane] != values[0]) return fail("a descriptor that differs between lanes (program %d, warp %d)", program, w.index);
    if (values[0] >> 49 & 7) return fail("a descriptor with a base offset, which this machine does not know");
    (i ? product.b : product.a) = values[0];
  }
  if (x.a_in_registers) {
    const int places[] = {x.a0, x.a1, x.a2, x.a3};
    for (int i = 0; i < 4; i++) std::memcpy(product.a_registers[i], w.reg<u32>(places[i]), 128);
  }
  bool inside = true;
  each_operand(w, product, [&](u32 address, int element, int, int, bool) {
    if (!inside || !(inside = shared_place(address, element, w, 0)) || !S.check) return;
    check_shared_read(address, element, w, 0, true);
    each_cell(address, element, [&](SharedCell& cell, u32 i) { cell.operands++; product.cells.push_back(i); });
  });
  if (!inside) return false;
  product.accumulate = w.reg<u8>(x.accumulate)[0] & 1;
  Product* before = nullptr;  // one in flight with the same accumulators: the hardware keeps their order
  for (Product& p : w.products) if (same_accumulators(p, product)) before = &p;
  // A fence has to come between the last access to a register and a product that reads or writes it, except where
  // products of one shape follow each other on the same accumulators. What stands between a fence and the end of the
  // group after it is let pass: the compiler lets conversions and the zeros that begin a sum sink there, and ptxas puts
  // them above again, which benchmarks/hopper.py looks for in the machine code.
  if (w.fence_holds) w.wgmma_fenced_at = now;
  bool fenced = w.wgmma_fenced_at > 0, taken = false;
  auto look = [&](int place) { fenced &= w.touched_at[place >> 5] < w.wgmma_fenced_at; taken |= w.in_flight[place >> 5]; };
  if (x.a_in_registers) for (int place : {x.a0, x.a1, x.a2, x.a3}) look(place);
  if (!before) for (int i = 0; i < x.count; i++) look(x.d[i]);
  if (!fenced) find(NO_WGMMA_FENCE, w);
  if (taken) find(ACCUMULATOR_TOUCHED, w);
  if (product.accumulate && !before) {
    product.initial.resize(x.count * 32);
    for (int i = 0; i < x.count; i++) std::memcpy(&product.initial[i * 32], w.reg<f32>(x.d[i]), 128);
  }
  if (!S.adverse) {
    if (product.accumulate && before) product.initial = before->result;
    multiply(w, product);
  }
  for (int i = 0; i < x.count; i++) {
    w.in_flight[x.d[i] >> 5] = 1;
    std::fill_n(w.reg<u32>(x.d[i]), 32, POISON);
  }
  w.products.push_back(std::move(product));
  return true;
}

bool fence_wgmma(Warp& w, u32, const FenceWgmma&) { w.wgmma_fenced_at = now; w.fence_holds = true; return true; }
bool fence_proxy(Warp& w, u32, const FenceProxy&) { w.fenced_at = now; return true; }

bool commit_wgmma(Warp& w, u32 mask, const CommitWgmma&) {
  for (Product& p : w.products) if (p.group < 0) p.group = w.groups_committed;
  w.groups_committed++;
  w.fence_holds = false;
  return true;
}

bool wait_wgmma(Warp& w, u32 mask, const WaitWgmma& x) {
  w.fence_holds = false;
  while (!w.products.empty() && w.products.front().group >= 0 && w.products.front().group < w.groups_committed - x.groups_left) {
    Product p = std::move(w.products.front());
    w.products.pop_front();
    if (S.adverse) multiply(w, p);
    const int places[] = {p.operands->a0, p.operands->a1, p.operands->a2, p.operands->a3};
    for (int i = 0; i < 4 && p.operands->a_in_registers; i++)
      if (std::memcmp(p.a_registers[i], w.reg<u32>(places[i]), 128)) { find(A_REGISTERS_CHANGED, w, NOWHERE, 0, p.at); break; }
    for (u32 i : p.cells) { cells[i].operands--; cells[i].reader.add(thread(w, 0)); }
    Product* after = nullptr;
    for (Product& later : w.products) if (!after && same_accumulators(later, p)) after = &later;
    if (after) {
      if (S.adverse && after->accumulate) after->initial = p.result;
      continue;  // the registers are still that one's
    }
    for (int i = 0; i < p.operands->count; i++) {
      w.in_flight[p.operands->d[i] >> 5] = 0;
      std::memcpy(w.reg<f32>(p.operands->d[i]), &p.result[i * 32], 128);
    }
  }
  return true;
}

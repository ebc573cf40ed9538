// The functions of `semantics.py`'s expressions: number formats, and integer instructions that C has no operator for.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64;
typedef float f32; typedef double f64;

// The bits of a register as a value of the same width; integers of other widths by conversion.
template <class To, class From> static inline To as(From from) {
  if constexpr (sizeof(To) == sizeof(From)) { To to; std::memcpy(&to, &from, sizeof to); return to; }
  else return (To)from;
}

// bfloat16 is the upper half of a float32; rounded to nearest, ties to even. NaN has one pattern in PTX.
static inline f32 from_bf16(u16 bits) { return as<f32>((u32)bits << 16); }
static inline u16 to_bf16(f32 value) {
  if (value != value) return 0x7fff;
  u32 bits = as<u32>(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline f32 from_f16(u16 bits) { return as<_Float16>(bits); }
static inline u16 to_f16(f32 value) { return value != value ? 0x7fff : as<u16>((_Float16)value); }
static inline f32 from_half(u16 bits, bool bf16) { return bf16 ? from_bf16(bits) : from_f16(bits); }
// a·b + c rounded to float32 so that rounding it again is as rounding once: to odd where it is not exact.
static inline f32 fma_to_odd(f32 a, f32 b, f32 c) {
  f64 exact = (f64)a * b + c;
  f32 result = exact;
  if ((f64)result == exact || result != result || std::isinf(result)) return result;
  u32 bits = as<u32>(result) - (std::fabs((f64)result) > std::fabs(exact));
  return as<f32>(bits | 1);
}
// TF32 has the upper 19 bits of a float32; matrix units do not look at the others.
static inline f32 cut_to_tf32(f32 value) { return as<f32>(as<u32>(value) & 0xffffe000); }
static inline f32 round_to_tf32(f32 value) {
  return std::isfinite(value) ? as<f32>((as<u32>(value) + 0x1000) & 0xffffe000) : value;
}
static inline f32 flush(f32 value) { return std::fabs(value) < std::numeric_limits<f32>::min() ? std::copysign(0.f, value) : value; }
// NaN only if both are; −0 < +0.
template <class T> static inline T minimum(T a, T b) {
  return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T> static inline T maximum(T a, T b) {
  return a != a ? b : b != b ? a : a > b || (a == b && std::signbit(b)) ? a : b;
}
// Out of range gives the nearest integer, NaN zero.
template <class T> static inline T to_integer(f32 value) {
  if (value != value) return 0;
  f64 low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return value <= low ? std::numeric_limits<T>::min() : value >= high ? std::numeric_limits<T>::max() : (T)value;
}

// Division by zero is undefined in PTX, and must not end this process.
template <class T> static inline T divide(T a, T b) { return b == 0 ? (T)-1 : std::is_signed_v<T> && b == (T)-1 ? (T)(0 - (u64)a) : a / b; }
template <class T> static inline T remainder(T a, T b) { return b == 0 ? a : std::is_signed_v<T> && b == (T)-1 ? 0 : a % b; }
static inline u64 high_product(u64 a, u64 b) { return (unsigned __int128)a * b >> 64; }
static inline s64 high_product(s64 a, s64 b) { return (__int128)a * b >> 64; }
// Shifts by the width or more give zeros, or signs.
template <class T> static inline T shift_left(T a, u32 n) { return n >= 8 * sizeof(T) ? 0 : (T)(a << n); }
template <class T> static inline T shift_right(T a, u32 n) {
  const u32 last = 8 * sizeof(T) - 1;
  return n > last ? (std::is_signed_v<T> ? a >> last : 0) : a >> n;
}
static inline u32 funnel_left(u32 low, u32 high, u32 n) { return ((u64)high << 32 | low) << n >> 32; }
static inline u32 funnel_right(u32 low, u32 high, u32 n) { return ((u64)high << 32 | low) >> n; }
template <class T> static inline u32 leading_zeros(T a) { return a ? __builtin_clzll(a) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); }
template <class T> static inline T reverse_bits(T a) {
  T result = 0;
  for (u32 i = 0; i < 8 * sizeof(T); i++) result |= (T)(a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
// PTX ISA, bfe: bits beyond the top are the sign's, of unsigned ones zero.
template <class T> static inline T extract_bits(T a, u32 start, u32 count) {
  const u32 width = 8 * sizeof(T);
  start &= 255; count &= 255;
  if (count == 0) return 0;
  typedef std::make_unsigned_t<T> U;
  bool sign = std::is_signed_v<T> && (U)a >> std::min(start + count - 1, width - 1) & 1;
  U value = start >= width ? 0 : (U)a >> start;
  u32 held = start >= width ? 0 : std::min(count, width - start);
  U mask = held >= width ? ~(U)0 : ((U)1 << held) - 1;
  return sign ? value | ~mask : value & mask;
}
template <class T> static inline T insert_bits(T a, T into, u32 start, u32 count) {
  const u32 width = 8 * sizeof(T);
  start &= 255; count &= 255;
  if (start >= width || count == 0) return into;
  T mask = (count >= width ? ~(T)0 : ((T)1 << count) - 1) << start;
  return (into & ~mask) | (a << start & mask);
}
// PTX ISA, prmt: each nibble of the selector names a byte of b:a; its top bit spreads that byte's sign.
static inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 pick = selector >> 4 * i & 15, byte = bytes >> 8 * (pick & 7) & 255;
    result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
// PTX ISA, lop3: the table's bit 4·a + 2·b + c is the result's.
static inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

// Attention on the CPU: of a decode step over a quantized key/value cache, and of a prompt over rows as they came.
//
// What it computes is `icw_int8kv::attention` (icw_compile/kernels/inductor.py); how:
//
// * Split-KV ("flash decoding"): a unit of work is one (batch, key/value head, chunk of positions). Threads draw units
//   from a counter, so a half-empty cache or a busy core does not leave the others waiting. Each unit yields
//   (largest score, sum, weighted values) per query row; whoever finishes a head's last chunk merges them, in order.
// * A query row is one (query head, query token) of the head's group: each K and V row is read once for all of them.
// * The int8 rows are multiplied as they are. The *other* operand is made integer: a query row becomes three signed
//   base-256 digits over a power of two (23 bits: bfloat16 values are exact down to 2^-15 of the row's largest), or two
//   where they do, a block's softmax weights (value scale included) two or three unsigned digits over the largest. The
//   digits of several rows fill the 16 rows or columns of one AMX tile, so an integer tile multiplication per digit
//   costs nothing extra, no int8 row is ever converted to floating point, and the sums are exact.
// * Rows of 4 bits become rows of 8, in registers where that can be, or else in a block's buffer, which stays in the
//   first- or second-level cache: a shuffle looks up 64 of them at once. From there on they are rows of 8 bits.
// * Rows of the next block are asked for while a block is read: hardware does not follow keys and values in turn.
// * A block whose mask leaves nothing is skipped before its rows, or their scales, are read.
// * Rows of which the cache keeps the values themselves are left out of the blocks and are a unit of their own, in
//   float32.
// * A prompt is read in tiles of query rows. Its keys are laid out as those of the integers are, two bfloat16 where four
//   bytes were, and so are its values: a product of pairs takes the place of two digits.
//
// Tried and not taken: three weight digits for 16-bit models (0-9 % slower, the error is the output's rounding either
// way), blocks of 512 positions (no faster), interleaving a block's values for all channels at once (half as fast). Not
// tried: bfloat16 products for int8 rows, every one of which would have to be converted first.
//
// Engines, by what the build targets and the machine allows: AMX int8 tiles, for heads of up to 256 channels; AVX-512
// VNNI, of up to 1,024; plain C++ in float32 that the compiler vectorises (AVX2, NEON, anything), which also takes scales
// that the others do not.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define ICW_VNNI 1
#ifdef __AVX512BF16__
#define ICW_BF16 1
#endif
#if defined(__AMX_INT8__) && defined(__linux__) && defined(__x86_64__)
#define ICW_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

constexpr int64_t kBlock = 256;  // Positions per online-softmax step: a block's K rows stay in L1/L2.
constexpr int64_t kFewTokens = 16;   // More query tokens are a prompt, of which
constexpr int64_t kTileRows = 128;   // so many query rows are read at a time.
constexpr int64_t kOwnChunk = 1024;  // Rows of a prompt in a unit of work.
// Of integer products, whose sums are exact in float32 up to 2^24 / (127 * 128) channels.
constexpr int64_t kMostChannels = 1024;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// An additive mask at or below kDead is a spelling of minus infinity (finfo.min) for a row that also has kLive values.
constexpr float kDead = -1e30f, kLive = -1e29f;

enum class Type { kFloat32, kBFloat16, kFloat16, kFloat64, kBool };
enum class Engine { kPortable, kVnni, kAmx };
// In what order the channels of accumulated values are.
enum class Order { kNatural, kOfBytes, kOfPairs };

size_t size_of(Type type) { return type == Type::kBool ? 1 : type == Type::kFloat32 ? 4 : type == Type::kFloat64 ? 8 : 2; }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------- element conversions

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

float bf16_to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(float(mantissa) * 0x1p-24f));
  return bits_as<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if (value != value) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // Rounds to 65536 or more.
  if (magnitude < 0x38800000) {                                 // Subnormal: an integer number of 2^-24.
    const float steps = std::nearbyint(bits_as<float>(magnitude) * 0x1p24f);
    return uint16_t(sign | uint32_t(steps));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

float load(const void* data, int64_t index, Type type) {
  switch (type) {
    case Type::kFloat32: return static_cast<const float*>(data)[index];
    case Type::kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case Type::kFloat16: return half_to_float(static_cast<const uint16_t*>(data)[index]);
    case Type::kFloat64: return float(static_cast<const double*>(data)[index]);
    case Type::kBool: return static_cast<const uint8_t*>(data)[index] ? 0.0f : -kInf;
  }
  return 0.0f;
}

// values * factor to `count` contiguous elements.
void store_run(void* data, int64_t offset, int64_t count, Type type, const float* values, float factor) {
  if (type == Type::kBFloat16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = float_to_bf16(values[i] * factor);
  } else if (type == Type::kFloat16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[i] * factor;
      // As what is stored reads back: a rounded scale makes no infinity of the largest numbers.
      out[i] = float_to_half(std::fabs(value) < kInf ? std::clamp(value, -65504.0f, 65504.0f) : value);
    }
  } else {
    float* __restrict out = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = values[i] * factor;
  }
}

// A strided run of `count` elements as float32; a boolean becomes 0 or minus infinity.
void load_run(const void* data, int64_t offset, int64_t stride, int64_t count, Type type, float* out) {
  if (stride == 1 && type == Type::kBFloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(in[i]);
  } else if (stride == 1 && type == Type::kFloat32) {
    std::memcpy(out, static_cast<const float*>(data) + offset, count * sizeof(float));
  } else if (stride == 1 && type == Type::kBool) {
    const uint8_t* in = static_cast<const uint8_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = in[i] ? 0.0f : -kInf;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = load(data, offset + i * stride, type);
  }
}

// exp(x) for x <= 0 to about one unit in the last place; below 2^-125 it is 0; NaN stays NaN.
inline float exp_nonpositive(float x) {
  const float clamped = x < -86.0f ? -86.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // The integer part sits in the low mantissa bits.
  const float n = shifted - 12582912.0f;
  const float f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const float result = bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23));
  return x < -86.0f ? 0.0f : result;
}

inline float tanh_accurate(float y) {
  const float magnitude = std::fabs(y), square = y * y;
  const float e = exp_nonpositive(-2.0f * magnitude);
  const float large = (1.0f - e) / (1.0f + e);
  // (1 - e) cancels for a small argument: an odd polynomial there (error below 1e-8 up to 0.25).
  const float tail = -0.333333333f + square * (0.133333333f + square * (-0.0539682540f + square * 0.0218694885f));
  const float small = magnitude + magnitude * square * tail;
  return std::copysign(magnitude < 0.25f ? small : large, y);
}

// ------------------------------------------------------------------------------------------------------- rows of 4 bits

// The tables of icw_compile/formats/int4.py: 16 levels for each code, in multiples of the row's scale.
constexpr int kUnit = 11, kLeastMiddle = -8, kMostMiddle = 7;

inline int table_width(int i) { return 32 - i - std::max(i - 8, 0); }

struct Tables {
  alignas(64) int8_t levels[256][16];
  Tables() {
    for (int code = 0; code < 256; ++code)
      for (int index = 0; index < 16; ++index)
        levels[code][index] =
            int8_t(((2 * index - 15 + (code & 15) + kLeastMiddle) * table_width(code >> 4) * kUnit + 32) >> 6);
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// 64 levels of 32 bytes, those of the low bits first.
inline __m512i unpack_64(const uint8_t* packed, const int8_t* low, const int8_t* high) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
  const __m512i table = _mm512_mask_broadcast_i32x4(
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(low))), 0xff00,
      _mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  return _mm512_shuffle_epi8(table, _mm512_and_si512(both, _mm512_set1_epi8(15)));
}
#endif

// One row of `half` bytes to 2 * half levels: those of the low bits first, each half by its table.
inline void unpack_row(const uint8_t* packed, const int8_t* low, const int8_t* high, int64_t half, int8_t* out) {
  int64_t d = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  const __m512i low_table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
  const __m512i high_table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  const __m512i mask = _mm512_set1_epi8(15);
  if (half == 32) return _mm512_storeu_si512(out, unpack_64(packed, low, high));
  for (; d + 64 <= half; d += 64) {
    const __m512i bytes = _mm512_loadu_si512(packed + d);
    _mm512_storeu_si512(out + d, _mm512_shuffle_epi8(low_table, _mm512_and_si512(bytes, mask)));
    _mm512_storeu_si512(out + half + d,
                        _mm512_shuffle_epi8(high_table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)));
  }
  for (; d < half; d += 64) {
    const __mmask64 lanes = ~uint64_t(0) >> (64 - (half - d));
    const __m512i bytes = _mm512_maskz_loadu_epi8(lanes, packed + d);
    _mm512_mask_storeu_epi8(out + d, lanes, _mm512_shuffle_epi8(low_table, _mm512_and_si512(bytes, mask)));
    _mm512_mask_storeu_epi8(out + half + d, lanes,
                            _mm512_shuffle_epi8(high_table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)));
  }
#elif defined(__AVX2__)
  const __m256i low_table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
  const __m256i high_table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  const __m256i mask = _mm256_set1_epi8(15);
  for (; d + 32 <= half; d += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + d));
    const __m256i above = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d),
                        _mm256_shuffle_epi8(low_table, _mm256_and_si256(bytes, mask)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half + d), _mm256_shuffle_epi8(high_table, above));
  }
#elif defined(__aarch64__)
  const int8x16_t low_table = vld1q_s8(low), high_table = vld1q_s8(high);
  for (; d + 16 <= half; d += 16) {
    const uint8x16_t bytes = vld1q_u8(packed + d);
    vst1q_s8(out + d, vqtbl1q_s8(low_table, vandq_u8(bytes, vdupq_n_u8(15))));
    vst1q_s8(out + half + d, vqtbl1q_s8(high_table, vshrq_n_u8(bytes, 4)));
  }
#endif
  for (; d < half; ++d) {
    out[d] = low[packed[d] & 15];
    out[half + d] = high[packed[d] >> 4];
  }
}

// -------------------------------------------------------------------------------------------------------- the problem

struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, last = 0;  // Strides, in elements; 0 where a mask broadcasts.
  Type type = Type::kFloat32;

  // Where row `r` begins.
  int64_t at(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};

// A row of which the keys, the values or both are kept as they are: the places where, -1 of what is not.
struct KeptRow {
  int64_t row, key, value;
};

struct Problem {
  int64_t batch, query_heads, heads, tokens, length, head_dim, value_dim;  // tokens: T, length: S.
  Strided query, key, key_scale, value, value_scale, mask;
  Strided key_codes, value_codes;  // Of rows of 4 bits: no data if they are of 8.
  Strided kept_keys, kept_values;  // Rows are places. No data if none are kept.
  Strided key_shift, value_shift;  // Exponents of two that their channels are divided by; no data if there are none.
  std::vector<KeptRow> kept;       // In ascending order of the rows.
  bool is_prompt = false;          // All rows are kept as they are, none is stored: row i at place i.
  bool mask_by_head = false, mask_by_token = false, is_causal = false;
  bool has_softcap = false;
  float scale = 1.0f, softcap = 0.0f;
  std::vector<float> sinks;  // One for each query head, or none.
  void* out = nullptr;       // [B, Hq, T, Dv] of the query's type, with contiguous channels.

  Engine engine = Engine::kPortable;
  int weight_digits = 2;
  int64_t groups, rows;          // Query heads per head; query rows per head: row = group * tokens + token.
  int64_t before = 0;            // Rows before those of the query's first token, all of which causal queries see.
  Strided to;                    // Strides of the output.
  int64_t key_width, value_width;  // head_dim and value_dim, padded as the buffers hold them.
  int64_t chunk, chunks;

  // Where rows of 4 bits lie in a workspace, their rows follow one another there.
  int64_t key_stride() const { return key_codes.data ? key_width : key.row; }
  int64_t value_stride() const { return value_codes.data ? value_width : value.row; }
};

// Query rows that share a tile of 16 columns: three digits of each, a 128-bit lane per digit.
constexpr int kRowsPerColumnTile = 4;

struct Workspace {
  std::unique_ptr<char[]> memory;
  size_t capacity = 0;

  float *query, *query_scale, *scores, *largest, *sum, *correction, *weight_scale, *accumulated;
  float *key_scale, *value_scale, *mask, *kept_keys, *kept_values;
  uint8_t *query_broken, *mask_live;
  int8_t *query_digits, *interleaved, *tail, *keys, *values;
  int32_t *query_offsets, *products;
  uint8_t* weight_digits;

  void reserve(const Problem& p) {
    // Twice: to learn the size, then to place the buffers.
    for (int pass = 0; pass < 2; ++pass) {
      char* base = pass ? reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(memory.get()), 64)) : nullptr;
      size_t used = 0;
      auto place = [&](auto*& pointer, int64_t count) {
        using T = std::remove_pointer_t<std::remove_reference_t<decltype(pointer)>>;
        if (pass) pointer = reinterpret_cast<T*>(base + used);
        used += round_up(count * int64_t(sizeof(T)), 64);
      };
      const int64_t padded_rows = round_up(p.rows, 16);
      const int64_t query_tiles = (p.rows + kRowsPerColumnTile - 1) / kRowsPerColumnTile;
      const int64_t rows_per_tile = 16 / p.weight_digits;
      const int64_t weight_tiles = (p.rows + rows_per_tile - 1) / rows_per_tile;
      place(query, p.rows * p.key_width);
      place(query_scale, padded_rows);
      place(scores, p.rows * kBlock);
      place(largest, padded_rows);
      place(sum, padded_rows);
      place(correction, padded_rows);
      place(weight_scale, padded_rows);
      place(accumulated, p.rows * p.value_width);
      place(key_scale, kBlock);
      place(value_scale, kBlock);
      place(mask, p.rows * kBlock);
      const bool any_kept = p.is_prompt || !p.kept.empty();
      place(kept_keys, any_kept ? kBlock * p.key_width : 0);
      place(kept_values, any_kept ? kBlock * p.value_width : 0);
      place(query_broken, padded_rows);
      place(mask_live, padded_rows);
      place(query_digits, query_tiles * 16 * p.key_width + 64);
      place(query_offsets, query_tiles * 16);
      place(interleaved, kBlock * 64);
      place(tail, 16 * p.key_width);
      place(keys, p.key_codes.data ? kBlock * p.key_width : 0);
      place(values, p.value_codes.data ? kBlock * p.value_width : 0);
      place(products, std::max(kBlock * 16, 16 * kMostChannels / 4));
      place(weight_digits, weight_tiles * 16 * kBlock);
      if (pass == 0 && used + 64 > capacity) {
        memory.reset(new char[used + 64]);
        capacity = used + 64;
      }
    }
  }
};

// Copies a row of `accumulated` in the natural order of its channels: interleaving value rows within 128-bit lanes left
// channel 16 * lane + 4 * quarter + i of each 64 at 16 * quarter + 4 * lane + i, and of two bytes each, channel
// 8 * lane + 4 * half + i of each 32 at 16 * half + 4 * lane + i.
void copy_row(Order order, const float* accumulated, int64_t value_dim, float* out) {
  if (order == Order::kNatural) {
    std::copy(accumulated, accumulated + value_dim, out);
    return;
  }
  for (int64_t d = 0; d < value_dim; d += 4) {
    const int64_t at = order == Order::kOfBytes ? (d & ~int64_t(63)) + (d & 15) / 4 * 16 + (d & 63) / 16 * 4
                                                : (d & ~int64_t(31)) + (d & 7) / 4 * 16 + (d & 31) / 8 * 4;
    std::copy(accumulated + at, accumulated + at + std::min<int64_t>(4, value_dim - d), out + d);
  }
}

// --------------------------------------------------------------------------------------------------------- masks

// Which mask row applies to a query row: masks that are shared between heads or tokens are expanded once.
struct MaskRows {
  int64_t by_group = 0, by_token = 0, count = 0;
  int64_t of(int64_t group, int64_t token) const { return group * by_group + token * by_token; }
};

MaskRows mask_rows(const Problem& p) {
  MaskRows rows;
  if (p.mask.data == nullptr && !p.is_causal) return rows;
  const bool token = p.mask_by_token || p.is_causal;
  rows.by_token = token && p.tokens > 1 ? 1 : 0;
  const int64_t tokens = rows.by_token ? p.tokens : 1;
  rows.by_group = p.mask_by_head && p.groups > 1 ? tokens : 0;
  rows.count = tokens * (rows.by_group ? p.groups : 1);
  return rows;
}

int64_t mask_offset(const Problem& p, const MaskRows& rows, int64_t b, int64_t h, int64_t mask_row) {
  const int64_t tokens = rows.by_token ? p.tokens : 1;
  const int64_t head = h * p.groups + mask_row / tokens, token = mask_row % tokens;
  return b * p.mask.batch + (p.mask_by_head ? head * p.mask.head : 0) + (p.mask_by_token ? token * p.mask.row : 0);
}

bool any_true(const uint8_t* data, int64_t count) {
  uint64_t seen = 0;
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t words[8];
    std::memcpy(words, data + i, 64);
    for (uint64_t word : words) seen |= word;
  }
  for (; i < count; ++i) seen |= data[i];
  return seen != 0;
}

// Expands the mask of positions [start, start + count) to addends and returns how many leading positions it leaves
// (0: none of them takes part, and nothing of the block need be read).
int64_t load_mask(const Problem& p, Workspace& w, const MaskRows& rows, int64_t b, int64_t h, int64_t start,
                  int64_t count) {
  if (rows.count == 0) return count;
  if (p.mask.data != nullptr && p.mask.type == Type::kBool && p.mask.last == 1) {
    bool any = false;
    for (int64_t row = 0; row < rows.count && !any; ++row)
      any = any_true(static_cast<const uint8_t*>(p.mask.data) + mask_offset(p, rows, b, h, row) + start, count);
    if (!any) return 0;
  }
  int64_t left = 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    float* out = w.mask + row * kBlock;
    if (p.mask.data != nullptr) {
      load_run(p.mask.data, mask_offset(p, rows, b, h, row) + start * p.mask.last, p.mask.last, count, p.mask.type,
               out);
      if (w.mask_live[row])
        for (int64_t i = 0; i < count; ++i) out[i] = out[i] <= kDead ? -kInf : out[i];
    } else {
      std::fill(out, out + count, 0.0f);
    }
    if (p.is_causal) {
      const int64_t token = rows.by_token ? row % p.tokens : 0;
      for (int64_t i = std::max<int64_t>(p.before + token + 1 - start, 0); i < count; ++i) out[i] = -kInf;
    }
    int64_t last = count;
    while (last > left && out[last - 1] == -kInf) --last;
    left = std::max(left, last);
  }
  return left;
}

// Whether an additive mask row has a position that takes part for certain: its finfo.min are then minus infinities.
void find_live_masks(const Problem& p, Workspace& w, const MaskRows& rows, int64_t b, int64_t h) {
  for (int64_t row = 0; row < rows.count; ++row) {
    w.mask_live[row] = 0;
    if (p.mask.data == nullptr || p.mask.type == Type::kBool) continue;
    const int64_t offset = mask_offset(p, rows, b, h, row);
    const int64_t token = rows.by_token ? row % p.tokens : 0;
    const int64_t end = p.is_causal ? std::min(p.length, p.before + token + 1) : p.length;
    for (int64_t s = 0; s < end && !w.mask_live[row]; ++s)
      w.mask_live[row] = load(p.mask.data, offset + s * p.mask.last, p.mask.type) >= kLive;
  }
}

// ------------------------------------------------------------------------------------------------- portable products

// One register of floats: a vector extension that GCC and Clang share. (Loops that reduce, left to the compiler, ran at
// a third of the speed, and so did vectors wider than the machine's.)
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

inline Floats load_floats(const float* data) {
  Floats out;
  std::memcpy(&out, data, sizeof(out));
  return out;
}

inline Floats to_floats(const float* data) { return load_floats(data); }

inline Floats to_floats(const int8_t* data) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data))));
#else
  return __builtin_convertvector(Words{data[0], data[1], data[2], data[3]}, Floats);
#endif
}

inline float total(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(values);
#else
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
#else
  const Floats four = values;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

template <int kRows, typename T>
inline void score_rows_portable(const Problem& p, const float* query, const T* key, float* scores) {
  Floats sums[kRows] = {};
  int64_t d = 0;
  for (; d + kLanes <= p.head_dim; d += kLanes) {
    const Floats k = to_floats(key + d);
    for (int r = 0; r < kRows; ++r) sums[r] += load_floats(query + r * p.key_width + d) * k;
  }
  for (int r = 0; r < kRows; ++r) {
    float sum = total(sums[r]);
    for (int64_t rest = d; rest < p.head_dim; ++rest) sum += query[r * p.key_width + rest] * float(key[rest]);
    scores[r * kBlock] = sum;
  }
}

// scores[row][i] = query[row] . key[i], four rows at a time so that a key is converted once for them.
template <typename T>
void scores_portable(const Problem& p, Workspace& w, const T* key, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T* k = key + i * stride;
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4)
      score_rows_portable<4>(p, w.query + row * p.key_width, k, w.scores + row * kBlock + i);
    for (; row < p.rows; ++row)
      score_rows_portable<1>(p, w.query + row * p.key_width, k, w.scores + row * kBlock + i);
  }
}

// accumulated[row] = accumulated[row] * correction[row] + weights[row] . value; the weights are in `scores`. Eight
// value rows are converted once for all query rows.
template <typename T>
void values_portable(const Problem& p, Workspace& w, const T* value, int64_t stride, int64_t count) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (w.correction[row] == 1.0f) continue;
    float* out = w.accumulated + row * p.value_width;
    for (int64_t d = 0; d < p.value_dim; ++d) out[d] *= w.correction[row];
  }
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const T* v = value + i * stride;
    int64_t d = 0;
    for (; d + kLanes <= p.value_dim; d += kLanes) {
      Floats converted[8];
      for (int j = 0; j < 8; ++j) converted[j] = to_floats(v + j * stride + d);
      for (int64_t row = 0; row < p.rows; ++row) {
        const float* weights = w.scores + row * kBlock + i;
        float* out = w.accumulated + row * p.value_width + d;
        Floats even = load_floats(out) + weights[0] * converted[0], odd = weights[1] * converted[1];
        for (int j = 2; j < 8; j += 2) {
          even += weights[j] * converted[j];
          odd += weights[j + 1] * converted[j + 1];
        }
        even += odd;
        std::memcpy(out, &even, sizeof(even));
      }
    }
    for (; d < p.value_dim; ++d)
      for (int64_t row = 0; row < p.rows; ++row)
        for (int j = 0; j < 8; ++j)
          w.accumulated[row * p.value_width + d] += w.scores[row * kBlock + i + j] * float(v[j * stride + d]);
  }
  for (; i < count; ++i)
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t d = 0; d < p.value_dim; ++d)
        w.accumulated[row * p.value_width + d] += w.scores[row * kBlock + i] * float(value[i * stride + d]);
}

// -------------------------------------------------------------------------------------------------- integer products

#ifdef ICW_VNNI

inline void transpose_16x16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Two digits are off by 2^-16 of a row's largest value: little beside what an output in bfloat16 loses, unless the
// largest is more than so many times the mean. It is at most as many times as there are channels: a part of these.
float two_digit_range(int64_t head_dim) { return std::min(16.0f, head_dim / 4.0f); }

// The signed digits of each query row, most significant first: value = scale * ((d2 * 256 + d1) * 256 + d0), or, VNNI
// only, scale * (d1 * 256 + d0) where that is enough for all rows. Returns how many.
// AMX: tiles of [depth / 4][16 columns][4], column = digit * 4 + row in tile. VNNI: [depth / 4][row * digits + digit]
// [4].
int make_query_digits(const Problem& p, Workspace& w) {
  const int64_t tiles = (p.rows + kRowsPerColumnTile - 1) / kRowsPerColumnTile;
  std::memset(w.query_digits, 0, tiles * 16 * p.key_width);
  std::memset(w.query_offsets, 0, tiles * 16 * sizeof(int32_t));
  bool are_two_enough = p.engine == Engine::kVnni && p.query.type == Type::kBFloat16;
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* q = w.query + row * p.key_width;
    float amax = 0, sum = 0;
#pragma omp simd reduction(max : amax) reduction(+ : sum)
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const float size = std::fabs(q[d]);
      amax = size > amax ? size : amax;
      sum += size;
    }
    w.query_scale[row] = w.query_broken[row] || amax < 1e-30f ? 0.0f : amax;
    if (w.query_scale[row] != 0.0f) are_two_enough &= amax * p.head_dim <= two_digit_range(p.head_dim) * sum;
  }
  const int digits = are_two_enough ? 2 : 3;
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* q = w.query + row * p.key_width;
    const float amax = w.query_scale[row];
    if (amax == 0.0f) continue;
    int exponent;
    // Digits reach +-127 * 65536, two +-127 * 256: a power of two below that, or the next one.
    if (std::frexp(amax, &exponent) > 0.992f) ++exponent;
    const float inverse = std::ldexp(1.0f, 8 * digits - 1 - exponent);
    w.query_scale[row] = std::ldexp(1.0f, exponent - 8 * digits + 1);
    const int64_t tile = row / kRowsPerColumnTile, column = row % kRowsPerColumnTile;
    for (int64_t d = 0; d < p.head_dim; d += 16) {
      const __mmask16 lanes = d + 16 <= p.head_dim ? 0xffff : (1u << (p.head_dim - d)) - 1;
      __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, q + d), _mm512_set1_ps(inverse)));
      for (int digit = digits - 1; digit >= 0; --digit) {
        const __m128i bytes = _mm512_cvtepi32_epi8(rest);
        const __m512i value = _mm512_cvtepi8_epi32(bytes);
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, value), 8);
        int8_t* out;
        int64_t step;
        if (p.engine == Engine::kVnni) {
          w.query_offsets[row * digits + digit] -= 128 * _mm512_reduce_add_epi32(value);
          out = w.query_digits + (d / 4 * p.rows + row) * digits * 4 + digit * 4;
          step = p.rows * digits * 4;
        } else {
          out = w.query_digits + tile * 16 * p.key_width + d * 16 + (digit * 4 + column) * 4;
          step = 64;
        }
        alignas(16) int32_t words[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(words), bytes);
        for (int j = 0; j < 4; ++j) std::memcpy(out + j * step, words + j, 4);
      }
    }
  }
  return digits;
}

inline __m512 combine_digits(__m512i d2, __m512i d1, __m512i d0, __m512 scale) {
  const __m512 low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d1), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(d0));
  return _mm512_mul_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(d2), _mm512_set1_ps(65536.0f), low), scale);
}

inline __m512 combine_digits(__m512i d1, __m512i d0, __m512 scale) {
  return _mm512_mul_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(d1), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(d0)), scale);
}

// Rows of 8 bits.
struct ByteRows {
  const int8_t* data;
  int64_t stride;

  // 64 channels, those of `lanes`, from channel `d` on.
  __m512i load(int64_t i, int64_t d, __mmask64 lanes) const {
    return _mm512_maskz_loadu_epi8(lanes, data + i * stride + d);
  }
  // Asks for these channels of `count` rows. Always inlined: GCC takes a function that does nothing else for one
  // without effect, and leaves out its calls.
  __attribute__((always_inline)) void prefetch(int64_t i, int64_t count, int64_t d) const {
    for (int64_t j = i; j < i + count; ++j) _mm_prefetch(data + j * stride + d, _MM_HINT_T0);
  }
};

// Rows of 4 bits, each half a multiple of 64 channels, or of 32 if that is all: unpacked as they are loaded.
struct NibbleRows {
  const uint8_t *data, *codes;
  int64_t stride, code_stride, half;
  const int8_t (*levels)[16];

  static bool fit(int64_t size) { return size == 64 || size % 128 == 0; }

  __m512i load(int64_t i, int64_t d, __mmask64) const {
    const uint8_t* row = data + i * stride;
    const uint8_t* code = codes + i * code_stride;
    if (half == 32) return unpack_64(row, levels[code[0]], levels[code[1]]);
    const bool is_high = d >= half;
    const __m512i bytes = _mm512_loadu_si512(row + (is_high ? d - half : d));
    const __m512i nibbles = is_high ? _mm512_srli_epi16(bytes, 4) : bytes;
    const __m128i* table = reinterpret_cast<const __m128i*>(levels[code[is_high]]);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(table)),
                               _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
  }
  __attribute__((always_inline)) void prefetch(int64_t i, int64_t count, int64_t d) const {
    if (d >= half) return;
    _mm_prefetch(codes + i * code_stride, _MM_HINT_T0);
    for (int64_t j = i; j < i + count; ++j) _mm_prefetch(data + j * stride + d, _MM_HINT_T0);
  }
};

inline void interleave_rows(__m512i r0, __m512i r1, __m512i r2, __m512i r3, int8_t* out) {
  const __m512i t0 = _mm512_unpacklo_epi8(r0, r1), t1 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i t2 = _mm512_unpacklo_epi8(r2, r3), t3 = _mm512_unpackhi_epi8(r2, r3);
  _mm512_store_si512(out, _mm512_unpacklo_epi16(t0, t2));
  _mm512_store_si512(out + 64, _mm512_unpackhi_epi16(t0, t2));
  _mm512_store_si512(out + 128, _mm512_unpacklo_epi16(t1, t3));
  _mm512_store_si512(out + 192, _mm512_unpackhi_epi16(t1, t3));
}

// Interleaves four rows each of positions [begin, end) and channels [d, d + 64), so that the four bytes of a channel
// are one 32-bit word: [position / 4][64][4], channels in the order that `copy_row` undoes. Position i goes to place
// i & ring: what is used once fits a ring of 8 KiB that stays in the first-level cache.
template <bool kPrefetch, typename Rows>
inline void interleave_values(const Problem& p, Workspace& w, const Rows& rows, int64_t d, int64_t begin, int64_t end,
                              int64_t ring) {
  const __mmask64 lanes = ~uint64_t(0) >> (64 - std::min<int64_t>(64, p.value_dim - d));
  int8_t* const out = w.interleaved;
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    if constexpr (kPrefetch) rows.prefetch(i + kBlock, 4, d);
    interleave_rows(rows.load(i, d, lanes), rows.load(i + 1, d, lanes), rows.load(i + 2, d, lanes),
                    rows.load(i + 3, d, lanes), out + (i & ring) * 64);
  }
  if (i < end) {
    __m512i r[4];
    for (int j = 0; j < 4; ++j) r[j] = i + j < end ? rows.load(i + j, d, lanes) : _mm512_setzero_si512();
    interleave_rows(r[0], r[1], r[2], r[3], out + (i & ring) * 64);
  }
}

// Splits the weights of a block (in `scores`) into unsigned digits over the row's largest one: rows of kBlock bytes,
// the digits of a row together, tiles of 16 rows. Positions up to a multiple of 64 are filled with zeros.
template <int kDigits>
void make_weight_digits(const Problem& p, Workspace& w, int64_t count) {
  constexpr int64_t kRows = 16 / kDigits;
  // Not quite 2^24 - 1: the product is rounded, and must not carry into a fourth digit.
  constexpr float kLargest = kDigits == 3 ? 16777088.0f : 65535.0f;
  for (int64_t row = 0; row < p.rows; ++row) {
    uint8_t* out = w.weight_digits + (row / kRows * 16 + row % kRows * kDigits) * kBlock;
    const float largest = w.weight_scale[row];
    if (!(largest > 0)) {
      std::memset(out, 0, kDigits * kBlock);
      continue;
    }
    const float* weights = w.scores + row * kBlock;
    const __m512 inverse = _mm512_set1_ps(kLargest / largest);
    w.weight_scale[row] = largest / kLargest;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < count; i += 64) {
      __m512i q[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t left = count - i - j * 16;
        const __mmask16 lanes = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
        q[j] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, weights + i + j * 16), inverse));
      }
      for (int digit = 0; digit < kDigits; ++digit) {
        __m512i part[4];
        for (int j = 0; j < 4; ++j)
          part[j] = _mm512_and_si512(_mm512_srli_epi32(q[j], 8 * (kDigits - 1 - digit)), _mm512_set1_epi32(255));
        // Packing interleaves 128-bit lanes; `order` undoes it. Whole lines, so that a tile load need not wait.
        const __m512i bytes =
            _mm512_packus_epi16(_mm512_packus_epi32(part[0], part[1]), _mm512_packus_epi32(part[2], part[3]));
        _mm512_store_si512(out + digit * kBlock + i, _mm512_permutexvar_epi32(order, bytes));
      }
    }
  }
}

template <int kDigits>
inline void accumulate_16(float* out, const int32_t* digits, int64_t digit_stride, __m512 correction, __m512 scale) {
  __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(digits));
  for (int digit = 1; digit < kDigits; ++digit)
    sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f),
                          _mm512_cvtepi32_ps(_mm512_loadu_si512(digits + digit * digit_stride)));
  _mm512_store_ps(out, _mm512_fmadd_ps(sum, scale, _mm512_mul_ps(_mm512_load_ps(out), correction)));
}

// ---- AVX-512 VNNI

// sum += the products of four unsigned and four signed bytes in each word, the signed ones the same in all words. With
// the intrinsic, GCC copies the sums to and fro.
inline void add_products(__m512i& sum, __m512i bytes, const int8_t* four) {
  using Word = const int32_t __attribute__((may_alias, aligned(1)));
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bytes), "m"(*reinterpret_cast<Word*>(four)));
}

// The same, with the unsigned ones in all words alike.
inline void add_products(__m512i& sum, const uint8_t* four, __m512i bytes) {
  int32_t word;
  std::memcpy(&word, four, 4);
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(word)), "v"(bytes));
}

template <int kDigits, int kRows>
void scores_vnni_rows(const Problem& p, Workspace& w, int64_t row, const int32_t* key, int64_t i) {
  __m512i sums[kRows * kDigits];
#pragma GCC unroll 16
  for (int r = 0; r < kRows * kDigits; ++r) sums[r] = _mm512_set1_epi32(w.query_offsets[row * kDigits + r]);
  const int64_t step = p.rows * kDigits * 4;
  const int8_t* digits = w.query_digits + row * kDigits * 4;
  for (int64_t d = 0; d < p.head_dim; d += 4, digits += step) {
    const __m512i k = _mm512_load_si512(key + d * 4);
#pragma GCC unroll 16
    for (int r = 0; r < kRows * kDigits; ++r) add_products(sums[r], k, digits + r * 4);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 scale = _mm512_set1_ps(w.query_scale[row + r]);
    __m512 score;
    if constexpr (kDigits == 3) score = combine_digits(sums[r * 3], sums[r * 3 + 1], sums[r * 3 + 2], scale);
    else score = combine_digits(sums[r * 2], sums[r * 2 + 1], scale);
    _mm512_store_ps(w.scores + (row + r) * kBlock + i, score);
  }
}

// 64 bytes from `d` on of 16 keys of `size` bytes, fewer at the end, as [16 words][16 keys], their bits changed by
// `offset`.
template <typename Rows>
void transpose_keys(const Rows& keys, int64_t size, __m512i offset, int64_t i, int64_t d, int64_t count, int32_t* out) {
  const __mmask64 lanes = ~uint64_t(0) >> (64 - std::min<int64_t>(64, size - d));
  __m512i r[16];
  if (i + 16 <= count) {
    keys.prefetch(i + kBlock, 16, d);
    for (int j = 0; j < 16; ++j) r[j] = _mm512_xor_si512(keys.load(i + j, d, lanes), offset);
  } else {
    for (int j = 0; j < 16; ++j)
      r[j] = i + j < count ? _mm512_xor_si512(keys.load(i + j, d, lanes), offset) : _mm512_setzero_si512();
  }
  transpose_16x16(r);
  for (int j = 0; j < 16; ++j) _mm512_store_si512(out + j * 16, r[j]);
}

template <int kDigits, typename Rows>
void scores_vnni(const Problem& p, Workspace& w, const Rows& keys, int64_t count) {
  const __m512i offset = _mm512_set1_epi8(-128);  // Adds 128, for unsigned bytes.
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t d = 0; d < p.head_dim; d += 64)
      transpose_keys(keys, p.head_dim, offset, i, d, count, w.products + d * 4);
    int64_t row = 0;
    if constexpr (kDigits == 2)  // Sums of more digits would not fit into the registers.
      for (; row + 8 <= p.rows; row += 8) scores_vnni_rows<kDigits, 8>(p, w, row, w.products, i);
    for (; row + 4 <= p.rows; row += 4) scores_vnni_rows<kDigits, 4>(p, w, row, w.products, i);
    for (; row + 2 <= p.rows; row += 2) scores_vnni_rows<kDigits, 2>(p, w, row, w.products, i);
    for (; row < p.rows; ++row) scores_vnni_rows<kDigits, 1>(p, w, row, w.products, i);
  }
}

template <int kDigits, int kRows>
void values_vnni_rows(const Problem& p, Workspace& w, int64_t row, int64_t d, int64_t count) {
  constexpr int64_t kRowsPerTile = 16 / kDigits;
  alignas(64) int32_t results[kRows * kDigits * 16];
  const uint8_t* digits[kRows];
  for (int r = 0; r < kRows; ++r)
    digits[r] = w.weight_digits + ((row + r) / kRowsPerTile * 16 + (row + r) % kRowsPerTile * kDigits) * kBlock;
  for (int64_t k = 0; k < 64; k += 16) {
    __m512i sums[kRows * kDigits];
#pragma GCC unroll 16
    for (int r = 0; r < kRows * kDigits; ++r) sums[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 4) {
      const __m512i v = _mm512_load_si512(w.interleaved + i * 64 + k * 4);
#pragma GCC unroll 16
      for (int r = 0; r < kRows * kDigits; ++r)
        add_products(sums[r], digits[r / kDigits] + r % kDigits * kBlock + i, v);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows * kDigits; ++r) _mm512_store_si512(results + r * 16, sums[r]);
    for (int r = 0; r < kRows; ++r)
      accumulate_16<kDigits>(w.accumulated + (row + r) * p.value_width + d + k, results + r * kDigits * 16, 16,
                             _mm512_set1_ps(w.correction[row + r]), _mm512_set1_ps(w.weight_scale[row + r]));
  }
}

template <int kDigits, typename Rows>
void values_vnni(const Problem& p, Workspace& w, const Rows& values, int64_t count) {
  make_weight_digits<kDigits>(p, w, count);
  for (int64_t d = 0; d < p.value_width; d += 64) {
    interleave_values<true>(p, w, values, d, 0, count, kBlock - 1);
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) values_vnni_rows<kDigits, 4>(p, w, row, d, count);
    for (; row + 2 <= p.rows; row += 2) values_vnni_rows<kDigits, 2>(p, w, row, d, count);
    for (; row < p.rows; ++row) values_vnni_rows<kDigits, 1>(p, w, row, d, count);
  }
}

// ---- bfloat16, of rows that are kept

#ifdef ICW_BF16

// sum += the products of two pairs in each word, one of them the same in all words. As `add_products`.
inline void add_pairs(__m512& sum, __m512i pairs, const int32_t* pair) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(*pair));
}

// The query rows as [depth / 2][row] pairs, where `make_query_digits` has its digits.
void make_query_pairs(const Problem& p, Workspace& w) {
  int32_t* out = reinterpret_cast<int32_t*>(w.query_digits);
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* q = w.query + row * p.key_width;
    for (int64_t d = 0; d < p.head_dim; d += 2) {
      const uint32_t low = bits_as<uint32_t>(q[d]) >> 16;
      const uint32_t high = d + 1 < p.head_dim ? bits_as<uint32_t>(q[d + 1]) & 0xffff0000 : 0;
      out[d / 2 * p.rows + row] = w.query_broken[row] ? 0 : int32_t(low | high);
    }
  }
}

template <int kRows>
void scores_bf16_rows(const Problem& p, Workspace& w, int64_t row, int64_t i) {
  __m512 sums[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
  const int32_t* pairs = reinterpret_cast<const int32_t*>(w.query_digits) + row;
  for (int64_t d = 0; d < p.head_dim; d += 2, pairs += p.rows) {
    const __m512i k = _mm512_load_si512(w.products + d * 8);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) add_pairs(sums[r], k, pairs + r);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) _mm512_store_ps(w.scores + (row + r) * kBlock + i, sums[r]);
}

void scores_bf16(const Problem& p, Workspace& w, const ByteRows& keys, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t d = 0; d < p.head_dim * 2; d += 64)
      transpose_keys(keys, p.head_dim * 2, _mm512_setzero_si512(), i, d, count, w.products + d * 4);
    int64_t row = 0;
    for (; row + 16 <= p.rows; row += 16) scores_bf16_rows<16>(p, w, row, i);
    for (; row + 4 <= p.rows; row += 4) scores_bf16_rows<4>(p, w, row, i);
    for (; row < p.rows; ++row) scores_bf16_rows<1>(p, w, row, i);
  }
}

// The weights of a block, rounded: rows of kBlock, where `make_weight_digits` has its digits. Zeros up to a pair.
void make_weight_pairs(const Problem& p, Workspace& w, int64_t count) {
  for (int64_t row = 0; row < p.rows; ++row) {
    float* weights = w.scores + row * kBlock;
    for (int64_t i = count; i < round_up(count, 32); ++i) weights[i] = 0.0f;
    for (int64_t i = 0; i < count; i += 32) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_load_ps(weights + i + 16), _mm512_load_ps(weights + i));
      std::memcpy(w.weight_digits + row * kBlock * 2 + i * 2, &pairs, 64);
    }
  }
}

template <int kRows>
void values_bf16_rows(const Problem& p, Workspace& w, int64_t row, int64_t d, int64_t count) {
  const int32_t* weights = reinterpret_cast<const int32_t*>(w.weight_digits) + row * (kBlock / 2);
  for (int64_t half = 0; half < 2; ++half) {
    __m512 sums[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 2) {
      const __m512i v = _mm512_load_si512(w.interleaved + i * 64 + half * 64);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) add_pairs(sums[r], v, weights + r * (kBlock / 2) + i / 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* out = w.accumulated + (row + r) * p.value_width + d + half * 16;
      _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_load_ps(out), _mm512_set1_ps(w.correction[row + r]), sums[r]));
    }
  }
}

void values_bf16(const Problem& p, Workspace& w, const ByteRows& values, int64_t count) {
  make_weight_pairs(p, w, count);
  for (int64_t d = 0; d < p.value_dim; d += 32) {
    const __mmask64 lanes = ~uint64_t(0) >> (64 - std::min<int64_t>(64, (p.value_dim - d) * 2));
    for (int64_t i = 0; i < count; i += 2) {
      const __m512i even = values.load(i, d * 2, lanes);
      const __m512i odd = i + 1 < count ? values.load(i + 1, d * 2, lanes) : _mm512_setzero_si512();
      _mm512_store_si512(w.interleaved + i * 64, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(w.interleaved + i * 64 + 64, _mm512_unpackhi_epi16(even, odd));
    }
    int64_t row = 0;
    for (; row + 16 <= p.rows; row += 16) values_bf16_rows<16>(p, w, row, d, count);
    for (; row + 4 <= p.rows; row += 4) values_bf16_rows<4>(p, w, row, d, count);
    for (; row < p.rows; ++row) values_bf16_rows<1>(p, w, row, d, count);
  }
}

// Whether all of `count` rows of `size` bfloat16 are finite.
bool all_finite(const ByteRows& rows, int64_t count, int64_t size) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 broken = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < size; d += 32) {
      const __mmask64 lanes = ~uint64_t(0) >> (64 - std::min<int64_t>(64, (size - d) * 2));
      const __m512i bits = _mm512_and_si512(rows.load(i, d * 2, lanes), exponent);
      broken |= _mm512_cmpeq_epi16_mask(bits, exponent);
    }
  return broken == 0;
}

bool has_pairs(const Problem& p) {
  return p.engine == Engine::kVnni && p.query.type == Type::kBFloat16 && p.kept_keys.type == Type::kBFloat16 &&
         p.kept_keys.last == 1 && p.kept_values.type == Type::kBFloat16 && p.kept_values.last == 1 &&
         p.head_dim <= kMostChannels / 2;
}

#endif  // ICW_BF16

#endif  // ICW_VNNI

#ifdef ICW_AMX

// Linux gives a process the tile registers on request.
bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// The load intrinsics of some compilers do not say that they read memory: keeps earlier stores before them.
inline void before_tile_load() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Tiles 0-5 are full (16 rows of 64 bytes); 6 and 7 hold the last, perhaps narrower, slice of the head size.
void configure_tiles(const Problem& p) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  const int64_t last = p.head_dim - (p.head_dim - 1) / 64 * 64;
  config.row_bytes[6] = uint16_t(last);
  config.rows[7] = uint8_t(last / 4);
  _tile_loadconfig(&config);
}

// products[16 keys][16 columns] = key . one column tile of query digits, whose slices lie in tiles 3, 4, 5 and 7. A
// macro, because the intrinsics spell the number of the accumulator into the instruction.
#define ICW_SCORE_TILE(accumulator, key, stride, products)      \
  do {                                                          \
    const int8_t* key_ = key;                                   \
    const int64_t stride_ = stride;                             \
    before_tile_load();                                         \
    _tile_zero(accumulator);                                    \
    if constexpr (kSlices > 1) {                                \
      _tile_loadd(2, key_, stride_);                            \
      _tile_dpbssd(accumulator, 2, 3);                          \
    }                                                           \
    if constexpr (kSlices > 2) {                                \
      _tile_loadd(2, key_ + 64, stride_);                       \
      _tile_dpbssd(accumulator, 2, 4);                          \
    }                                                           \
    if constexpr (kSlices > 3) {                                \
      _tile_loadd(2, key_ + 128, stride_);                      \
      _tile_dpbssd(accumulator, 2, 5);                          \
    }                                                           \
    _tile_loadd(6, key_ + (kSlices - 1) * 64, stride_);         \
    _tile_dpbssd(accumulator, 6, 7);                            \
    _tile_stored(accumulator, products, 64);                    \
  } while (false)

// The products of 16 keys with a column tile, as the scores of its rows. A key's products are three 128-bit lanes, one
// per digit, of four rows each.
inline void finish_scores(const int32_t* products, const float* query_scale, int64_t rows, float* scores) {
  __m512 sums[4];
  for (int m = 0; m < 4; ++m) {
    __m512i digits[3];
    // Lane l: key 4 * l + m. Broadcast loads under a mask cost no shuffle.
    for (int digit = 0; digit < 3; ++digit) {
      const int32_t* in = products + m * 16 + digit * 4;
      __m512i lanes = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(in)));
      for (int l = 1; l < 4; ++l)
        lanes = _mm512_mask_broadcast_i32x4(lanes, __mmask16(15 << 4 * l),
                                            _mm_load_si128(reinterpret_cast<const __m128i*>(in + l * 64)));
      digits[digit] = lanes;
    }
    sums[m] = combine_digits(digits[0], digits[1], digits[2], _mm512_broadcast_f32x4(_mm_loadu_ps(query_scale)));
  }
  const __m512 t0 = _mm512_unpacklo_ps(sums[0], sums[1]), t1 = _mm512_unpackhi_ps(sums[0], sums[1]);
  const __m512 t2 = _mm512_unpacklo_ps(sums[2], sums[3]), t3 = _mm512_unpackhi_ps(sums[2], sums[3]);
  _mm512_store_ps(scores, _mm512_shuffle_ps(t0, t2, 0x44));
  if (rows > 1) _mm512_store_ps(scores + kBlock, _mm512_shuffle_ps(t0, t2, 0xee));
  if (rows > 2) _mm512_store_ps(scores + 2 * kBlock, _mm512_shuffle_ps(t1, t3, 0x44));
  if (rows > 3) _mm512_store_ps(scores + 3 * kBlock, _mm512_shuffle_ps(t1, t3, 0xee));
}

// Asks for `count` rows of `width` bytes. Hardware follows neither the alternation of keys and values nor page borders.
__attribute__((always_inline)) inline void prefetch_rows(const int8_t* row, int64_t stride, int64_t count,
                                                         int64_t width) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; d += 64) _mm_prefetch(row + i * stride + d, _MM_HINT_T1);
}

// kSlices = ceil(head_dim / 64). The vector unit finishes a pair of tiles while the tile unit makes the next, and the
// block's values are on their way.
template <int kSlices>
void scores_amx(const Problem& p, Workspace& w, const int8_t* key, const int8_t* value, int64_t count) {
  const int64_t stride = p.key_stride(), full = count / 16, groups = (count + 15) / 16;
  if (full < groups) {
    // A tile reads 16 rows, which may not all exist.
    for (int64_t i = full * 16; i < count; ++i)
      std::memcpy(w.tail + (i - full * 16) * p.key_width, key + i * stride, p.head_dim);
  }
  for (int64_t row = 0; row < p.rows; row += kRowsPerColumnTile) {
    const int8_t* digits = w.query_digits + row / kRowsPerColumnTile * 16 * p.key_width;
    const float* query_scale = w.query_scale + row;
    const int64_t rows = std::min<int64_t>(kRowsPerColumnTile, p.rows - row);
    float* scores = w.scores + row * kBlock;
    before_tile_load();
    if constexpr (kSlices > 1) _tile_loadd(3, digits, 64);
    if constexpr (kSlices > 2) _tile_loadd(4, digits + 1024, 64);
    if constexpr (kSlices > 3) _tile_loadd(5, digits + 2048, 64);
    _tile_loadd(7, digits + (kSlices - 1) * 1024, 64);
    int64_t group = 0, finished = 0;
    for (; group + 2 <= full; group += 2) {
      if (row == 0) prefetch_rows(value + group * 16 * p.value_stride(), p.value_stride(), 32, p.value_dim);
      int32_t* products = w.products + group % 4 * 256;
      ICW_SCORE_TILE(0, key + group * 16 * stride, stride, products);
      ICW_SCORE_TILE(1, key + (group + 1) * 16 * stride, stride, products + 256);
      for (; finished < group; ++finished)
        finish_scores(w.products + finished % 4 * 256, query_scale, rows, scores + finished * 16);
    }
    for (; group < groups; ++group) {
      for (; finished < group; ++finished)
        finish_scores(w.products + finished % 4 * 256, query_scale, rows, scores + finished * 16);
      const bool whole = group < full;
      ICW_SCORE_TILE(0, whole ? key + group * 16 * stride : w.tail, whole ? stride : p.key_width,
                     w.products + group % 4 * 256);
    }
    for (; finished < groups; ++finished)
      finish_scores(w.products + finished % 4 * 256, query_scale, rows, scores + finished * 16);
  }
}

inline void value_tiles(const uint8_t* digits, const int8_t* value) {
  before_tile_load();
  _tile_loadd(4, digits, kBlock);
  _tile_loadd(5, value, 256);
  _tile_dpbusd(0, 4, 5);
  _tile_loadd(5, value + 64, 256);
  _tile_dpbusd(1, 4, 5);
  _tile_loadd(5, value + 128, 256);
  _tile_dpbusd(2, 4, 5);
  _tile_loadd(5, value + 192, 256);
  _tile_dpbusd(3, 4, 5);
}

// For the first tile of rows, the vector unit interleaves 64 positions while the tile unit multiplies the 64 before,
// and `next_key`, the keys of the next block (or null), are on their way.
template <int kDigits>
void values_amx(const Problem& p, Workspace& w, const int8_t* value, const int8_t* next_key, int64_t count) {
  constexpr int64_t kRows = 16 / kDigits;
  const int64_t ring = p.rows <= kRows ? 127 : kBlock - 1;
  make_weight_digits<kDigits>(p, w, count);
  const ByteRows rows_of_values{value, p.value_stride()};
  for (int64_t d = 0; d < p.value_width; d += 64) {
    interleave_values<false>(p, w, rows_of_values, d, 0, std::min<int64_t>(count, 64), ring);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const uint8_t* digits = w.weight_digits + row / kRows * 16 * kBlock;
      const int64_t rows = std::min<int64_t>(kRows, p.rows - row);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t i = 0; i < count; i += 64) {
        value_tiles(digits + i, w.interleaved + (i & ring) * 64);
        if (row == 0 && next_key != nullptr && d < p.head_dim)
          prefetch_rows(next_key + i * p.key_stride() + d, p.key_stride(), 64, 1);
        if (row == 0 && i + 64 < count)
          interleave_values<false>(p, w, rows_of_values, d, i + 64, std::min<int64_t>(count, i + 128), ring);
      }
      _tile_stored(0, w.products, 256);
      _tile_stored(1, w.products + 16, 256);
      _tile_stored(2, w.products + 32, 256);
      _tile_stored(3, w.products + 48, 256);
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t k = 0; k < 64; k += 16)
          accumulate_16<kDigits>(w.accumulated + (row + j) * p.value_width + d + k, w.products + j * kDigits * 64 + k,
                                 64, _mm512_set1_ps(w.correction[row + j]), _mm512_set1_ps(w.weight_scale[row + j]));
    }
  }
}

#endif  // ICW_AMX

// --------------------------------------------------------------------------------------------------- one unit of work

void load_query(const Problem& p, Workspace& w, int64_t b, int64_t h) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t group = row / p.tokens, token = row % p.tokens;
    float* out = w.query + row * p.key_width;
    load_run(p.query.data, b * p.query.batch + (h * p.groups + group) * p.query.head + token * p.query.row,
             p.query.last, p.head_dim, p.query.type, out);
    float broken = 0;
#pragma omp simd reduction(+ : broken)
    for (int64_t d = 0; d < p.head_dim; ++d) broken += out[d] * 0.0f;
    w.query_broken[row] = broken != 0.0f;
  }
}

// Raw products to scores: scale, softcap, mask; then the weights exp(score - largest) * value scale in their place.
void softmax_block(const Problem& p, Workspace& w, const MaskRows& masks, int64_t count) {
  for (int64_t row = 0; row < p.rows; ++row) {
    float* __restrict x = w.scores + row * kBlock;
    const float* __restrict key_scale = w.key_scale;
    const float* __restrict value_scale = w.value_scale;
    float largest = -kInf;
    if (p.has_softcap) {
      const float softcap = p.softcap, inverse = 1.0f / p.softcap;
      for (int64_t i = 0; i < count; ++i) x[i] = softcap * tanh_accurate(x[i] * key_scale[i] * inverse);
    } else {
      for (int64_t i = 0; i < count; ++i) x[i] *= key_scale[i];
    }
    if (masks.count) {
      const float* __restrict mask = w.mask + masks.of(row / p.tokens, row % p.tokens) * kBlock;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < count; ++i) {
        x[i] += mask[i];
        largest = x[i] > largest ? x[i] : largest;
      }
    } else {
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
    }
    const float before = w.largest[row], now = largest > before ? largest : before;
    // No score so far: nothing to subtract, every weight is exp(-inf) = 0.
    const float shift = now == -kInf ? 0.0f : now;
    float sum = 0, weight = 0;
#pragma omp simd reduction(+ : sum) reduction(max : weight)
    for (int64_t i = 0; i < count; ++i) {
      const float e = exp_nonpositive(x[i] - shift);
      sum += e;
      const float scaled = e * value_scale[i];
      x[i] = scaled;
      weight = scaled > weight ? scaled : weight;
    }
    const float correction = before == now ? 1.0f : exp_nonpositive(before - shift);
    w.largest[row] = now;
    w.sum[row] = w.sum[row] * correction + sum;
    w.correction[row] = correction;
    w.weight_scale[row] = weight;
  }
}

// Scales of a block as float32, the key's with the softmax scale folded in. Non-finite ones become 0 here and make the
// sum of every query row that they take part in NaN. Returns false for a negative value scale: integer weights have no
// sign.
bool load_scales(const Problem& p, Workspace& w, const MaskRows& masks, int64_t b, int64_t h, int64_t start,
                 int64_t count) {
  load_run(p.key_scale.data, p.key_scale.at(b, h, start), p.key_scale.row, count, p.key_scale.type, w.key_scale);
  load_run(p.value_scale.data, p.value_scale.at(b, h, start), p.value_scale.row, count, p.value_scale.type,
           w.value_scale);
  float broken = 0, smallest = 0;
#pragma omp simd reduction(+ : broken) reduction(min : smallest)
  for (int64_t i = 0; i < count; ++i) {
    broken += w.key_scale[i] * 0.0f + w.value_scale[i] * 0.0f;
    smallest = w.value_scale[i] < smallest ? w.value_scale[i] : smallest;
    w.key_scale[i] *= p.scale;
  }
  if (broken != 0.0f) {
    for (int64_t i = 0; i < count; ++i) {
      if (std::isfinite(w.key_scale[i]) && std::isfinite(w.value_scale[i])) continue;
      w.key_scale[i] = w.value_scale[i] = 0.0f;
      for (int64_t row = 0; row < p.rows; ++row)
        if (!masks.count || w.mask[masks.of(row / p.tokens, row % p.tokens) * kBlock + i] != -kInf) w.sum[row] = kNaN;
    }
  }
  return smallest >= 0.0f;
}

// Rows of 8 bits [position, position + count): where they are, or of 4 bits unpacked to `buffer`.
const int8_t* rows_of(const Strided& rows, const Strided& codes, int64_t size, int64_t b, int64_t h, int64_t position,
                      int64_t count, int8_t* buffer) {
  const int64_t first = rows.at(b, h, position);
  if (codes.data == nullptr) return static_cast<const int8_t*>(rows.data) + first;
  const uint8_t* packed = static_cast<const uint8_t*>(rows.data) + first;
  const uint8_t* code = static_cast<const uint8_t*>(codes.data) + codes.at(b, h, position);
  const auto& levels = tables().levels;
  const int64_t width = round_up(size, 64);
  for (int64_t i = 0; i < count; ++i, packed += rows.row, code += codes.row) {
    __builtin_prefetch(packed + kBlock * rows.row);  // Of the next block.
    unpack_row(packed, levels[code[0]], levels[code[1]], size / 2, buffer + i * width);
  }
  return buffer;
}

#ifdef ICW_VNNI

// `use` with the same rows as they are best loaded.
template <typename Use>
void with_rows(const Strided& rows, const Strided& codes, int64_t size, int64_t b, int64_t h, int64_t position,
               int64_t count, int8_t* buffer, const Use& use) {
  if (codes.data != nullptr && NibbleRows::fit(size)) {
    use(NibbleRows{static_cast<const uint8_t*>(rows.data) + rows.at(b, h, position),
                   static_cast<const uint8_t*>(codes.data) + codes.at(b, h, position), rows.row, codes.row, size / 2,
                   tables().levels});
  } else {
    use(ByteRows{rows_of(rows, codes, size, b, h, position, count, buffer),
                 codes.data != nullptr ? round_up(size, 64) : rows.row});
  }
}

#endif

void start_rows(const Problem& p, Workspace& w) {
  std::fill(w.largest, w.largest + p.rows, -kInf);
  std::fill(w.sum, w.sum + p.rows, 0.0f);
  std::fill(w.accumulated, w.accumulated + p.rows * p.value_width, 0.0f);
}

// Positions [start, end) but for the rows that are kept. False if it takes `Engine::kPortable`.
bool run_unit(const Problem& p, Workspace& w, int64_t b, int64_t h, int64_t start, int64_t end) {
  const MaskRows masks = mask_rows(p);
  find_live_masks(p, w, masks, b, h);
  start_rows(p, w);
  bool prepared = false;
#ifdef ICW_VNNI
  int query_digits = 3;
#endif
  auto kept = std::lower_bound(p.kept.begin(), p.kept.end(), start,
                               [](const KeptRow& row, int64_t position) { return row.row < position; });
  for (int64_t position = start, next; position < end; position = next) {
    while (kept != p.kept.end() && kept->row == position) ++kept, ++position;
    const int64_t gap = std::min(end, kept != p.kept.end() ? kept->row : end);
    next = std::min(position + kBlock, gap);
    if (next <= position) continue;
    const int64_t count = load_mask(p, w, masks, b, h, position, next - position);
    if (count == 0) continue;
    if (!prepared) {
      load_query(p, w, b, h);
#ifdef ICW_VNNI
      if (p.engine != Engine::kPortable) query_digits = make_query_digits(p, w);
#endif
      prepared = true;
    }
    if (!load_scales(p, w, masks, b, h, position, count) && p.engine != Engine::kPortable) return false;
    auto keys = [&] { return rows_of(p.key, p.key_codes, p.head_dim, b, h, position, count, w.keys); };
    auto values = [&] { return rows_of(p.value, p.value_codes, p.value_dim, b, h, position, count, w.values); };
    switch (p.engine) {
      case Engine::kPortable:
        scores_portable(p, w, keys(), p.key_stride(), count);
        softmax_block(p, w, masks, count);
        values_portable(p, w, values(), p.value_stride(), count);
        break;
#ifdef ICW_VNNI
      case Engine::kVnni:
        with_rows(p.key, p.key_codes, p.head_dim, b, h, position, count, w.keys, [&](const auto& rows) {
          query_digits == 2 ? scores_vnni<2>(p, w, rows, count) : scores_vnni<3>(p, w, rows, count);
        });
        softmax_block(p, w, masks, count);
        with_rows(p.value, p.value_codes, p.value_dim, b, h, position, count, w.values, [&](const auto& rows) {
          p.weight_digits == 2 ? values_vnni<2>(p, w, rows, count) : values_vnni<3>(p, w, rows, count);
        });
        break;
#endif
#ifdef ICW_AMX
      case Engine::kAmx: {
        const int8_t *key = keys(), *value = values();
        if (p.head_dim <= 64) scores_amx<1>(p, w, key, value, count);
        else if (p.head_dim <= 128) scores_amx<2>(p, w, key, value, count);
        else if (p.head_dim <= 192) scores_amx<3>(p, w, key, value, count);
        else scores_amx<4>(p, w, key, value, count);
        softmax_block(p, w, masks, count);
        const bool is_ahead = position + 2 * kBlock <= gap && p.key_codes.data == nullptr;
        const int8_t* next_key = is_ahead ? key + kBlock * p.key.row : nullptr;
        p.weight_digits == 2 ? values_amx<2>(p, w, value, next_key, count) : values_amx<3>(p, w, value, next_key, count);
        break;
      }
#endif
      default: break;
    }
  }
  if (prepared)
    for (int64_t row = 0; row < p.rows; ++row)
      if (w.query_broken[row] && w.sum[row] != 0.0f) w.sum[row] = kNaN;
  return true;
}

// One row of keys or values as float32: where they are kept, or else as they are stored.
void load_row(const Strided& kept, const Strided& shift, const Strided& rows, const Strided& codes,
              const Strided& scale, int64_t size, int64_t b, int64_t h, int64_t place, int64_t row, int8_t* buffer,
              float* out) {
  if (place >= 0) {
    load_run(kept.data, kept.at(b, h, place), kept.last, size, kept.type, out);
    if (shift.data == nullptr) return;
    const uint8_t* exponents = static_cast<const uint8_t*>(shift.data) + b * shift.batch + h * shift.head;
    for (int64_t d = 0; d < size; ++d) out[d] *= bits_as<float>(uint32_t(127 - exponents[d]) << 23);
    return;
  }
  const int8_t* stored = rows_of(rows, codes, size, b, h, row, 1, buffer);
  const float step = load(scale.data, scale.at(b, h, row), scale.type);
  for (int64_t d = 0; d < size; ++d) out[d] = float(stored[d]) * step;
}

// Asks for what `load_row` reads: rows that are kept lie where no other is read.
__attribute__((always_inline)) inline void prefetch_row(const Strided& kept, const Strided& rows, int64_t size, int64_t b,
                                                        int64_t h, int64_t place, int64_t row) {
  const Strided& from = place >= 0 ? kept : rows;
  const int64_t bytes = place >= 0 ? int64_t(size_of(kept.type)) : 1, at = place >= 0 ? place : row;
  const char* data = static_cast<const char*>(from.data) + from.at(b, h, at) * bytes;
  for (int64_t d = 0; d < size * bytes; d += 64) __builtin_prefetch(data + d);
}

// Rows that are kept, [first, last) of them, in float32, with the accumulated values in natural order.
void run_kept(const Problem& p, Workspace& w, int64_t b, int64_t h, int64_t first, int64_t last) {
  const MaskRows masks = mask_rows(p);
  find_live_masks(p, w, masks, b, h);
  start_rows(p, w);
  load_query(p, w, b, h);
  std::fill(w.key_scale, w.key_scale + kBlock, p.scale);
  std::fill(w.value_scale, w.value_scale + kBlock, 1.0f);
  for (int64_t i = first; i < std::min(last, first + kBlock) && !p.is_prompt; ++i) {
    prefetch_row(p.kept_keys, p.key, p.head_dim, b, h, p.kept[i].key, p.kept[i].row);
    prefetch_row(p.kept_values, p.value, p.value_dim, b, h, p.kept[i].value, p.kept[i].row);
  }
  for (int64_t next = first; next < last;) {
    int64_t count = 0;
    for (; count < kBlock && next < last; ++next) {
      const auto [row, key_place, value_place] = p.is_prompt ? KeptRow{next, next, next} : p.kept[next];
      bool is_read = masks.count == 0;
      for (int64_t m = 0; m < masks.count; ++m) {
        float& mask = w.mask[m * kBlock + count];
        mask = 0.0f;
        if (p.mask.data != nullptr) mask = load(p.mask.data, mask_offset(p, masks, b, h, m) + row * p.mask.last, p.mask.type);
        if (w.mask_live[m] && mask <= kDead) mask = -kInf;
        if (p.is_causal && row > p.before + (masks.by_token ? m % p.tokens : 0)) mask = -kInf;
        is_read |= mask != -kInf;
      }
      if (!is_read) continue;
      float* key = w.kept_keys + count * p.key_width;
      float* value = w.kept_values + count * p.value_width;
      load_row(p.kept_keys, p.key_shift, p.key, p.key_codes, p.key_scale, p.head_dim, b, h, key_place, row, w.keys, key);
      load_row(p.kept_values, p.value_shift, p.value, p.value_codes, p.value_scale, p.value_dim, b, h, value_place, row,
               w.values, value);
      float broken = 0;
#pragma omp simd reduction(+ : broken)
      for (int64_t d = 0; d < p.head_dim; ++d) broken += key[d] * 0.0f;
#pragma omp simd reduction(+ : broken)
      for (int64_t d = 0; d < p.value_dim; ++d) broken += value[d] * 0.0f;
      if (broken != 0.0f) {  // Whoever reads it gets NaN, and nobody else does.
        std::fill(key, key + p.head_dim, 0.0f);
        std::fill(value, value + p.value_dim, 0.0f);
        for (int64_t r = 0; r < p.rows; ++r)
          if (!masks.count || w.mask[masks.of(r / p.tokens, r % p.tokens) * kBlock + count] != -kInf) w.sum[r] = kNaN;
      }
      ++count;
    }
    if (count == 0) continue;
    scores_portable(p, w, w.kept_keys, p.key_width, count);
    softmax_block(p, w, masks, count);
    values_portable(p, w, w.kept_values, p.value_width, count);
  }
  for (int64_t row = 0; row < p.rows; ++row)
    if (w.query_broken[row] && w.sum[row] != 0.0f) w.sum[row] = kNaN;
}

// Rows [first, last) of a prompt, in bfloat16, as are the weights of their values, where that can be; returns in which
// order the accumulated values are.
Order run_own(const Problem& p, Workspace& w, int64_t b, int64_t h, int64_t first, int64_t last) {
#ifdef ICW_BF16
  auto rows_from = [&](const Strided& rows, int64_t row) {
    return ByteRows{static_cast<const int8_t*>(rows.data) + rows.at(b, h, row) * 2, rows.row * 2};
  };
  bool is_prepared = false, are_finite = has_pairs(p);
  const MaskRows masks = mask_rows(p);
  find_live_masks(p, w, masks, b, h);
  start_rows(p, w);
  for (int64_t row = first; row < last && are_finite; row += kBlock) {
    const int64_t count = load_mask(p, w, masks, b, h, row, std::min(kBlock, last - row));
    if (count == 0) continue;
    const ByteRows keys = rows_from(p.kept_keys, row), values = rows_from(p.kept_values, row);
    are_finite = all_finite(keys, count, p.head_dim) && all_finite(values, count, p.value_dim);
    if (!are_finite) break;
    if (!is_prepared) {
      load_query(p, w, b, h);
      make_query_pairs(p, w);
      std::fill(w.key_scale, w.key_scale + kBlock, p.scale);
      std::fill(w.value_scale, w.value_scale + kBlock, 1.0f);
      is_prepared = true;
    }
    scores_bf16(p, w, keys, count);
    softmax_block(p, w, masks, count);
    values_bf16(p, w, values, count);
  }
  if (are_finite) {
    for (int64_t row = 0; is_prepared && row < p.rows; ++row)
      if (w.query_broken[row] && w.sum[row] != 0.0f) w.sum[row] = kNaN;
    return Order::kOfPairs;
  }
#endif
  run_kept(p, w, b, h, first, last);
  return Order::kNatural;
}

// What a chunk leaves for each row: largest score, sum, then value_dim weighted values, in the natural order.
void write_partial(const Problem& p, const Workspace& w, Order order, float* out) {
  for (int64_t row = 0; row < p.rows; ++row, out += p.value_dim + 2) {
    out[0] = w.largest[row];
    out[1] = w.sum[row];
    copy_row(order, w.accumulated + row * p.value_width, p.value_dim, out + 2);
  }
}

void write_output(const Problem& p, int64_t b, int64_t h, int64_t row, const float* values, float largest, float sum) {
  float factor = 1.0f;
  if (!p.sinks.empty()) {  // One more score, which has no value.
    const float sink = p.sinks[h * p.groups + row / p.tokens], shift = std::max(largest, sink);
    if (shift != -kInf) {
      factor = exp_nonpositive(largest - shift);
      sum = sum * factor + exp_nonpositive(sink - shift);
      largest = shift;
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : factor / sum;
  const int64_t at = b * p.to.batch + (h * p.groups + row / p.tokens) * p.to.head + row % p.tokens * p.to.row;
  store_run(p.out, at, p.value_dim, p.query.type, values, inverse);
}

void merge_partials(const Problem& p, int64_t b, int64_t h, const float* partials, std::vector<float>& values) {
  const int64_t row_size = p.value_dim + 2, chunk_size = p.rows * row_size;
  values.resize(p.value_dim);
  for (int64_t row = 0; row < p.rows; ++row) {
    float largest = -kInf, sum = 0;
    for (int64_t c = 0; c < p.chunks; ++c) largest = std::max(largest, partials[c * chunk_size + row * row_size]);
    std::fill(values.begin(), values.end(), 0.0f);
    for (int64_t c = 0; c < p.chunks; ++c) {
      const float* partial = partials + c * chunk_size + row * row_size;
      if (partial[1] == 0.0f) continue;  // A NaN is not 0.
      const float factor = partial[0] == largest ? 1.0f : exp_nonpositive(partial[0] - largest);
      sum += partial[1] * factor;
      for (int64_t d = 0; d < p.value_dim; ++d) values[d] += factor * partial[2 + d];
    }
    write_output(p, b, h, row, values.data(), largest, sum);
  }
}

// The fastest that this build and this processor have for keys of this size.
Engine best_engine(int64_t head_dim) {
#ifdef ICW_AMX
  // Tiles hold four slices of 64 channels, of which the last is of whole words.
  if (head_dim > 0 && head_dim <= 256 && head_dim % 4 == 0 && amx_allowed()) return Engine::kAmx;
#endif
#ifdef ICW_VNNI
  if (head_dim <= kMostChannels) return Engine::kVnni;
#endif
  return Engine::kPortable;
}

// A MemoryError; from torch 2.15 on, which lets no exception but its own leave an operator, a RuntimeError that says this.
struct NoMemory : std::bad_alloc {
  const char* what() const noexcept override { return "no memory for what the threads of an operator of icw_int8kv need"; }
};

// `work` on each of `threads`: it draws units from a counter, and counts those that it has done. No exception may leave
// a parallel region: a thread that finds no memory leaves its units to the others.
template <typename Work>
void in_parallel(int threads, const Work& work) {
  auto try_to_work = [&] {
    try {
      work();
    } catch (const std::bad_alloc&) {
    }
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    try_to_work();
    return;
  }
#endif
  try_to_work();
}

void run(Problem& p, int threads, int engine) {
  p.groups = p.query_heads / p.heads;
  p.rows = p.groups * p.tokens;
  p.key_width = round_up(p.head_dim, 64);
  p.value_width = round_up(p.value_dim, 64);
  p.weight_digits = p.query.type == Type::kFloat32 ? 3 : 2;
  p.engine = best_engine(p.head_dim);
  if (engine >= 0) p.engine = std::min(p.engine, Engine(engine));
  const int64_t length = p.is_causal ? std::min(p.length, p.before + p.tokens) : p.length;
  const int64_t pairs = p.batch * p.heads;
  if (pairs * length * (p.head_dim + p.value_dim) * (p.is_prompt ? p.rows : 1) < 128 * 1024) threads = 1;
  // Enough units for the threads to even out, large enough for the merge not to matter.
  p.chunk = round_up(std::max<int64_t>(length, 1), kBlock);
  if (threads > 1)
    p.chunk = std::min(p.chunk, round_up(std::max<int64_t>(pairs * length / (16 * threads), 4 * kBlock), kBlock));
  // The rows that are kept are a chunk of their own, the last; those of a prompt are many.
  const int64_t stored_chunks = p.is_prompt ? 0 : std::max<int64_t>((length + p.chunk - 1) / p.chunk, 1);
  const int64_t kept_chunks = p.is_prompt ? std::max<int64_t>((length + kOwnChunk - 1) / kOwnChunk, 1)
                                          : int64_t(!p.kept.empty());
  p.chunks = stored_chunks + kept_chunks;

  const int64_t partial_size = p.rows * (p.value_dim + 2);
  std::unique_ptr<float[]> partials(p.chunks > 1 ? new float[pairs * p.chunks * partial_size] : nullptr);
  std::unique_ptr<std::atomic<int64_t>[]> finished(p.chunks > 1 ? new std::atomic<int64_t>[pairs] : nullptr);
  for (int64_t i = 0; finished && i < pairs; ++i) finished[i].store(0, std::memory_order_relaxed);
  std::atomic<int64_t> next{0}, done{0};
  const int64_t units = pairs * p.chunks;
  threads = int(std::min<int64_t>(threads, units));

  auto work = [&] {
    static thread_local Workspace workspace;
    workspace.reserve(p);
    std::vector<float> values(p.value_dim);
#ifdef ICW_AMX
    if (p.engine == Engine::kAmx) configure_tiles(p);
#endif
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      const int64_t pair = unit / p.chunks, c = unit % p.chunks, b = pair / p.heads, h = pair % p.heads;
      const int64_t start = c * p.chunk, end = std::min(length, start + p.chunk);
      Order order = p.engine == Engine::kPortable ? Order::kNatural : Order::kOfBytes;
      if (p.is_prompt) {
        const int64_t first = c * kOwnChunk, last = std::min(length, first + kOwnChunk);
        order = run_own(p, workspace, b, h, first, last);
      } else if (c == stored_chunks) {
        order = Order::kNatural;
        run_kept(p, workspace, b, h, 0, int64_t(p.kept.size()));
      } else if (!run_unit(p, workspace, b, h, start, end)) {
        Problem portable = p;
        portable.engine = Engine::kPortable;
        order = Order::kNatural;
        run_unit(portable, workspace, b, h, start, end);
      }
      done.fetch_add(1, std::memory_order_relaxed);
      if (p.chunks == 1) {
        for (int64_t row = 0; row < p.rows; ++row) {
          copy_row(order, workspace.accumulated + row * p.value_width, p.value_dim, values.data());
          write_output(p, b, h, row, values.data(), workspace.largest[row], workspace.sum[row]);
        }
        continue;
      }
      write_partial(p, workspace, order, partials.get() + unit * partial_size);
      if (finished[pair].fetch_add(1, std::memory_order_acq_rel) + 1 == p.chunks)
        merge_partials(p, b, h, partials.get() + pair * p.chunks * partial_size, values);
    }
#ifdef ICW_AMX
    if (p.engine == Engine::kAmx) _tile_release();
#endif
  };
  in_parallel(threads, work);
  if (done.load() != units) throw NoMemory();
}

// A prompt in tiles of tokens, for which the keys are laid out once.
void run_tiles(const Problem& p, int threads, int engine) {
  const int64_t tile = p.tokens > kFewTokens ? std::max<int64_t>(kTileRows / (p.query_heads / p.heads), 1) : p.tokens;
  auto moved = [](const void* data, int64_t elements, Type type) {
    return static_cast<const char*>(data) + elements * int64_t(size_of(type));
  };
  for (int64_t first = 0; first < p.tokens; first += tile) {
    Problem part = p;
    part.tokens = std::min(tile, p.tokens - first);
    part.before += first;
    part.query.data = moved(p.query.data, first * p.query.row, p.query.type);
    if (p.mask.data != nullptr) part.mask.data = moved(p.mask.data, first * p.mask.row, p.mask.type);
    part.out = const_cast<char*>(moved(p.out, first * p.to.row, p.query.type));
    run(part, threads, engine);
  }
}

// ------------------------------------------------------------------------------------------------------ packing a row

// `quantize_halves` of icw_compile/formats/int4.py, for one row. Whole numbers but for the scale: every engine finds the
// same. The temporaries are those of one half.
struct PackRow {
  int64_t half;
  std::vector<float> values, units, index, best;  // Whole numbers all but the first.

  explicit PackRow(int64_t half)
      : half(half), values(2 * half), units(round_up(half, kLanes)), index(units), best(units) {}

  // Rounds a scale to what it is stored as.
  template <typename Round>
  float operator()(const Strided& x, int64_t offset, const Round& stored, uint8_t* packed, uint8_t* codes) {
    load_run(x.data, offset, x.last, 2 * half, x.type, values.data());
    float needed = 0.0f, broken = 0.0f;
    for (const float* begin = values.data(); begin < values.data() + 2 * half; begin += half) {
      float least = kInf, most = -kInf;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : broken)
      for (int64_t d = 0; d < half; ++d) {
        broken += begin[d] * 0.0f;
        least = begin[d] < least ? begin[d] : least;
        most = begin[d] > most ? begin[d] : most;
      }
      needed = std::max({needed, (most - least) / 165.0f, std::max(most, -least) / 121.0f});
    }
    const float scale = broken != 0.0f ? kNaN : stored(needed);
    const float inverse = scale > 0.0f ? 64.0f / scale : 0.0f;
    codes[0] = pack_half(values.data(), inverse);
    for (int64_t d = 0; d < half; ++d) packed[d] = uint8_t(best[d]);
    codes[1] = pack_half(values.data() + half, inverse);
    for (int64_t d = 0; d < half; ++d) packed[d] |= uint8_t(int(best[d]) << 4);
    return scale;
  }

 private:
  // The indices, to `best`; returns the code.
  uint8_t pack_half(const float* x, float inverse) {
    float smallest_unit = kInf, largest_unit = -kInf;
    float* __restrict unit = units.data();
#pragma omp simd reduction(min : smallest_unit) reduction(max : largest_unit)
    for (int64_t d = 0; d < half; ++d) {
      float scaled = x[d] * inverse;
      scaled = scaled == scaled ? scaled : 0.0f;
      scaled = scaled < -16384.0f ? -16384.0f : scaled > 16384.0f ? 16384.0f : scaled;
      unit[d] = std::nearbyint(scaled);
      smallest_unit = unit[d] < smallest_unit ? unit[d] : smallest_unit;
      largest_unit = unit[d] > largest_unit ? unit[d] : largest_unit;
    }
    const int32_t least = int32_t(smallest_unit), most = int32_t(largest_unit);
    const int32_t largest = std::max(most, -least);
    int32_t width = std::max((most - least + 30 * kUnit - 1) / (30 * kUnit), (largest + 22 * kUnit - 1) / (22 * kUnit));
    width = std::min(std::max(width, 10), 32);
    const int first = width >= 24 ? 32 - width : 8 + (24 - width) / 2;
    int64_t smallest = std::numeric_limits<int64_t>::max();
    uint8_t code = 0;
    for (int i = first; i < first + 5; ++i) {
      const int clamped = std::min(i, 15), step = table_width(clamped) * 2 * kUnit;
      const int nearest = int(std::floor((float(least + most + step / 2) + 0.5f) / float(step)));
      for (int side = -1; side <= 1; ++side) {
        const int middle = std::min(std::max(nearest + side, kLeastMiddle), kMostMiddle);
        const int64_t error = try_table(step, middle);
        if (error >= smallest) continue;
        smallest = error;
        code = uint8_t(clamped * 16 + middle - kLeastMiddle);
        best.swap(index);
      }
    }
    return code;
  }

  // The nearest indices, to `index`; returns the sum of squares of what is left. Vectors by hand: see `Floats`.
  int64_t try_table(int32_t step, int32_t middle) {
    const float inverse = 1.0f / float(step), half_step = float(step / 2);
    // The half keeps the product off the whole numbers, so that it is rounded down as the quotient is.
    const Floats from = Floats{} + (float((16 - middle) * (step / 2)) + 0.5f);
    // A level and 128: what is positive is rounded down by leaving its fraction out.
    const float slope = half_step / 32.0f, shift = (float(middle - 15) * half_step + 32.0f) / 64.0f + 128.0f;
    const Floats zero = {}, last = zero + 15.0f, farthest = zero + 2047.0f;
    int64_t error = 0;
    for (int64_t begin = 0; begin < half; begin += 256) {  // As many squares as 32 bits hold.
      Words sum = {};
      const int64_t end = std::min(begin + 256, half);
      for (int64_t d = begin; d < end; d += kLanes) {
        const Floats unit = load_floats(units.data() + d);
        Floats at = (unit + from) * inverse;
        at = at < zero ? zero : at;
        at = at > last ? last : at;
        at = __builtin_convertvector(__builtin_convertvector(at, Words), Floats);
        const Words level = __builtin_convertvector(at * slope + shift, Words) - 128;
        Floats off = __builtin_convertvector(level * 64, Floats) - unit;
        off = off < -farthest ? -farthest : off;
        off = off > farthest ? farthest : off;
        Words whole = __builtin_convertvector(off, Words);
        if (end - d < kLanes)
          for (int64_t lane = end - d; lane < kLanes; ++lane) whole[lane] = 0;
        sum += whole * whole;
        std::memcpy(index.data() + d, &at, sizeof(at));
      }
      for (int lane = 0; lane < kLanes; ++lane) error += sum[lane];
    }
    return error;
  }
};

// -------------------------------------------------------------------------------- the shift of channels that are outliers

// log2(x) of a positive normal x, to about one unit in the last place of the larger of the result and 1.
inline float log2_normal(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const int32_t exponent = int32_t(bits - 0x3f3504f3) >> 23;  // Leaves a mantissa in [sqrt(1/2), sqrt(2)).
  const float mantissa = bits_as<float>(bits - (uint32_t(exponent) << 23));
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f), square = s * s;
  float p = 0.320598898f;  // 2 / ln 2 over 9, 7, 5, 3, 1: the series of the inverse hyperbolic tangent.
  p = p * square + 0.412198583f;
  p = p * square + 0.577078016f;
  p = p * square + 0.961796694f;
  p = p * square + 2.88539008f;
  return float(exponent) + s * p;
}

constexpr float kOutlier = 1.5849625f, kMaxShift = 7.0f, kNegligible = 0x1p-15f;  // As their names have it there.

// The statistic of one head: `channel_shift` of icw_compile/formats/equalized.py.
struct ChannelShift {
  int64_t size;
  std::vector<float> row, tells, rows, largest, sorted;
  std::vector<double> usual;

  explicit ChannelShift(int64_t size)
      : size(size), row(size), tells(size), rows(size), largest(size), sorted(size), usual(size) {}

  // x is [tokens, size] at `offset`; out is contiguous.
  void operator()(const Strided& x, int64_t offset, int64_t tokens, uint8_t* out) {
    std::fill(largest.begin(), largest.end(), -kInf);
    std::fill(usual.begin(), usual.end(), 0.0);
    std::fill(rows.begin(), rows.end(), 0.0f);
    for (int64_t t = 0; t < tokens; ++t) add_row(x, offset + t * x.row);
    for (int64_t d = 0; d < size; ++d) row[d] = float(usual[d] / double(rows[d]));
    const float usual_median = median(row), largest_median = median(largest);
    for (int64_t d = 0; d < size; ++d) {
      const float above = std::min(row[d] - usual_median, largest[d] - largest_median);
      out[d] = rows[d] > 1.0f && above >= kOutlier ? uint8_t(std::min(std::floor(above), kMaxShift)) : 0;
    }
  }

 private:
  void add_row(const Strided& x, int64_t offset) {
    float* __restrict values = row.data();
    float* __restrict counts = tells.data();
    load_run(x.data, offset, x.last, size, x.type, values);
    float amax = 0.0f, sum = 0.0f, number = 0.0f;
    int broken = 0;
#pragma omp simd reduction(max : amax) reduction(+ : broken)
    for (int64_t d = 0; d < size; ++d) {
      values[d] = std::fabs(values[d]);
      broken += !(values[d] < kInf);
      amax = values[d] > amax ? values[d] : amax;
    }
    if (broken || amax == 0.0f) return;
#pragma omp simd reduction(+ : sum, number)
    for (int64_t d = 0; d < size; ++d) {
      const float part = values[d] / amax;
      counts[d] = part < kNegligible ? 0.0f : 1.0f;
      values[d] = log2_normal(part < kNegligible ? 1.0f : part);
      sum += values[d];
      number += counts[d];
    }
    const float mean = sum / number;
    double* __restrict total = usual.data();
    float* __restrict seen = rows.data();
    float* __restrict most = largest.data();
    for (int64_t d = 0; d < size; ++d) {
      const float relative = values[d] - mean;
      total[d] += counts[d] * relative;
      seen[d] += counts[d];
      most[d] = counts[d] > 0.0f && relative > most[d] ? relative : most[d];
    }
  }

  // Of the channels of which a row tells something.
  float median(const std::vector<float>& values) {
    sorted.clear();
    for (int64_t d = 0; d < size; ++d)
      if (rows[d] > 0.0f) sorted.push_back(values[d]);
    if (sorted.empty()) return 0.0f;
    const auto middle = sorted.begin() + (sorted.size() - 1) / 2;
    std::nth_element(sorted.begin(), middle, sorted.end());
    return *middle;
  }
};

bool all_zero(const Strided& x, int64_t offset, int64_t rows, int64_t size) {
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t i = 0; i < size; ++i)
      if (load(x.data, offset + t * x.row + i * x.last, x.type) != 0.0f) return false;
  return true;
}

}  // namespace

// --------------------------------------------------------------------------------------------------- the torch operator

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kFloat16;
    case ScalarType::Double: return Type::kFloat64;
    case ScalarType::Bool: return Type::kBool;
    default: STD_TORCH_CHECK(false, "icw_int8kv: unsupported dtype of ", name);
  }
}

Strided strided(const Tensor& tensor, const char* name, bool is_stored, bool is_packed = false) {
  STD_TORCH_CHECK(tensor.dim() == 4, "icw_int8kv_cpu::attention: ", name, " must have 4 dimensions, got ", tensor.dim());
  const auto strides = tensor.strides();
  Strided out;
  out.data = tensor.data_ptr();
  out.batch = strides[0];
  out.head = strides[1];
  out.row = strides[2];
  out.last = strides[3];
  if (!is_stored) {
    out.type = type_of(tensor, name);
  } else {
    STD_TORCH_CHECK(tensor.scalar_type() == (is_packed ? ScalarType::Byte : ScalarType::Char),
                    "icw_int8kv_cpu::attention: ", name, " must be ", is_packed ? "uint8" : "int8");
    STD_TORCH_CHECK(out.last == 1 || tensor.size(3) == 1, "icw_int8kv_cpu::attention: the channels of ", name,
                    " must be contiguous, got stride ", out.last);
  }
  return out;
}

void check_shape(const Tensor& tensor, const char* name, int64_t b, int64_t h, int64_t s, int64_t d) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes[0] == b && sizes[1] == h && sizes[2] == s && sizes[3] == d, "icw_int8kv_cpu::attention: ", name,
                  " must be [", b, ", ", h, ", ", s, ", ", d, "], got [", sizes[0], ", ", sizes[1], ", ", sizes[2],
                  ", ", sizes[3], "]");
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  const auto error = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                              aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "icw_int8kv: the output cannot be allocated");
  return Tensor(handle);
}

Strided shifts(const Problem& p, const Tensor& exponents, const char* name, int64_t size) {
  check_shape(exponents, name, p.batch, p.heads, 1, size);
  return strided(exponents, name, true, true);
}

// The rows that are kept of keys and values, some of which may be kept of one of them alone.
void find_kept(Problem& p, const std::optional<Tensor>& keys, const std::optional<Tensor>& key_position,
               const std::optional<Tensor>& values, const std::optional<Tensor>& value_position) {
  auto collect = [&](const Tensor& exact, const Tensor& position, const char* name, int64_t size, Strided& rows,
                     int64_t KeptRow::*place) {
    STD_TORCH_CHECK(position.dim() == 1 && position.scalar_type() == ScalarType::Long,
                    "icw_int8kv_cpu::attention: the positions of ", name, " must be int64 [K]");
    rows = strided(exact, name, false);
    check_shape(exact, name, p.batch, p.heads, position.size(0), size);
    const int64_t* at = static_cast<const int64_t*>(position.data_ptr());
    const int64_t places = position.size(0), stride = position.stride(0);
    for (int64_t i = 0; i < places; ++i) {
      KeptRow row{at[i * stride], -1, -1};
      row.*place = i;
      if (row.row >= 0 && row.row < p.length) p.kept.push_back(row);
    }
  };
  STD_TORCH_CHECK(keys.has_value() == key_position.has_value() && values.has_value() == value_position.has_value(),
                  "icw_int8kv_cpu::attention: rows that are kept have positions");
  if (keys) collect(*keys, *key_position, "key_exact", p.head_dim, p.kept_keys, &KeptRow::key);
  if (values) collect(*values, *value_position, "value_exact", p.value_dim, p.kept_values, &KeptRow::value);
  std::stable_sort(p.kept.begin(), p.kept.end(), [](const KeptRow& a, const KeptRow& b) { return a.row < b.row; });
  size_t rows = 0;
  for (const KeptRow& row : p.kept) {
    if (rows == 0 || p.kept[rows - 1].row != row.row) {
      p.kept[rows++] = row;
      continue;
    }
    KeptRow& same = p.kept[rows - 1];
    if (same.key < 0) same.key = row.key;
    if (same.value < 0) same.value = row.value;
  }
  p.kept.resize(rows);
}

void set_query(Problem& p, const Tensor& query) {
  p.query = strided(query, "query", false);
  const auto sizes = query.sizes();
  p.batch = sizes[0];
  p.query_heads = sizes[1];
  p.tokens = sizes[2];
  p.head_dim = sizes[3];
}

void check_heads(const Problem& p) {
  STD_TORCH_CHECK(p.heads > 0 && p.query_heads % p.heads == 0, "icw_int8kv_cpu::attention: ", p.query_heads,
                  " query heads cannot be grouped on ", p.heads, " key/value heads");
  STD_TORCH_CHECK(p.query.type != Type::kBool && p.query.type != Type::kFloat64,
                  "icw_int8kv_cpu::attention: query must be float32, bfloat16 or float16");
}

void set_mask(Problem& p, const Tensor& mask) {
  p.mask = strided(mask, "attn_mask", false);
  const int64_t full[4] = {p.batch, p.query_heads, p.tokens, p.length};
  int64_t* strides[4] = {&p.mask.batch, &p.mask.head, &p.mask.row, &p.mask.last};
  for (int i = 0; i < 4; ++i) {
    const int64_t size = mask.size(i);
    STD_TORCH_CHECK(size == full[i] || size == 1, "icw_int8kv_cpu::attention: attn_mask does not broadcast to [",
                    full[0], ", ", full[1], ", ", full[2], ", ", full[3], "]: dimension ", i, " is ", size);
    if (size == 1) *strides[i] = 0;
  }
  p.mask_by_head = p.mask.head != 0;
  p.mask_by_token = p.mask.row != 0;
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  aoti_torch_get_dtype(tensor.get(), &dtype);
  return dtype;
}

// Into `out`, whose rows of channels follow one another as `rows` says: those of a batch, a head and a token.
void compute(Problem& p, Tensor& out, const std::array<int64_t, 3>& rows, int engine) {
  p.out = out.data_ptr();
  p.to.batch = rows[0] * p.value_dim;
  p.to.head = rows[1] * p.value_dim;
  p.to.row = rows[2] * p.value_dim;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  if (p.batch * p.query_heads * p.tokens * p.value_dim > 0) run_tiles(p, int(threads), engine);
}

Tensor attention(const Tensor& query, const Tensor& key_qdata, const Tensor& key_scale, const Tensor& value_qdata,
                 const Tensor& value_scale, const std::optional<Tensor>& attn_mask, bool is_causal, double scale,
                 std::optional<double> softcap, const std::optional<Tensor>& sinks, int64_t engine,
                 const std::optional<Tensor>& key_codes, const std::optional<Tensor>& value_codes,
                 const std::optional<Tensor>& key_exact, const std::optional<Tensor>& key_position,
                 const std::optional<Tensor>& value_exact, const std::optional<Tensor>& value_position,
                 const std::optional<Tensor>& key_shift, const std::optional<Tensor>& value_shift) {
  const int64_t in_key = key_codes ? 2 : 1, in_value = value_codes ? 2 : 1;  // Channels in a byte.
  Problem p;
  set_query(p, query);
  p.key = strided(key_qdata, "key_qdata", true, key_codes.has_value());
  p.key_scale = strided(key_scale, "key_scale", false);
  p.value = strided(value_qdata, "value_qdata", true, value_codes.has_value());
  p.value_scale = strided(value_scale, "value_scale", false);
  p.heads = key_qdata.size(1);
  p.length = key_qdata.size(2);
  p.value_dim = value_qdata.size(3) * in_value;
  STD_TORCH_CHECK(p.head_dim % in_key == 0, "icw_int8kv_cpu::attention: packed keys have an even size, not ", p.head_dim);
  check_shape(key_qdata, "key_qdata", p.batch, p.heads, p.length, p.head_dim / in_key);
  check_shape(value_qdata, "value_qdata", p.batch, p.heads, p.length, p.value_dim / in_value);
  check_shape(key_scale, "key_scale", p.batch, p.heads, p.length, 1);
  check_shape(value_scale, "value_scale", p.batch, p.heads, p.length, 1);
  if (key_codes) {
    check_shape(*key_codes, "key_codes", p.batch, p.heads, p.length, 2);
    p.key_codes = strided(*key_codes, "key_codes", true, true);
  }
  if (value_codes) {
    check_shape(*value_codes, "value_codes", p.batch, p.heads, p.length, 2);
    p.value_codes = strided(*value_codes, "value_codes", true, true);
  }
  check_heads(p);
  find_kept(p, key_exact, key_position, value_exact, value_position);
  if (key_shift) p.key_shift = shifts(p, *key_shift, "key_shift", p.head_dim);
  if (value_shift) p.value_shift = shifts(p, *value_shift, "value_shift", p.value_dim);
  if (attn_mask.has_value()) set_mask(p, *attn_mask);
  p.is_causal = is_causal;
  p.scale = float(scale);
  p.has_softcap = softcap.has_value();
  p.softcap = float(softcap.value_or(0.0));
  if (sinks.has_value()) {
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == p.query_heads, "icw_int8kv_cpu::attention: sinks must be [",
                    p.query_heads, "]");
    p.sinks.resize(p.query_heads);
    load_run(sinks->data_ptr(), 0, sinks->stride(0), p.query_heads, type_of(*sinks, "sinks"), p.sinks.data());
  }

  Tensor out = empty({p.batch, p.query_heads, p.tokens, p.value_dim}, dtype_of(query));
  compute(p, out, {p.query_heads * p.tokens, p.tokens, 1}, int(engine));
  return out;
}

// Attention over rows as they came; causal queries are those of the last rows. Returns [B, T, Hq, Dv].
Tensor prompt(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
              bool is_causal, double scale, int64_t engine) {
  Problem p;
  set_query(p, query);
  p.is_prompt = true;
  p.kept_keys = strided(key, "key", false);
  p.kept_values = strided(value, "value", false);
  p.heads = key.size(1);
  p.length = key.size(2);
  p.value_dim = value.size(3);
  check_shape(key, "key", p.batch, p.heads, p.length, p.head_dim);
  check_shape(value, "value", p.batch, p.heads, p.length, p.value_dim);
  check_heads(p);
  if (attn_mask.has_value()) set_mask(p, *attn_mask);
  p.is_causal = is_causal;
  p.before = p.length - p.tokens;
  STD_TORCH_CHECK(!is_causal || p.before >= 0, "icw_int8kv_cpu::prompt: ", p.tokens, " causal queries of ", p.length,
                  " rows");
  p.scale = float(scale);
  Tensor out = empty({p.batch, p.tokens, p.query_heads, p.value_dim}, dtype_of(query));
  compute(p, out, {p.tokens * p.query_heads, 1, p.query_heads}, int(engine));
  return out;
}

// Whether `prompt` is faster than what torch has. Not measured with AMX, which torch uses for products of bfloat16.
bool is_for_prompts(int64_t head_dim) {
#ifdef ICW_BF16
  return best_engine(256) == Engine::kVnni && head_dim <= 256 && head_dim % 4 == 0;
#else
  return false;
#endif
}

// How the rows of each head lie in a tensor whose first dimensions are those of `like`, or 1.
struct Heads {
  Strided rows;
  std::vector<int64_t> strides;  // Of the dimensions in front of tokens and channels; 0 where it broadcasts.

  Heads(const Tensor& tensor, const char* name, const Tensor& like) {
    const int64_t dims = like.dim();
    STD_TORCH_CHECK(tensor.dim() == dims, "icw_int8kv: ", name, " must have ", dims, " dimensions");
    for (int64_t i = 0; i < dims - 2; ++i) {
      STD_TORCH_CHECK(tensor.size(i) == like.size(i) || tensor.size(i) == 1, "icw_int8kv: dimension ", i,
                      " of ", name, " is ", tensor.size(i), " and not ", like.size(i));
      strides.push_back(tensor.size(i) == 1 ? 0 : tensor.stride(i));
    }
    rows.data = tensor.data_ptr();
    rows.row = tensor.stride(dims - 2);
    rows.last = tensor.stride(dims - 1);
  }

  int64_t offset(int64_t head, const Tensor& like) const {
    int64_t offset = 0;
    for (int64_t i = int64_t(strides.size()); i-- > 0; head /= like.size(i)) offset += head % like.size(i) * strides[i];
    return offset;
  }
};

Tensor settle_shift(const Tensor& x, const Tensor& written, const Tensor& shift) {
  const int64_t dims = shift.dim();
  STD_TORCH_CHECK(dims >= 2 && shift.size(dims - 2) == 1 && shift.scalar_type() == ScalarType::Byte,
                  "icw_int8kv::settle_shift: shift must be uint8 [..., 1, D]");
  Heads values(x, "x", shift), rows(written, "written", shift);
  const Heads settled(shift, "shift", shift);
  values.rows.type = type_of(x, "x");
  rows.rows.type = type_of(written, "written");
  const int64_t size = shift.size(dims - 1), tokens = x.size(dims - 2);
  STD_TORCH_CHECK(x.size(dims - 1) == size, "icw_int8kv::settle_shift: x has ", x.size(dims - 1), " channels and not ",
                  size);
  const auto sizes = shift.sizes();
  int32_t dtype;
  aoti_torch_get_dtype(shift.get(), &dtype);
  Tensor out = empty(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
  const int64_t heads = size ? out.numel() / size : 0;
  uint8_t* shifts = static_cast<uint8_t*>(out.data_ptr());
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  if (heads * tokens * size < 64 * 1024) threads = 1;
  std::atomic<int64_t> next{0}, done{0};
  in_parallel(int(std::min<int64_t>(threads, heads)), [&] {
    ChannelShift channel_shift(size);
    for (int64_t head; (head = next.fetch_add(1, std::memory_order_relaxed)) < heads;) {
      uint8_t* to = shifts + head * size;
      if (all_zero(rows.rows, rows.offset(head, shift), written.size(dims - 2), written.size(dims - 1))) {
        channel_shift(values.rows, values.offset(head, shift), tokens, to);
      } else {
        const uint8_t* from = static_cast<const uint8_t*>(settled.rows.data) + settled.offset(head, shift);
        for (int64_t d = 0; d < size; ++d) to[d] = from[d * settled.rows.last];
      }
      done.fetch_add(1, std::memory_order_relaxed);
    }
  });
  if (done.load() != heads) throw NoMemory();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_halves(const Tensor& x, ScalarType scale_dtype) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && x.size(dims - 1) % 2 == 0, "icw_int8kv::quantize_halves: the rows must have an even size");
  const bool is_float = scale_dtype == ScalarType::Float;
  STD_TORCH_CHECK(is_float || scale_dtype == ScalarType::BFloat16,
                  "icw_int8kv::quantize_halves: scales are float32 or bfloat16");
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<int64_t> of_packed(sizes.begin(), sizes.end());
  const int64_t half = of_packed.back() / 2, rows = half ? x.numel() / (2 * half) : 0;
  of_packed.back() = half;
  std::vector<int64_t> of_scale = of_packed, of_codes = of_packed;
  of_scale.back() = 1;
  of_codes.back() = 2;
  Tensor packed = empty(of_packed, aoti_torch_dtype_uint8());
  Tensor scale = empty(of_scale, is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16());
  Tensor codes = empty(of_codes, aoti_torch_dtype_uint8());
  Strided in;
  in.data = x.data_ptr();
  in.last = strides[dims - 1];
  in.type = type_of(x, "x");
  uint8_t* packed_data = static_cast<uint8_t*>(packed.data_ptr());
  uint8_t* codes_data = static_cast<uint8_t*>(codes.data_ptr());
  void* scale_data = scale.data_ptr();
  auto stored = [&](float value) { return is_float ? value : bf16_to_float(float_to_bf16(value)); };
  constexpr int64_t kRows = 64;  // Rows that are drawn at once.
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  if (rows * half < 4 * 1024) threads = 1;
  std::atomic<int64_t> next{0}, done{0};
  const int64_t units = (rows + kRows - 1) / kRows;
  in_parallel(int(std::min<int64_t>(threads, std::max<int64_t>(units, 1))), [&] {
    PackRow pack(half);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      for (int64_t row = unit * kRows; row < std::min(rows, (unit + 1) * kRows); ++row) {
        int64_t offset = 0, rest = row;
        for (int64_t i = dims - 1; i-- > 0; rest /= sizes[i]) offset += rest % sizes[i] * strides[i];
        const float value = pack(in, offset, stored, packed_data + row * half, codes_data + row * 2);
        if (is_float) static_cast<float*>(scale_data)[row] = value;
        else static_cast<uint16_t*>(scale_data)[row] = float_to_bf16(value);
      }
      done.fetch_add(1, std::memory_order_relaxed);
    }
  });
  if (done.load() != units) throw NoMemory();
  return {packed, scale, codes};
}

// Rows of int8 with a scale each, once the channels of each head are divided: `quantize_divided` of equalized.py.
std::tuple<Tensor, Tensor> quantize_divided(const Tensor& x, const std::optional<Tensor>& shift, bool short_scale) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 2, "icw_int8kv::quantize_divided: x must be [..., T, D]");
  const int64_t tokens = x.size(dims - 2), size = x.size(dims - 1);
  Heads values(x, "x", x);
  values.rows.type = type_of(x, "x");
  STD_TORCH_CHECK(values.rows.type != Type::kBool, "icw_int8kv::quantize_divided: x must be of a float dtype");
  std::optional<Heads> shifts;
  if (shift.has_value()) {
    STD_TORCH_CHECK(shift->scalar_type() == ScalarType::Byte, "icw_int8kv::quantize_divided: shift must be uint8");
    shifts.emplace(*shift, "shift", x);
    STD_TORCH_CHECK(shift->size(dims - 2) == 1 && shift->size(dims - 1) == size,
                    "icw_int8kv::quantize_divided: shift must be [..., 1, ", size, "]");
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor qdata = empty(sizes, aoti_torch_dtype_int8());
  sizes.back() = 1;
  Tensor scale = empty(sizes, short_scale ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32());
  const Type scale_type = short_scale ? Type::kBFloat16 : Type::kFloat32;
  int8_t* const out = static_cast<int8_t*>(qdata.data_ptr());
  void* const scales = scale.data_ptr();
  const int64_t rows = scale.numel();
  // Heads of few tokens are one unit, a long head is several.
  const int64_t block = std::min<int64_t>(std::max<int64_t>(tokens, 1), 64), blocks = (tokens + block - 1) / block;
  const int64_t units = tokens ? rows / tokens * blocks : 0;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  if (rows * size < 64 * 1024) threads = 1;
  std::atomic<int64_t> next{0}, done{0};
  in_parallel(int(std::min<int64_t>(threads, std::max<int64_t>(units, 1))), [&] {
    std::vector<float> row(size), factors(size, 1.0f);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      const int64_t head = unit / blocks, first = unit % blocks * block, last = std::min(first + block, tokens);
      if (shifts) {
        const uint8_t* by = static_cast<const uint8_t*>(shifts->rows.data) + shifts->offset(head, x);
        for (int64_t d = 0; d < size; ++d) factors[d] = std::ldexp(1.0f, -int(by[d * shifts->rows.last]));
      }
      const int64_t offset = values.offset(head, x);
      for (int64_t t = first; t < last; ++t) {
        load_run(values.rows.data, offset + t * values.rows.row, values.rows.last, size, values.rows.type, row.data());
        float* __restrict in = row.data();
        const float* __restrict factor = factors.data();
        uint32_t largest = 0;  // As bits, of which those of NaN are the largest.
        for (int64_t d = 0; d < size; ++d) {
          in[d] *= factor[d];
          largest = std::max(largest, bits_as<uint32_t>(in[d]) & 0x7fffffff);
        }
        const int64_t at = head * tokens + t;
        const float exact = bits_as<float>(largest) / 127.0f;
        store_run(scales, at, 1, scale_type, &exact, 1.0f);
        const float step = load(scales, at, scale_type);
        int8_t* __restrict to = out + at * size;
        for (int64_t d = 0; d < size; ++d) {
          float steps = in[d] / step;
          steps = steps == steps ? steps : 0.0f;
          steps = std::min(std::max(steps, -127.0f), 127.0f);
          to[d] = int8_t(int32_t(std::nearbyint(steps)));
        }
      }
      done.fetch_add(1, std::memory_order_relaxed);
    }
  });
  if (done.load() != units) throw NoMemory();
  return {qdata, scale};
}

int64_t engine(int64_t head_dim) { return int64_t(best_engine(head_dim)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(icw_int8kv_cpu, CompositeExplicitAutograd, m) {
  m.impl("engine", TORCH_BOX(&engine));
  m.impl("is_for_prompts", TORCH_BOX(&is_for_prompts));
}

STABLE_TORCH_LIBRARY_IMPL(icw_int8kv_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("prompt", TORCH_BOX(&prompt));
}

STABLE_TORCH_LIBRARY_IMPL(icw_int8kv, CPU, m) {
  m.impl("settle_shift", TORCH_BOX(&settle_shift));
  m.impl("quantize_halves_cpu", TORCH_BOX(&quantize_halves));
  m.impl("quantize_divided", TORCH_BOX(&quantize_divided));
}

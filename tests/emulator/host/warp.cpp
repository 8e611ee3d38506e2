// What the lanes of a warp do together. Each lane brings its operands and waits; the last to arrive computes for all.
//
// Fragment layouts are those of the PTX ISA, sections "Matrix fragments for mma.m16n8k16 / m16n8k8" and "ldmatrix".
// Only __syncwarp orders memory: a shuffle or a vote is no barrier.
#include <cstring>

#include "runtime.h"

namespace emulator {
namespace {

enum class Operation { sync, shuffle, vote, reduce, mma_bf16, mma_f16, mma_tf32, ldmatrix };
const char* const names[] = {"__syncwarp", "a shuffle", "a vote", "__reduce_sync", "mma", "mma", "mma", "ldmatrix"};

// Lanes that wait for each other. Disjoint masks of one warp may meet at the same time.
struct Meeting {
  Operation operation;
  unsigned mask, arrived;
  int detail;  // what else must agree: number of matrices, transposed or not, the kind of reduction
  std::vector<uint32_t> clock;
};
std::vector<Meeting> meetings[warp_size];

using Lanes = Thread*;  // the warp's first thread; lane l is lanes[l]

float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t{bits} << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

float from_f16(uint16_t bits) {
  uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  float value;
  if (rest >= 0x7c00) {
    rest = 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400) {
    rest = (rest << 13) + (112u << 23);
  } else {  // subnormal: a multiple of 2^-24
    value = static_cast<float>(rest) * 0x1p-24f;
    memcpy(&rest, &value, 4);
  }
  rest |= sign;
  memcpy(&value, &rest, 4);
  return value;
}

float from_tf32(uint32_t bits) {  // the hardware does not read the last 13 bits
  bits &= 0xffffe000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// D (16×8) = A (16×K) · B (K×8) + C. The lane is 4·group + member; C's rows are group and group + 8.
template <int K>
void multiply(Lanes lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  float c[16][8];
  for (int lane = 0; lane < warp_size; ++lane)
    for (int i = 0; i < 4; ++i) c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = lanes[lane].operands.c[i];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < warp_size; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane].operands.c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void mma_16bit(Lanes lanes, float (*decode)(uint16_t)) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < warp_size; ++lane) {
    int group = lane / 4, member = lane % 4;
    const Operands& in = lanes[lane].operands;
    for (int half = 0; half < 2; ++half) {  // registers hold two elements, the lower column or row in the lower bits
      int k = member * 2 + half;
      for (int i = 0; i < 4; ++i)
        a[group + i % 2 * 8][k + i / 2 * 8] = decode(static_cast<uint16_t>(in.a[i] >> 16 * half));
      for (int i = 0; i < 2; ++i) b[k + i * 8][group] = decode(static_cast<uint16_t>(in.b[i] >> 16 * half));
    }
  }
  multiply<16>(lanes, a, b);
}

void mma_tf32(Lanes lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < warp_size; ++lane) {
    int group = lane / 4, member = lane % 4;
    const Operands& in = lanes[lane].operands;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][member + i / 2 * 4] = from_tf32(in.a[i]);
    for (int i = 0; i < 2; ++i) b[member + i * 4][group] = from_tf32(in.b[i]);
  }
  multiply<8>(lanes, a, b);
}

// Row r of matrix m comes from the address of lane 8·m + r; a lane receives two neighbours of row lane / 4.
void ldmatrix(Lanes lanes, int matrices, bool transposed) {
  for (int m = 0; m < matrices; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) memcpy(matrix[row], lanes[8 * m + row].operands.row, 16);
    for (int lane = 0; lane < warp_size; ++lane) {
      int row = lane / 4, column = lane % 4 * 2;
      uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
      uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      lanes[lane].operands.a[m] = low | high << 16;
    }
  }
}

template <class T>
T reduce(Lanes lanes, unsigned mask, int kind) {
  T result{};
  bool first = true;
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    T value = static_cast<T>(lanes[lane].operands.value);
    if (first) result = value;
    else if (kind == '+') result = static_cast<T>(result + value);
    else if (kind == '<') result = value < result ? value : result;
    else if (kind == '>') result = value > result ? value : result;
    else if (kind == '&') result &= value;
    else if (kind == '|') result |= value;
    else result ^= value;
    first = false;
  }
  return result;
}

void compute(const Meeting& meeting, Lanes lanes, const void* where) {
  uint64_t given[warp_size];
  switch (meeting.operation) {
    case Operation::sync:
      for (int lane = 0; lane < warp_size; ++lane)
        if (meeting.mask >> lane & 1) acquire(lanes[lane], meeting.clock);
      break;
    case Operation::shuffle:
      for (int lane = 0; lane < warp_size; ++lane) given[lane] = lanes[lane].operands.value;
      for (int lane = 0; lane < warp_size; ++lane) {
        if (!(meeting.mask >> lane & 1)) continue;
        int source = lanes[lane].operands.lane;
        if (!(meeting.mask >> source & 1))
          fail("divergent warp", where, "lane %d shuffles from lane %d, which is not in mask %08x", lane, source,
               meeting.mask);
        lanes[lane].operands.value = given[source];
      }
      break;
    case Operation::vote: {
      unsigned votes = 0;
      for (int lane = 0; lane < warp_size; ++lane)
        if (meeting.mask >> lane & 1) votes |= static_cast<unsigned>(lanes[lane].operands.value != 0) << lane;
      for (int lane = 0; lane < warp_size; ++lane)
        if (meeting.mask >> lane & 1) lanes[lane].operands.value = votes;
      break;
    }
    case Operation::reduce: {
      int kind = meeting.detail & 0xff;
      uint64_t result = meeting.detail >> 8 ? static_cast<uint32_t>(reduce<int32_t>(lanes, meeting.mask, kind))
                                            : reduce<uint32_t>(lanes, meeting.mask, kind);
      for (int lane = 0; lane < warp_size; ++lane)
        if (meeting.mask >> lane & 1) lanes[lane].operands.value = result;
      break;
    }
    case Operation::mma_bf16: mma_16bit(lanes, from_bf16); break;
    case Operation::mma_f16: mma_16bit(lanes, from_f16); break;
    case Operation::mma_tf32: mma_tf32(lanes); break;
    case Operation::ldmatrix: ldmatrix(lanes, meeting.detail >> 1, meeting.detail & 1); break;
  }
}

unsigned lanes_that_exist(int warp) {
  int count = machine.thread_count - warp * warp_size;
  return count >= warp_size ? ~0u : (1u << count) - 1;
}

// The current lane's part in an operation; when it returns, the operands hold the results.
void meet(Operation operation, unsigned mask, int detail, const void* where) {
  Thread& me = *machine.current;
  int warp = me.number / warp_size, lane = me.number % warp_size;
  Lanes lanes = &machine.threads[warp * warp_size];
  const char* name = names[static_cast<int>(operation)];
  unsigned existing = lanes_that_exist(warp);
  if (operation >= Operation::mma_bf16 && existing != ~0u)
    fail("divergent warp", where, "%s in a warp of %d lanes", name, __builtin_popcount(existing));
  if (!(mask >> lane & 1)) fail("divergent warp", where, "%s with mask %08x by lane %d outside it", name, mask, lane);
  mask &= existing;
  for (int other = 0; other < warp_size; ++other)
    if ((mask >> other & 1) && lanes[other].state == State::finished)
      fail("divergent warp", where, "%s with mask %08x, of which lane %d has exited", name, mask, other);

  Meeting* meeting = nullptr;
  Meeting* unused = nullptr;
  for (Meeting& each : meetings[warp]) {
    if (!each.arrived) unused = &each;
    else if (each.operation == operation && each.mask == mask && each.detail == detail) meeting = &each;
  }
  if (!meeting) {
    if (!unused) unused = &meetings[warp].emplace_back();
    meeting = unused;
    *meeting = {operation, mask, 0, detail, std::vector<uint32_t>(machine.thread_count)};
  }
  for (const Meeting& other : meetings[warp])  // each waits for a lane that waits in the other: neither can end
    if (&other != meeting && (other.arrived & mask) && (other.mask & (meeting->arrived | 1u << lane)))
      fail("divergent warp", where, "%s with mask %08x while other lanes of it are at %s with mask %08x", name, mask,
           names[static_cast<int>(other.operation)], other.mask);
  if (operation == Operation::sync) release(me, meeting->clock);
  meeting->arrived |= 1u << lane;
  if (meeting->arrived != mask) {
    wait_for(name, where);
    return;
  }
  compute(*meeting, lanes, where);
  meeting->arrived = 0;
  for (int other = 0; other < warp_size; ++other)
    if ((mask >> other & 1) && other != lane) wake(lanes[other]);
  if ((random_bits() & 7) == 0) let_others_run();
}

void mma(Operation operation, float* c, const unsigned* a, unsigned b0, unsigned b1, const void* where) {
  Operands& mine = machine.current->operands;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.c, c, sizeof mine.c);
  mine.b[0] = b0;
  mine.b[1] = b1;
  meet(operation, ~0u, 0, where);
  memcpy(c, mine.c, sizeof mine.c);
}

}  // namespace

void begin_block_of_warps() {
  for (auto& warp : meetings) warp.clear();
}

void check_exit(Thread& thread) {
  if (!thread.copies.empty())
    fault("copy not awaited", thread.copies.front().where, "a thread exits with %zu cp.async it did not wait for",
          thread.copies.size());
  for (const Meeting& meeting : meetings[thread.number / warp_size])
    if (meeting.arrived && (meeting.mask >> thread.number % warp_size & 1)) {
      Lanes lanes = &machine.threads[thread.number / warp_size * warp_size];
      fail("divergent warp", lanes[__builtin_ctz(meeting.arrived)].waits_at,
           "%s with mask %08x, of which lane %d exits instead", names[static_cast<int>(meeting.operation)],
           meeting.mask, thread.number % warp_size);
    }
}

}  // namespace emulator

using namespace emulator;

TTR_API void ttr_syncwarp(unsigned mask) { meet(Operation::sync, mask, 0, TTR_CALLER); }

// The value of lane `source` of the warp, which must be in the mask.
TTR_API uint64_t ttr_shfl(unsigned mask, uint64_t value, int source) {
  Operands& mine = machine.current->operands;
  mine.value = value;
  mine.lane = source;
  meet(Operation::shuffle, mask, 0, TTR_CALLER);
  return mine.value;
}

TTR_API unsigned ttr_ballot(unsigned mask, int predicate) {
  Operands& mine = machine.current->operands;
  mine.value = predicate != 0;
  meet(Operation::vote, mask, 0, TTR_CALLER);
  return static_cast<unsigned>(mine.value);
}

// kind: one of + < > & | ^, where < is the minimum and > the maximum.
TTR_API unsigned ttr_reduce(unsigned mask, unsigned value, int kind, int is_signed) {
  Operands& mine = machine.current->operands;
  mine.value = value;
  meet(Operation::reduce, mask, kind | is_signed << 8, TTR_CALLER);
  return static_cast<unsigned>(mine.value);
}

TTR_API void ttr_mma_m16n8k16_bf16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  mma(Operation::mma_bf16, c, a, b0, b1, TTR_CALLER);
}

TTR_API void ttr_mma_m16n8k16_f16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  mma(Operation::mma_f16, c, a, b0, b1, TTR_CALLER);
}

TTR_API void ttr_mma_m16n8k8_tf32(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  mma(Operation::mma_tf32, c, a, b0, b1, TTR_CALLER);
}

static void load_matrices(unsigned* result, const void* row, int matrices, bool transposed, const void* where) {
  Thread& me = *machine.current;
  if (me.number % warp_size < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) & 15) fail("misaligned", where, "ldmatrix: a row at no multiple of 16 bytes");
    require_shared(row, 16, "ldmatrix", where);
    check_access(row, 16, Access::read, where);
  }
  me.operands.row = row;
  meet(Operation::ldmatrix, ~0u, matrices << 1 | transposed, where);
  memcpy(result, me.operands.a, sizeof(unsigned) * static_cast<size_t>(matrices));
}

TTR_API void ttr_ldmatrix_x1(unsigned* result, const void* row, bool transposed) {
  load_matrices(result, row, 1, transposed, TTR_CALLER);
}
TTR_API void ttr_ldmatrix_x2(unsigned* result, const void* row, bool transposed) {
  load_matrices(result, row, 2, transposed, TTR_CALLER);
}
TTR_API void ttr_ldmatrix_x4(unsigned* result, const void* row, bool transposed) {
  load_matrices(result, row, 4, transposed, TTR_CALLER);
}

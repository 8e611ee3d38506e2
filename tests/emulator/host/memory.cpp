// Memory that kernels see, cp.async into it, and the checker of every access to it.
//
// All of it lies in one arena, each buffer between pages that cannot be touched; what remains of a buffer's own pages
// holds ones in all bits (NaN in every floating-point type) and must still do so after the launch.
//
// In checked mode g++ -fsanitize=thread calls __tsan_read4(address) and the like before each access of a kernel. No
// sanitizer is linked: these functions are here. A cell for each byte of the arena remembers who wrote it last and some
// of those who read it since; a vector clock for each thread knows which of these accesses happened before now.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

#include "runtime.h"

namespace emulator {
namespace {

constexpr size_t arena_bytes = size_t{256} << 20;
constexpr size_t guard_bytes = 64 << 10;
constexpr size_t shared_capacity = 232 << 10;  // mapped
constexpr size_t shared_limit = 227 << 10;     // of sm_90 and sm_100
constexpr size_t static_limit = 48 << 10;

// An access is a thread's number (10 bits) and the value that its own clock had (22 bits). 0 is none.
constexpr int clock_bits = 22;
constexpr uint32_t clock_mask = (1u << clock_bits) - 1;

struct Cell {
  uint32_t tag;         // the launch (global memory) or block (shared memory) that the rest belongs to, and flags
  uint32_t writer;
  uint32_t reader[3];   // the last; the last other one of its warp; the last one of another warp
};
constexpr uint32_t initialised = 1u << 28, atomically = 1u << 29, pending = 1u << 30, serial_mask = initialised - 1;

struct Buffer {
  char* data;
  size_t bytes;
  std::string name;
  char *first, *last;  // its pages
};

char* arena;
Cell* cells;
uint8_t* addressable;  // by byte
size_t arena_top;
std::vector<Buffer> buffers;
char* shared;
std::vector<std::pair<size_t, size_t>> shared_parts;  // (offset, bytes), ascending: dynamic, then each static array
std::unordered_map<const void*, size_t> static_offsets;
size_t dynamic_bytes, static_bytes;
uint32_t serial, launch_serial, block_serial, first_clock;
uint32_t clocks[max_threads][max_threads];
uintptr_t image_first, image_last;  // the kernel's library: its constants may be read
uint64_t accesses[17];  // of global memory in this launch, by their bytes

char* reserve(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return static_cast<char*>(memory);
}

void create_arena() {
  if (arena) return;
  arena = reserve(arena_bytes, PROT_NONE);
  cells = reinterpret_cast<Cell*>(reserve(arena_bytes * sizeof(Cell), PROT_READ | PROT_WRITE));
  addressable = reinterpret_cast<uint8_t*>(reserve(arena_bytes, PROT_READ | PROT_WRITE));
  shared = arena + guard_bytes;
  mprotect(shared, shared_capacity, PROT_READ | PROT_WRITE);
  arena_top = guard_bytes + shared_capacity;
}

void set_addressable(const char* data, size_t bytes, bool value) { memset(addressable + (data - arena), value, bytes); }

bool in_shared(const void* address) {
  auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared);
  return offset < shared_capacity;
}

bool untouched(const char* first, const char* last) {
  // Equal to itself moved by one: all bytes are the first.
  return first >= last || (*first == '\xff' && !memcmp(first, first + 1, static_cast<size_t>(last - first - 1)));
}

// "byte 12 of argument 3 (8 bytes)"
std::string describe(const void* address) {
  auto* at = static_cast<const char*>(address);
  char text[160];
  if (at > shared - guard_bytes / 2 && at < shared + shared_capacity + guard_bytes / 2) {
    long offset = at - shared;
    const char* part = offset >= 0 && static_cast<size_t>(offset) < dynamic_bytes ? "dynamic " : "";
    snprintf(text, sizeof text, "byte %ld of %sshared memory (%zu bytes dynamic, %zu static after it)", offset, part,
             dynamic_bytes, static_bytes);
    return text;
  }
  const Buffer* nearest = nullptr;
  long distance = 0;
  for (const Buffer& buffer : buffers) {
    long away = std::max({0l, buffer.data - at, at - (buffer.data + buffer.bytes) + 1});
    if (!nearest || away < distance) nearest = &buffer, distance = away;
  }
  if (!nearest) return "no buffer";
  snprintf(text, sizeof text, "byte %ld of %s (%zu bytes)", at - nearest->data, nearest->name.c_str(), nearest->bytes);
  return text;
}

const char* verb(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic update";
}

bool ordered(uint32_t before, const Thread& me) {
  uint32_t clock = before & clock_mask;
  return clock >= first_clock && me.clock[before >> clock_bits] >= clock;
}

void report_race(const void* address, Access access, uint32_t other, const char* did, const void* where) {
  bool same_block = (other & clock_mask) >= first_clock;
  fault("race", where, "%s of %s, which thread %u%s %s with nothing that orders the two", verb(access),
        describe(address).c_str(), other >> clock_bits, same_block ? "" : " of another block", did);
}

void check_outside(uintptr_t address, size_t bytes, Access access, const void* where) {
  auto own = reinterpret_cast<uintptr_t>(machine.current->stack);
  if (address >= own && address < own + stack_bytes) return;
  if (access == Access::read && address >= image_first && address < image_last) return;
  const char* what = on_a_stack(address) ? "another thread's local memory"
                     : address < page    ? "a null pointer"
                                         : "memory that was not given to the kernel";
  fail("wild access", where, "%s of %zu bytes of %s", verb(access), bytes, what);
}

// One byte. False if something was reported, so that an access is reported once.
bool check_cell(Cell& cell, bool is_shared, const char* address, Access access, const Thread& me, uint32_t now,
                const void* where) {
  uint32_t current = is_shared ? block_serial : launch_serial;
  if ((cell.tag & serial_mask) != current) cell = {is_shared ? current : current | initialised, 0, {0, 0, 0}};
  if (cell.tag & pending) {
    cell.tag &= ~pending;
    fault("pending copy", where, "%s of %s, the destination of a cp.async not yet waited for", verb(access),
          describe(address).c_str());
    return false;
  }
  if (access != Access::write && !(cell.tag & initialised)) {
    cell.tag |= initialised;
    fault("uninitialised", where, "%s of %s, which was not written", verb(access), describe(address).c_str());
    return false;
  }
  if (cell.writer && !ordered(cell.writer, me) && !(access == Access::atomic && (cell.tag & atomically))) {
    report_race(address, access, cell.writer, "wrote", where);
    cell.writer = 0;
    return false;
  }
  if (access == Access::read) {
    uint32_t(&reader)[3] = cell.reader;
    if (reader[0] == now) return true;
    uint32_t last = reader[0];
    if (last && (last >> clock_bits) != static_cast<uint32_t>(me.number)) {
      bool same_warp = last >> (clock_bits + 5) == static_cast<uint32_t>(me.number) / warp_size;
      if (same_warp && (last & clock_mask) >= first_clock) reader[1] = last;
      else if (!reader[2] || (reader[2] & clock_mask) >= first_clock) reader[2] = last;  // another block's is kept
    }
    reader[0] = now;
    return true;
  }
  for (uint32_t& reader : cell.reader)
    if (reader && !ordered(reader, me)) {
      report_race(address, access, reader, "read", where);
      reader = 0;
      return false;
    }
  cell.writer = now;
  cell.reader[0] = cell.reader[1] = cell.reader[2] = 0;
  cell.tag = (cell.tag & ~atomically) | initialised | (access == Access::atomic ? atomically : 0);
  return true;
}

int note_image(dl_phdr_info* info, size_t, void* entry) {
  uintptr_t first = UINTPTR_MAX, last = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    first = std::min<uintptr_t>(first, info->dlpi_addr + segment.p_vaddr);
    last = std::max<uintptr_t>(last, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  auto inside = reinterpret_cast<uintptr_t>(entry);
  if (inside < first || inside >= last) return 0;
  image_first = first;
  image_last = last;
  return 1;
}

}  // namespace

void begin_launch(const void* entry) {
  create_arena();
  dl_iterate_phdr(note_image, const_cast<void*>(entry));
  launch_serial = ++serial & serial_mask;
  first_clock = 1;
  std::fill(std::begin(accesses), std::end(accesses), 0);
}

void begin_block(size_t bytes) {
  set_addressable(shared, shared_capacity, false);
  memset(shared, 0xff, shared_capacity);
  set_addressable(shared, bytes, true);
  shared_parts.assign(1, {0, bytes});
  static_offsets.clear();
  dynamic_bytes = bytes;
  static_bytes = 0;
  block_serial = ++serial & serial_mask;
  for (int t = 0; t < machine.thread_count; ++t) {
    machine.threads[t].clock = clocks[t];
    std::fill(clocks[t], clocks[t] + machine.thread_count, 0);
    clocks[t][t] = first_clock;
  }
}

void end_block() {
  size_t end = 0;
  shared_parts.emplace_back(shared_capacity, 0);
  for (auto [offset, bytes] : shared_parts) {
    if (!untouched(shared + end, shared + offset))
      fault("out of bounds", nullptr, "a block has written between byte %zu and %zu of shared memory, to neither the "
            "dynamic (%zu bytes) nor a static array", end, offset, dynamic_bytes);
    end = offset + bytes;
  }
  uint32_t latest = first_clock;
  for (int t = 0; t < machine.thread_count; ++t) latest = std::max(latest, clocks[t][t]);
  first_clock = latest + 1;
  if (first_clock > clock_mask - (1u << 16)) {
    fault("time limit", nullptr, "more barriers in one launch than the checker can number (%u)", clock_mask);
    machine.aborted = true;
  }
}

void check_guards() {
  for (const Buffer& buffer : buffers) {
    if (untouched(buffer.first, buffer.data) && untouched(buffer.data + buffer.bytes, buffer.last)) continue;
    fault("out of bounds", nullptr, "the kernel has written next to %s (%zu bytes)", buffer.name.c_str(), buffer.bytes);
  }
}

void release(Thread& thread, std::vector<uint32_t>& clock) {
  if (!machine.checking) return;
  for (int t = 0; t < machine.thread_count; ++t) clock[t] = std::max(clock[t], thread.clock[t]);
  ++thread.clock[thread.number];
}

void acquire(Thread& thread, const std::vector<uint32_t>& clock) {
  if (!machine.checking) return;
  for (int t = 0; t < machine.thread_count; ++t) thread.clock[t] = std::max(thread.clock[t], clock[t]);
}

void require_shared(const void* address, size_t bytes, const char* what, const void* where) {
  if (!in_shared(address)) fail("out of bounds", where, "%s: no address of shared memory", what);
  for (size_t i = 0; i < bytes; ++i)
    if (!addressable[static_cast<const char*>(address) - arena + i])
      fail("out of bounds", where, "%s at %s", what, describe(address).c_str());
}

void check_access(const void* address, size_t bytes, Access access, const void* where) {
  if (!machine.current) return;
  auto* at = static_cast<const char*>(address);
  auto offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(arena);
  if (offset >= arena_bytes) {
    if (machine.checking) check_outside(reinterpret_cast<uintptr_t>(at), bytes, access, where);
    return;
  }
  if (memchr(addressable + offset, 0, bytes))
    fail("out of bounds", where, "%s of %zu bytes at %s", verb(access), bytes, describe(address).c_str());
  if (!machine.checking) return;
  const Thread& me = *machine.current;
  bool is_shared = in_shared(at);
  if (!is_shared && bytes <= 16) ++accesses[bytes];
  uint32_t now = static_cast<uint32_t>(me.number) << clock_bits | me.clock[me.number];
  for (size_t i = 0; i < bytes; ++i)
    if (!check_cell(cells[offset + i], is_shared, at + i, access, me, now, where)) return;
}

}  // namespace emulator

using namespace emulator;

// --- for emulator.py

// A buffer whose address is `residue` modulo 256, so that it is aligned as the array it stands for, and at least 256 bytes
// from the begin of its pages: what is written just before it is found as such, not as a crash. Null when full.
TTR_API void* ttr_allocate(size_t bytes, size_t residue, const char* name) {
  create_arena();
  char* first = arena + arena_top + guard_bytes;
  char* data = first + 256 + residue;
  size_t pages = (256 + residue + bytes + page - 1) / page * page;
  if (pages > arena_bytes - 2 * guard_bytes || arena_top + pages > arena_bytes - 2 * guard_bytes) return nullptr;
  mprotect(first, pages, PROT_READ | PROT_WRITE);
  memset(first, 0xff, pages);
  set_addressable(data, bytes, true);
  buffers.push_back({data, bytes, name, first, first + pages});
  arena_top += guard_bytes + pages;
  return data;
}

TTR_API void ttr_free_all() {
  for (const Buffer& buffer : buffers) {
    set_addressable(buffer.data, buffer.bytes, false);
    mprotect(buffer.first, static_cast<size_t>(buffer.last - buffer.first), PROT_NONE);
  }
  buffers.clear();
  arena_top = guard_bytes + shared_capacity;
}

// How often a thread read or wrote so many bytes of global memory at once in the last launch, in checked mode.
TTR_API uint64_t ttr_accesses(size_t bytes) { return accesses[bytes]; }

// --- for kernels

TTR_API void* ttr_dyn_smem() { return shared; }

// Static arrays lie after the dynamic memory, with a gap between them, and no better aligned than their type asks for:
// a kernel that relies on more finds out here.
TTR_API void* ttr_static_smem(const void* key, size_t bytes, size_t alignment) {
  auto [entry, is_new] = static_offsets.try_emplace(key, 0);
  if (is_new) {
    auto [offset, length] = shared_parts.back();
    size_t wide = std::max<size_t>(alignment, 16);
    entry->second = (offset + length + 16 + wide - 1) / wide * wide + (alignment < 16 ? alignment : 0);
    static_bytes += bytes;
    if (static_bytes > static_limit)
      fail("out of bounds", TTR_CALLER, "%zu bytes of static shared memory, the limit is %zu", static_bytes,
           static_limit);
    if (dynamic_bytes + static_bytes > shared_limit || entry->second + bytes > shared_capacity)
      fail("out of bounds", TTR_CALLER, "%zu bytes of shared memory, the limit is %zu", dynamic_bytes + static_bytes,
           shared_limit);
    shared_parts.emplace_back(entry->second, bytes);
    set_addressable(shared + entry->second, bytes, true);
  }
  return shared + entry->second;
}

static void perform(const AsyncCopy& copy) {
  memcpy(copy.to, copy.from, static_cast<size_t>(copy.from_source));
  memset(copy.to + copy.from_source, 0, static_cast<size_t>(copy.bytes - copy.from_source));
}

// A copy takes effect at any time between here and the wait: at random, at one of the two ends.
TTR_API void ttr_cp_async(void* to, const void* from, int bytes, int from_source) {
  const void* where = TTR_CALLER;
  auto size = static_cast<size_t>(bytes);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("misaligned", where, "cp.async of %d bytes", bytes);
  if (from_source < 0 || from_source > bytes) fail("out of bounds", where, "cp.async: %d bytes of source", from_source);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % size)
    fail("misaligned", where, "cp.async of %d bytes at no multiple of that", bytes);
  require_shared(to, size, "cp.async", where);
  if (from_source) check_access(from, static_cast<size_t>(from_source), Access::read, where);
  check_access(to, size, Access::write, where);
  if (machine.checking)
    for (int i = 0; i < bytes; ++i) cells[static_cast<char*>(to) - arena + i].tag |= pending;
  Thread& me = *machine.current;
  AsyncCopy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, from_source, me.open_group, false, where};
  copy.at_issue = randomised() && (random_bits() & 1);
  if (copy.at_issue) perform(copy);
  me.copies.push_back(copy);
}

TTR_API void ttr_cp_async_commit() { ++machine.current->open_group; }

// All groups but the last `keep` are complete.
TTR_API void ttr_cp_async_wait(int keep) {
  Thread& me = *machine.current;
  auto done = [&](const AsyncCopy& copy) { return copy.group < me.open_group - keep; };
  for (const AsyncCopy& copy : me.copies) {
    if (!done(copy)) continue;
    if (!copy.at_issue) perform(copy);
    if (!machine.checking) continue;
    for (int i = 0; i < copy.bytes; ++i) {
      Cell& cell = cells[copy.to - arena + i];
      cell.tag &= ~pending;
      cell.writer = static_cast<uint32_t>(me.number) << clock_bits | me.clock[me.number];
    }
  }
  me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), done), me.copies.end());
}

TTR_API void ttr_atomic_access(void* address, int bytes, int is_float) {
  if (is_float && machine.checking)
    fault("float atomic", TTR_CALLER, "the order of additions, and so the result, differs from run to run");
  if (reinterpret_cast<uintptr_t>(address) % static_cast<size_t>(bytes))
    fail("misaligned", TTR_CALLER, "atomic update of %d bytes at no multiple of that", bytes);
  check_access(address, static_cast<size_t>(bytes), Access::atomic, TTR_CALLER);
  let_others_run();
}

// --- called by what g++ -fsanitize=thread,alignment,bounds-strict adds to a kernel

#define TTR_HOOKS(bytes)                                                                                             \
  TTR_API void __tsan_read##bytes(void* p) { check_access(p, bytes, Access::read, TTR_CALLER); }                     \
  TTR_API void __tsan_write##bytes(void* p) { check_access(p, bytes, Access::write, TTR_CALLER); }                   \
  TTR_API void __tsan_unaligned_read##bytes(void* p) { check_access(p, bytes, Access::read, TTR_CALLER); }           \
  TTR_API void __tsan_unaligned_write##bytes(void* p) { check_access(p, bytes, Access::write, TTR_CALLER); }
TTR_HOOKS(1)
TTR_HOOKS(2)
TTR_HOOKS(4)
TTR_HOOKS(8)
TTR_HOOKS(16)
TTR_API void __tsan_read_range(void* p, size_t bytes) { check_access(p, bytes, Access::read, TTR_CALLER); }
TTR_API void __tsan_write_range(void* p, size_t bytes) { check_access(p, bytes, Access::write, TTR_CALLER); }
TTR_API void __tsan_func_entry(void*) {}
TTR_API void __tsan_func_exit() {}
TTR_API void __tsan_init() {}

struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourcePlace place;
  void* type;
  uint8_t log_alignment, kind;
};
struct OutOfBounds {
  SourcePlace place;
  struct {
    uint16_t kind, info;
    char name[1];
  } * array_type, *index_type;
};

TTR_API void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  if (!machine.current) return;
  fail("misaligned", TTR_CALLER, "access at %s, which needs a multiple of %u",
       describe(reinterpret_cast<void*>(address)).c_str(), 1u << data->log_alignment);
}

// A local array, or an array within a struct, whose size is known.
TTR_API void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  if (!machine.current) return;
  fail("out of bounds", TTR_CALLER, "index %ld of an array of type %s", static_cast<long>(index),
       data->array_type->name);
}

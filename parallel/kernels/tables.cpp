// Embedding tables on the host: 64-bit keys to rows without collisions, rows with their optimizer's state, counts and
// the time each was last seen. Called from Python through ctypes (recsys/tables/native.py); one caller at a time.
//
// Keys stand in an open-addressing hash table of 16-byte slots (linear probing, at most 3/4 full, doubled when fuller;
// removal by backward shift, so that there are no tombstones). A key that is not admitted yet has a slot with its count
// so far and no row. A row is one record [values W, state S, count, last seen], so that a step touches one place of
// memory for it; records lie in an array that grows with mremap, in anonymous memory or in a file. A row that was freed
// is the next to be given out, the lowest first, so that what a table does depends only on what it holds.
//
// A *direct* table has no slots: its keys are 0, 1, ..., and lie in the rows from 2 on; rows 0 and 1 belong to the keys
// of a missing and an unseen value.
//
// Shapes: N keys of a call, W width of a row, S floats of state of a row.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <queue>
#include <vector>

namespace {

constexpr int64_t kFree = INT64_MIN + 2;  // marks an empty slot; callers never use this key
constexpr int64_t kSpecial = 2;           // keys INT64_MIN and INT64_MIN + 1: the missing and the unseen value
constexpr int32_t kUnknown = -1;
constexpr int64_t kAhead = 12;  // keys (or rows) whose memory is asked for ahead of their turn
constexpr uint64_t kLeastSlots = 64;
constexpr int64_t kLeastRows = 64;

inline uint64_t mix(uint64_t x) {  // the finaliser of SplitMix64: a bijection
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

inline double unit(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-53; }

// Memory that grows in place or by moving pages, never by copying; pages never touched cost nothing.
class Growing {
 public:
  ~Growing() {
    if (data_ != nullptr) munmap(data_, bytes_);
    if (file_ >= 0) close(file_);
  }

  bool open_file(const char* path) {
    file_ = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    return file_ >= 0;
  }

  bool reserve(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    if (bytes <= bytes_) return true;
    if (file_ >= 0 && ftruncate(file_, static_cast<off_t>(bytes)) != 0) return false;
    void* data;
    if (data_ != nullptr) {
      data = mremap(data_, bytes_, bytes, MREMAP_MAYMOVE);
    } else if (file_ >= 0) {
      data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    } else {
      data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (data == MAP_FAILED) return false;
    data_ = data;
    bytes_ = bytes;
    if (file_ < 0 && bytes >= (8u << 20)) madvise(data_, bytes_, MADV_HUGEPAGE);
    return true;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  int file_ = -1;
};

// What a call returns; recsys/tables/dynamic.py has the messages.
enum Status : int64_t {
  kDone = 0,
  kFull = -1,
  kNoMemory = -2,
  kBadRow = -3,  // a row number is taken or out of range
};

struct Slot {
  int64_t key;
  int32_t row;    // of an admitted key; of another one -1 - its count so far
  uint32_t seen;  // of a key that is not admitted; an admitted one's stands with its row
};

struct Table {
  int64_t width, states, rows = 0, most, reserved = 0, admitted = 0;
  bool direct;
  uint64_t seed;
  double std;
  float state_start;
  uint64_t slots = 0, used = 0;
  Slot* slot = nullptr;
  Growing records;
  std::priority_queue<int32_t, std::vector<int32_t>, std::greater<int32_t>> freed;

  ~Table() { release(slot, slots); }

  static Slot* allocate(uint64_t count) {
    void* memory =
        mmap(nullptr, count * sizeof(Slot), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (count * sizeof(Slot) >= (8u << 20)) madvise(memory, count * sizeof(Slot), MADV_HUGEPAGE);
    Slot* made = static_cast<Slot*>(memory);
    for (uint64_t i = 0; i < count; ++i) made[i].key = kFree;
    return made;
  }

  static void release(Slot* memory, uint64_t count) {
    if (memory != nullptr) munmap(memory, count * sizeof(Slot));
  }

  uint64_t home(int64_t key) const { return mix(static_cast<uint64_t>(key)) & (slots - 1); }

  // The key's slot, or the empty one where it would go.
  uint64_t place(int64_t key) const {
    uint64_t at = home(key);
    while (slot[at].key != key && slot[at].key != kFree) at = (at + 1) & (slots - 1);
    return at;
  }

  bool make_room(uint64_t more) {
    uint64_t wanted = std::max(slots, kLeastSlots);
    while ((used + more) * 4 > wanted * 3) wanted *= 2;
    if (wanted == slots) return true;
    Slot* before = slot;
    const uint64_t count = slots;
    Slot* made = allocate(wanted);
    if (made == nullptr) return false;
    slot = made;
    slots = wanted;
    for (uint64_t i = 0; i < count; ++i)
      if (before[i].key != kFree) slot[place(before[i].key)] = before[i];
    release(before, count);
    return true;
  }

  void remove(uint64_t at) {
    uint64_t hole = at, next = at;
    for (;;) {
      next = (next + 1) & (slots - 1);
      if (slot[next].key == kFree) break;
      const uint64_t from = home(slot[next].key);
      if (((next - from) & (slots - 1)) >= ((next - hole) & (slots - 1))) {
        slot[hole] = slot[next];
        hole = next;
      }
    }
    slot[hole].key = kFree;
    --used;
  }

  int64_t stride() const { return width + states + 2; }
  float* values(int64_t row) const { return records.as<float>() + row * stride(); }
  float* state(int64_t row) const { return values(row) + width; }
  float& count(int64_t row) const { return state(row)[states]; }
  uint32_t& seen(int64_t row) const { return reinterpret_cast<uint32_t*>(state(row))[states + 1]; }

  // Whether a sweep with these bounds frees a row that holds a key.
  bool expires(int64_t row, uint32_t oldest, double least) const { return seen(row) < oldest || count(row) < least; }

  void ask_for(int64_t row) const {
    const char* from = reinterpret_cast<const char*>(values(row));
    for (int64_t at = 0; at < stride() * 4; at += 64) __builtin_prefetch(from + at, 1);
    __builtin_prefetch(from + stride() * 4 - 1, 1);
  }

  bool reserve(int64_t count) {
    if (count <= reserved) return true;
    const int64_t wanted = std::max({count, kLeastRows, reserved + reserved / 2});
    if (!records.reserve(wanted * stride() * sizeof(float))) return false;
    reserved = wanted;
    return true;
  }

  // Start values depend on the table's seed and the key alone, not on the order in which keys come.
  void start(int64_t row, int64_t key) {
    float* value = values(row);
    const uint64_t base = mix(seed ^ mix(static_cast<uint64_t>(key)));
    for (int64_t i = 0; i < width; i += 2) {  // Box-Muller
      const double radius = std * std::sqrt(-2.0 * std::log(unit(mix(base + 2 * i))));
      const double angle = 6.283185307179586 * unit(mix(base + 2 * i + 1));
      value[i] = static_cast<float>(radius * std::cos(angle));
      if (i + 1 < width) value[i + 1] = static_cast<float>(radius * std::sin(angle));
    }
    for (int64_t i = 0; i < states; ++i) state(row)[i] = state_start;
    count(row) = 0.0f;
    seen(row) = 0;
  }

  int64_t new_row(int64_t key) {  // or kFull, kNoMemory
    if (most > 0 && admitted >= most) return kFull;
    int64_t row;
    if (!freed.empty()) {
      row = freed.top();
      freed.pop();
    } else {
      if (rows >= INT32_MAX || !reserve(rows + 1)) return kNoMemory;
      row = rows++;
    }
    ++admitted;
    start(row, key);
    return row;
  }

  // Row of a key of a direct table, and the other way round.
  int64_t direct_row(int64_t key) const {
    if (key >= 0) return key < rows - kSpecial ? key + kSpecial : kUnknown;
    return key < INT64_MIN + kSpecial ? key - INT64_MIN : kUnknown;
  }

  static int64_t direct_key(int64_t row) { return row < kSpecial ? INT64_MIN + row : row - kSpecial; }

  int64_t find(int64_t key) const {
    if (direct) {
      const int64_t row = direct_row(key);
      return row >= 0 && seen(row) != 0 ? row : kUnknown;
    }
    if (slots == 0) return kUnknown;
    const Slot& found = slot[place(key)];
    return found.key == key && found.row >= 0 ? found.row : kUnknown;
  }
};

inline void ask_ahead(const Table& table, const int64_t* keys, int64_t i, int64_t n) {
  if (i + kAhead >= n) return;
  const int64_t key = keys[i + kAhead];
  if (!table.direct) {
    if (table.slots) __builtin_prefetch(table.slot + table.home(key));
  } else if (const int64_t row = table.direct_row(key); row >= 0) {
    table.ask_for(row);
  }
}

inline void ask_row_ahead(const Table& table, const int32_t* rows, int64_t i, int64_t n) {
  if (i + kAhead < n && rows[i + kAhead] >= 0) table.ask_for(rows[i + kAhead]);
}

struct Rule {
  double rate, epsilon, beta1, beta2, correction1, correction2;
};

// Sum of squares by halves: what a graph of a device adds up in whole vectors, so that rows which stay on a device
// (recsys/tables/hot.py) move as those here do, to the bit. All rules are in float32 for the same reason.
float square_sum(const float* g, int64_t width) {
  thread_local std::vector<float> square;
  int64_t size = 1;
  while (size < width) size *= 2;
  square.assign(size, 0.0f);
  for (int64_t i = 0; i < width; ++i) square[i] = g[i] * g[i];
  for (size /= 2; size > 0; size /= 2)
    for (int64_t i = 0; i < size; ++i) square[i] += square[i + size];
  return square[0];
}

void rowwise_adagrad(float* p, float* a, const float* g, int64_t width, const Rule& rule) {
  const float rate = static_cast<float>(rule.rate), epsilon = static_cast<float>(rule.epsilon);
  a[0] += square_sum(g, width) / static_cast<float>(width);
  const float step = rate / (std::sqrt(a[0]) + epsilon);
  for (int64_t i = 0; i < width; ++i) p[i] -= step * g[i];
}

void adagrad(float* p, float* a, const float* g, int64_t width, const Rule& rule) {
  const float rate = static_cast<float>(rule.rate), epsilon = static_cast<float>(rule.epsilon);
  for (int64_t i = 0; i < width; ++i) {
    a[i] += g[i] * g[i];
    p[i] -= rate * g[i] / (std::sqrt(a[i]) + epsilon);
  }
}

void lazy_adam(float* p, float* state, const float* g, int64_t width, const Rule& rule) {
  float *m = state, *v = state + width;
  const float rate = static_cast<float>(rule.rate), epsilon = static_cast<float>(rule.epsilon);
  const float b1 = static_cast<float>(rule.beta1), b2 = static_cast<float>(rule.beta2);
  const float c1 = static_cast<float>(rule.correction1), c2 = static_cast<float>(rule.correction2);
  for (int64_t i = 0; i < width; ++i) {
    m[i] = b1 * m[i] + (1.0f - b1) * g[i];
    v[i] = b2 * v[i] + (1.0f - b2) * g[i] * g[i];
    p[i] -= rate * (m[i] / c1 / (std::sqrt(v[i] / c2) + epsilon));
  }
}

void sgd(float* p, float*, const float* g, int64_t width, const Rule& rule) {
  for (int64_t i = 0; i < width; ++i) p[i] -= static_cast<float>(rule.rate) * g[i];
}

using Update = void (*)(float*, float*, const float*, int64_t, const Rule&);
constexpr Update kUpdates[] = {sgd, rowwise_adagrad, adagrad, lazy_adam};

}  // namespace

extern "C" {

// A new table, or null. `file`: where its rows lie (null: in memory); `direct_rows`: rows of a direct table,
// 0 for one with slots; `most`: admitted keys at most, 0 for no bound.
void* table_new(int64_t width, int64_t states, int64_t direct_rows, int64_t most, uint64_t seed, double std,
                float state_start, const char* file) {
  Table* table = new Table();
  table->width = width;
  table->states = states;
  table->most = most;
  table->direct = direct_rows > 0;
  table->seed = mix(seed);
  table->std = std;
  table->state_start = state_start;
  bool good = file == nullptr || table->records.open_file(file);
  if (good && table->direct) {
    good = table->reserve(direct_rows);
    table->rows = direct_rows;
  }
  if (good) return table;
  delete table;
  return nullptr;
}

void table_free(void* handle) { delete static_cast<Table*>(handle); }

// What a table holds: rows with a key, rows there are, keys that wait for admission, bytes of memory (or files).
void table_sizes(void* handle, int64_t* sizes) {
  const Table& table = *static_cast<Table*>(handle);
  sizes[0] = table.admitted;
  sizes[1] = table.rows;
  sizes[2] = table.direct ? 0 : static_cast<int64_t>(table.used) - table.admitted;
  sizes[3] = static_cast<int64_t>(table.slots * sizeof(Slot) + table.records.bytes());
}

// Distinct keys in the order of their first appearance, which of them each key is, and how often each came.
int64_t keys_unique(const int64_t* keys, int64_t n, int64_t* distinct, int32_t* which, float* times) {
  thread_local std::vector<int32_t> heads;
  uint64_t size = 64;
  while (size < static_cast<uint64_t>(2 * n)) size *= 2;
  heads.assign(size, -1);
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t at = mix(static_cast<uint64_t>(keys[i])) & (size - 1);
    while (heads[at] >= 0 && distinct[heads[at]] != keys[i]) at = (at + 1) & (size - 1);
    if (heads[at] < 0) {
      heads[at] = count;
      distinct[count] = keys[i];
      times[count++] = 0.0f;
    }
    which[i] = heads[at];
    times[which[i]] += 1.0f;
  }
  return count;
}

// out_UW += gradients_NW of each of which_N, in their order.
void rows_add(const float* gradients, const int32_t* which, int64_t n, int64_t width, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    float* to = out + which[i] * width;
    for (int64_t j = 0; j < width; ++j) to[j] += gradients[i * width + j];
  }
}

// Rows of distinct keys, -1 where a key has none. Changes nothing.
void table_find(void* handle, const int64_t* keys, int64_t n, int32_t* rows) {
  const Table& table = *static_cast<Table*>(handle);
  for (int64_t i = 0; i < n; ++i) {
    ask_ahead(table, keys, i, n);
    rows[i] = static_cast<int32_t>(table.find(keys[i]));
  }
}

// Rows of distinct keys that a training step met `times` each at time `now`: counts them, admits those that are due.
// A key is admitted when it has been seen `least` times; where `share` < 1, moreover, by a draw of that probability at
// each step that meets it, which depends on the table's seed, the key and `now` alone. Keys below `always` (the
// missing and the unseen value) are admitted at once. Returns a `Status`.
int64_t table_meet(void* handle, const int64_t* keys, const float* times, int64_t n, uint32_t now, double least,
                   double share, int64_t always, int32_t* rows) {
  Table& table = *static_cast<Table*>(handle);
  if (!table.direct && !table.make_room(n)) return kNoMemory;
  for (int64_t i = 0; i < n; ++i) {
    ask_ahead(table, keys, i, n);
    const int64_t key = keys[i];
    int64_t row = kUnknown;
    if (table.direct) {
      row = table.direct_row(key);
      if (row >= 0) {
        if (table.seen(row) == 0) {
          table.start(row, key);
          ++table.admitted;
        }
      }
    } else {
      const uint64_t at = table.place(key);
      Slot& found = table.slot[at];
      if (found.key == key && found.row >= 0) {
        row = found.row;
      } else {
        const double before = found.key == key ? -1.0 - found.row : 0.0, count = before + times[i];
        bool admit = key < always || count >= least;
        if (admit && share < 1.0 && key >= always)
          admit = unit(mix(table.seed ^ mix(static_cast<uint64_t>(key) ^ mix(now)))) < share;
        const int64_t made = admit && (times[i] > 0.0f || key < always) ? table.new_row(key) : kUnknown;
        if (made == kNoMemory) return kNoMemory;
        if (found.key != key) {
          if (made < 0 && times[i] <= 0.0f) {
            rows[i] = kUnknown;
            continue;
          }
          found.key = key;
          ++table.used;
        }
        if (made >= 0) {
          row = made;
          found.row = static_cast<int32_t>(made);
          table.count(row) = static_cast<float>(before);
        } else {
          found.row = static_cast<int32_t>(-1.0 - std::min(count, 1e9));
          found.seen = now;
        }
      }
    }
    if (row >= 0) {
      table.count(row) += times[i];
      if (times[i] > 0.0f || table.seen(row) == 0) table.seen(row) = std::max(now, 1u);
    }
    rows[i] = static_cast<int32_t>(row);
  }
  return kDone;
}

// out_NW = values of rows; rows of -1 are left as they are. `places`: where in `out` each goes, null: one after the
// other.
void table_gather(void* handle, const int32_t* rows, const int32_t* places, int64_t n, float* out) {
  const Table& table = *static_cast<Table*>(handle);
  for (int64_t i = 0; i < n; ++i) {
    ask_row_ahead(table, rows, i, n);
    if (rows[i] >= 0) std::memcpy(out + (places ? places[i] : i) * table.width, table.values(rows[i]), table.width * 4);
  }
}

// Moves rows by their gradients (`places` as above) by one rule of `kUpdates`; rows of -1 are left out.
void table_update(void* handle, const int32_t* rows, const int32_t* places, int64_t n, const float* gradients,
                  int32_t rule, double rate, double epsilon, double beta1, double beta2, double correction1,
                  double correction2) {
  Table& table = *static_cast<Table*>(handle);
  const Rule numbers{rate, epsilon, beta1, beta2, correction1, correction2};
  for (int64_t i = 0; i < n; ++i) {
    ask_row_ahead(table, rows, i, n);
    if (rows[i] >= 0)
      kUpdates[rule](table.values(rows[i]), table.state(rows[i]), gradients + (places ? places[i] : i) * table.width,
                     table.width, numbers);
  }
}

// Removes keys last seen before `oldest` or counted less than `least`, then multiplies the counts of the rest by
// `decay`. Keys that wait for admission leave by the same `oldest`. Keys below `always` stay. Rows removed.
int64_t table_sweep(void* handle, uint32_t oldest, double least, double decay, int64_t always) {
  Table& table = *static_cast<Table*>(handle);
  int64_t removed = 0;
  if (table.direct) {
    for (int64_t row = kSpecial; row < table.rows; ++row) {
      if (table.seen(row) == 0) continue;
      if (table.expires(row, oldest, least)) {
        table.seen(row) = 0;
        --table.admitted;
        ++removed;
      } else {
        table.count(row) = static_cast<float>(table.count(row) * decay);
      }
    }
    return removed;
  }
  std::vector<int64_t> leaving;
  for (uint64_t at = 0; at < table.slots; ++at) {
    const Slot& one = table.slot[at];
    if (one.key == kFree || one.key < always) continue;
    if (one.row < 0 ? one.seen < oldest : table.expires(one.row, oldest, least)) {
      leaving.push_back(one.key);
    } else if (one.row >= 0) {
      table.count(one.row) = static_cast<float>(table.count(one.row) * decay);
    }
  }
  for (int64_t key : leaving) {
    const uint64_t at = table.place(key);
    if (table.slot[at].row >= 0) {
      table.freed.push(table.slot[at].row);
      --table.admitted;
      ++removed;
    }
    table.remove(at);
  }
  return removed;
}

// Which of n rows that hold a key a sweep with these bounds would free.
void table_expires(void* handle, const int32_t* rows, int64_t n, uint32_t oldest, double least, uint8_t* out) {
  const Table& table = *static_cast<Table*>(handle);
  for (int64_t i = 0; i < n; ++i) out[i] = table.expires(rows[i], oldest, least);
}

// The table's entries in the order of its rows, then those that wait for admission (row -1) in the order of their keys:
// first call with null arrays for their number, of entries last seen at `since` or later; the missing and the unseen
// value's are always among them, since ids without a row move the latter, which nobody saw. Values and states of the
// rows are read with `table_gather` and `table_states`.
int64_t table_entries(void* handle, uint32_t since, int64_t* keys, int32_t* rows, float* counts, uint32_t* seen) {
  const Table& table = *static_cast<Table*>(handle);
  const auto wanted = [since](int64_t key, uint32_t last) { return last >= since || key < INT64_MIN + kSpecial; };
  if (table.direct) {
    int64_t n = 0;
    for (int64_t row = 0; row < table.rows; ++row) {
      if (table.seen(row) == 0 || !wanted(Table::direct_key(row), table.seen(row))) continue;
      if (keys != nullptr) {
        keys[n] = Table::direct_key(row);
        rows[n] = static_cast<int32_t>(row);
        counts[n] = table.count(row);
        seen[n] = table.seen(row);
      }
      ++n;
    }
    return n;
  }
  int64_t n = 0;
  for (uint64_t at = 0; at < table.slots; ++at) {
    const Slot& one = table.slot[at];
    if (one.key != kFree && wanted(one.key, one.row < 0 ? one.seen : table.seen(one.row))) ++n;
  }
  if (keys == nullptr) return n;
  std::vector<int64_t> of_row(table.rows, kFree);
  std::vector<uint64_t> waiting;
  for (uint64_t at = 0; at < table.slots; ++at) {
    const Slot& one = table.slot[at];
    if (one.key == kFree) continue;
    if (one.row < 0) {
      if (one.seen >= since) waiting.push_back(at);
    } else if (wanted(one.key, table.seen(one.row))) {
      of_row[one.row] = one.key;
    }
  }
  int64_t i = 0;
  for (int64_t row = 0; row < table.rows; ++row) {
    if (of_row[row] == kFree) continue;
    keys[i] = of_row[row];
    rows[i] = static_cast<int32_t>(row);
    counts[i] = table.count(row);
    seen[i++] = table.seen(row);
  }
  std::sort(waiting.begin(), waiting.end(),
            [&](uint64_t one, uint64_t other) { return table.slot[one].key < table.slot[other].key; });
  for (uint64_t at : waiting) {
    keys[i] = table.slot[at].key;
    rows[i] = kUnknown;
    counts[i] = static_cast<float>(-1.0 - table.slot[at].row);
    seen[i++] = table.slot[at].seen;
  }
  return n;
}

void table_states(void* handle, const int32_t* rows, int64_t n, float* out) {
  const Table& table = *static_cast<Table*>(handle);
  for (int64_t i = 0; i < n; ++i)
    if (rows[i] >= 0) std::memcpy(out + i * table.states, table.state(rows[i]), table.states * 4);
}

// Gives rows their values and states; what else is known of them stays.
void table_set(void* handle, const int32_t* rows, int64_t n, const float* values, const float* states) {
  const Table& table = *static_cast<Table*>(handle);
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(table.values(rows[i]), values + i * table.width, table.width * 4);
    std::memcpy(table.state(rows[i]), states + i * table.states, table.states * 4);
  }
}

// Puts entries into a table (replacing those with the same keys): a key with a row keeps that row's number where
// `keep_rows` and takes the next free one otherwise; then call `table_close_gaps`. `states` may be null: start values.
// Returns a `Status`.
int64_t table_put(void* handle, const int64_t* keys, const int32_t* rows, const float* values, const float* states,
                  const float* counts, const uint32_t* seen, int64_t n, int32_t keep_rows) {
  Table& table = *static_cast<Table*>(handle);
  if (!table.direct && !table.make_room(n)) return kNoMemory;
  for (int64_t i = 0; i < n; ++i) {
    int64_t row = rows[i];
    if (table.direct) {
      row = table.direct_row(keys[i]);
      if (row < 0) return kBadRow;
      if (table.seen(row) == 0) ++table.admitted;
      table.start(row, keys[i]);
    } else {
      const uint64_t at = table.place(keys[i]);
      Slot& found = table.slot[at];
      const bool there = found.key == keys[i];
      if (rows[i] < 0) {
        if (there && found.row >= 0) continue;  // a row outweighs a count
        if (!there) ++table.used;
        found = Slot{keys[i], static_cast<int32_t>(-1.0 - counts[i]), seen[i]};
        continue;
      }
      if (there && found.row >= 0) {
        row = found.row;
      } else if (keep_rows) {
        if (row >= INT32_MAX || !table.reserve(row + 1)) return row >= INT32_MAX ? kBadRow : kNoMemory;
        table.rows = std::max(table.rows, row + 1);
        ++table.admitted;
        table.start(row, keys[i]);
      } else {
        row = table.new_row(keys[i]);
        if (row < 0) return row;
      }
      if (!there) ++table.used;
      found.key = keys[i];
      found.row = static_cast<int32_t>(row);
    }
    std::memcpy(table.values(row), values + i * table.width, table.width * 4);
    if (states != nullptr) std::memcpy(table.state(row), states + i * table.states, table.states * 4);
    table.count(row) = counts[i];
    table.seen(row) = std::max(seen[i], 1u);
  }
  return kDone;
}

// After `table_put` with kept rows: numbers that no key has are free. kBadRow: two keys have one row.
int64_t table_close_gaps(void* handle) {
  Table& table = *static_cast<Table*>(handle);
  table.freed = {};
  if (table.direct) return kDone;
  std::vector<bool> taken(table.rows, false);
  for (uint64_t at = 0; at < table.slots; ++at) {
    if (table.slot[at].key == kFree || table.slot[at].row < 0) continue;
    if (taken[table.slot[at].row]) return kBadRow;
    taken[table.slot[at].row] = true;
  }
  for (int64_t row = 0; row < table.rows; ++row)
    if (!taken[row]) table.freed.push(static_cast<int32_t>(row));
  return kDone;
}

}  // extern "C"

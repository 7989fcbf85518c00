// jieba's word segmentation (accurate mode with the hidden Markov model), word for word and rounding for rounding.
//
// Everything that decides a cut is done in jieba's order of operations on the same doubles: log frequencies from libm's
// log, routes from right to left, ties to the longer word, Viterbi with ties to the later letter of B, E, M, S.
// Called through ctypes by pangu/data/segmentation.py. Text comes as UTF-32, words go back as their ends, or as UTF-8
// joined.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr uint32_t kHanFirst = 0x4E00, kHanLast = 0x9FD5;
constexpr int kStates = 4;  // B, E, M, S: in the order of their letters, which settles ties
enum { B, E, M, S };
constexpr int kBefore[kStates][2] = {{E, S}, {B, M}, {B, M}, {E, S}};  // which may stand before; ascending

bool is_han(uint32_t c) { return c >= kHanFirst && c <= kHanLast; }
bool is_digit(uint32_t c) { return c >= '0' && c <= '9'; }
bool is_alphanumeric(uint32_t c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool in_block(uint32_t c) {
  return is_han(c) || is_alphanumeric(c) ||
         (c < 128 && c != 0 && std::strchr("+#&._%-", static_cast<int>(c)) != nullptr);
}

// A tree of the dictionary's words. What a text needs most lies together: a first character is looked up in a plain
// table, any other in an open-addressing one whose entries hold node (21 bits), character (21), child (21) and whether
// the child has children (1), so that most walks end without a fruitless search.
class Words {
 public:
  static constexpr size_t kMostNodes = 1 << 21;

  Words() : first_(1 << 16), slots_(1 << 20) { frequency_.push_back(0); }

  // A place in the tree: node << 1 | has children; 0 = nowhere, as no word leads back to the root.
  uint32_t begin(uint32_t c) const { return c < first_.size() ? first_[c] : 0; }
  uint32_t follow(uint32_t place, uint32_t c) const { return place & 1 ? find(place >> 1, c) : 0; }

  void add(const std::vector<uint32_t>& word, int64_t frequency) {
    uint32_t node = 0;
    for (uint32_t c : word) {
      const uint32_t next = find(node, c) >> 1;
      node = next != 0 ? next : insert(node, c);
    }
    frequency_[node] = frequency;
    total_ += frequency;
  }

  bool finish() {
    if (frequency_.size() > kMostNodes) return false;
    log_total_ = std::log(static_cast<double>(total_));
    score_.resize(frequency_.size());
    for (size_t i = 0; i < score_.size(); ++i) {
      // NaN marks what is no word, only the beginning of one.
      score_[i] = frequency_[i] > 0 ? std::log(static_cast<double>(frequency_[i])) - log_total_ : NAN;
    }
    std::vector<bool> has_children(frequency_.size());
    for (uint64_t slot : slots_) {
      if (slot != 0) has_children[slot >> 43] = true;
    }
    for (uint64_t& slot : slots_) {
      if (slot != 0 && has_children[(slot >> 1) & (kMostNodes - 1)]) slot |= 1;
    }
    for (uint32_t c = 0; c < first_.size(); ++c) first_[c] = find(0, c);
    return true;
  }

  double score(uint32_t place) const { return score_[place >> 1]; }
  double unknown_score() const { return 0.0 - log_total_; }

 private:
  static uint64_t key(uint32_t node, uint32_t c) { return static_cast<uint64_t>(node) << 21 | c; }
  size_t home(uint64_t key) const { return (key * 0x9E3779B97F4A7C15ull >> 32) & (slots_.size() - 1); }

  uint32_t find(uint32_t node, uint32_t c) const {
    const uint64_t wanted = key(node, c);
    for (size_t at = home(wanted); slots_[at] != 0; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at] >> 22 == wanted) return static_cast<uint32_t>(slots_[at] & ((1u << 22) - 1));
    }
    return 0;
  }

  uint32_t insert(uint32_t node, uint32_t c) {
    const auto fresh = static_cast<uint32_t>(frequency_.size());
    frequency_.push_back(0);
    if (frequency_.size() > kMostNodes) return fresh & (kMostNodes - 1);  // `finish` refuses it
    if (frequency_.size() * 2 > slots_.size()) {
      std::vector<uint64_t> old(slots_.size() * 2);
      old.swap(slots_);
      for (uint64_t slot : old) {
        if (slot != 0) put(slot);
      }
    }
    put(key(node, c) << 22 | static_cast<uint64_t>(fresh) << 1);
    return fresh;
  }

  void put(uint64_t slot) {
    size_t at = home(slot >> 22);
    while (slots_[at] != 0) at = (at + 1) & (slots_.size() - 1);
    slots_[at] = slot;
  }

  std::vector<uint32_t> first_;
  std::vector<uint64_t> slots_;
  std::vector<int64_t> frequency_;
  std::vector<double> score_;
  int64_t total_ = 0;
  double log_total_ = 0;
};

struct Step {
  double score;
  uint32_t end;
};

struct Jieba {
  Words words;
  double start[kStates], transition[kStates][kStates];
  std::vector<double> emission;  // [kHanLast - kHanFirst + 1, kStates]
};

// One text being cut.
class Cutter {
 public:
  Cutter(const Jieba& jieba, const uint32_t* text, uint32_t* ends) : jieba_(jieba), text_(text), ends_(ends) {}

  size_t cut(size_t length) {
    for (size_t i = 0; i < length;) {
      size_t j = i;
      while (j < length && in_block(text_[j])) ++j;
      if (j > i) {
        block(i, j);
        i = j;
      } else {
        i += text_[i] == '\r' && i + 1 < length && text_[i + 1] == '\n' ? 2 : 1;
        put(i);
      }
    }
    return count_;
  }

 private:
  void put(size_t end) { ends_[count_++] = static_cast<uint32_t>(end); }

  void block(size_t first, size_t last) {
    find_route(first, last);
    size_t single = first;  // where the run of single characters that is being gathered began
    for (size_t x = first; x < last;) {
      const size_t y = first + route_[x - first].end;
      if (y - x > 1) {
        singles(single, x);
        put(y);
        single = y;
      }
      x = y;
    }
    singles(single, last);
  }

  // From the last character back: the best score of the rest, and the end of the word to take.
  void find_route(size_t first, size_t last) {
    const Words& words = jieba_.words;
    const size_t n = last - first;
    if (route_.size() <= n) route_.resize(n + 1);
    route_[n] = {0.0, 0};
    for (size_t i = n; i-- > 0;) {
      Step best{INFINITY, 0};
      uint32_t place = words.begin(text_[first + i]);
      for (size_t j = i; place != 0;) {
        const double score = words.score(place) + route_[++j].score;
        if (score >= best.score || (best.end == 0 && score == score)) best = {score, static_cast<uint32_t>(j)};
        if (j == n) break;
        place = words.follow(place, text_[first + j]);
      }
      if (best.end == 0) best = {words.unknown_score() + route_[i + 1].score, static_cast<uint32_t>(i + 1)};
      route_[i] = best;
    }
  }

  // Characters that the route left single: one by one if together they are a word, else by the model.
  void singles(size_t first, size_t last) {
    if (last - first > 1 && !is_dictionary_word(first, last)) {
      for (size_t i = first; i < last;) {
        size_t j = i;
        while (j < last && is_han(text_[j])) ++j;
        if (j > i) {
          viterbi(i, j);
        } else {
          while (j < last && !is_han(text_[j])) ++j;
          alphanumerics(i, j);
        }
        i = j;
      }
      return;
    }
    for (size_t i = first; i < last; ++i) put(i + 1);
  }

  bool is_dictionary_word(size_t first, size_t last) const {
    uint32_t place = jieba_.words.begin(text_[first]);
    for (size_t i = first + 1; i < last && place != 0; ++i) place = jieba_.words.follow(place, text_[i]);
    return place != 0 && jieba_.words.score(place) == jieba_.words.score(place);
  }

  void viterbi(size_t first, size_t last) {
    const size_t n = last - first;
    if (from_.size() < n) from_.resize(n), path_.resize(n);
    double score[kStates], next[kStates];
    for (int y = 0; y < kStates; ++y) score[y] = jieba_.start[y] + emit(first, y);
    for (size_t t = 1; t < n; ++t) {
      for (int y = 0; y < kStates; ++y) {
        const int low = kBefore[y][0], high = kBefore[y][1];
        const double emitted = emit(first + t, y);
        const double by_low = score[low] + jieba_.transition[low][y] + emitted;
        const double by_high = score[high] + jieba_.transition[high][y] + emitted;
        next[y] = by_high >= by_low ? by_high : by_low;
        from_[t].state[y] = static_cast<uint8_t>(by_high >= by_low ? high : low);
      }
      std::memcpy(score, next, sizeof score);
    }
    int state = score[S] >= score[E] ? S : E;
    for (size_t t = n; t-- > 0;) {
      path_[t] = static_cast<uint8_t>(state);
      state = from_[t].state[state];
    }
    for (size_t t = 0; t < n; ++t) {
      if (path_[t] == E || path_[t] == S) put(first + t + 1);
    }
  }

  double emit(size_t at, int state) const { return jieba_.emission[(text_[at] - kHanFirst) * kStates + state]; }

  // Words are the matches of [a-zA-Z0-9]+(\.[0-9]+)?%? and what stands between them.
  void alphanumerics(size_t first, size_t last) {
    for (size_t i = first; i < last;) {
      const size_t gap = i;
      while (i < last && !is_alphanumeric(text_[i])) ++i;
      if (i > gap) put(i);
      if (i == last) return;
      while (i < last && is_alphanumeric(text_[i])) ++i;
      if (i + 1 < last && text_[i] == '.' && is_digit(text_[i + 1])) {
        for (i += 2; i < last && is_digit(text_[i]);) ++i;
      }
      if (i < last && text_[i] == '%') ++i;
      put(i);
    }
  }

  struct From {
    uint8_t state[kStates] = {};
  };

  const Jieba& jieba_;
  const uint32_t* text_;
  uint32_t* ends_;
  size_t count_ = 0;
  std::vector<Step> route_;
  std::vector<From> from_;
  std::vector<uint8_t> path_;
};

char* put_utf8(char* out, uint32_t c) {
  if (c >= 0xD800 && c <= 0xDFFF) c = 0xFFFD;
  if (c < 0x80) {
    *out++ = static_cast<char>(c);
  } else if (c < 0x800) {
    *out++ = static_cast<char>(0xC0 | c >> 6);
    *out++ = static_cast<char>(0x80 | (c & 63));
  } else {
    if (c < 0x10000) {
      *out++ = static_cast<char>(0xE0 | c >> 12);
    } else {
      *out++ = static_cast<char>(0xF0 | c >> 18);
      *out++ = static_cast<char>(0x80 | (c >> 12 & 63));
    }
    *out++ = static_cast<char>(0x80 | (c >> 6 & 63));
    *out++ = static_cast<char>(0x80 | (c & 63));
  }
  return out;
}

}  // namespace

extern "C" {

// words: UTF-32 characters of all words on end; lengths and frequencies: one a word, in the dictionary's order.
// Null when they are too many.
void* segment_create(const uint32_t* words, const int32_t* lengths, const int64_t* frequencies, int64_t count,
                     const double* start, const double* transition, const double* emission) {
  auto* jieba = new Jieba;
  std::vector<uint32_t> word;
  for (int64_t i = 0; i < count; ++i) {
    word.assign(words, words + lengths[i]);
    words += lengths[i];
    jieba->words.add(word, frequencies[i]);
  }
  if (!jieba->words.finish()) {
    delete jieba;
    return nullptr;
  }
  std::memcpy(jieba->start, start, sizeof jieba->start);
  std::memcpy(jieba->transition, transition, sizeof jieba->transition);
  jieba->emission.assign(emission, emission + (kHanLast - kHanFirst + 1) * kStates);
  return jieba;
}

void segment_destroy(void* jieba) { delete static_cast<Jieba*>(jieba); }

// Ends of the words, in characters; `ends` has room for one a character. Returns how many.
int64_t segment_cut(const void* jieba, const uint32_t* text, int64_t length, uint32_t* ends) {
  return static_cast<int64_t>(Cutter(*static_cast<const Jieba*>(jieba), text, ends).cut(length));
}

// The words joined by spaces as UTF-8, with spaces and newlines of the text itself as U+2582 and U+2583 and lone
// surrogates as U+FFFD; `out` has room for 5 bytes a character. Returns the number of bytes.
int64_t segment_join(const void* jieba, const uint32_t* text, int64_t length, uint32_t* ends, char* out) {
  const int64_t count = segment_cut(jieba, text, length, ends);
  char* const begin = out;
  uint32_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0) *out++ = ' ';
    for (; at < ends[i]; ++at) out = put_utf8(out, text[at] == ' ' ? 0x2582 : text[at] == '\n' ? 0x2583 : text[at]);
  }
  return out - begin;
}

}  // extern "C"

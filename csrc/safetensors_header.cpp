// The JSON of a safetensors header has a fixed shape, so this reads exactly that shape and no JSON in general: three
// levels at most, no recursion, memory in proportion to the input. One file, so that a fuzzer links it alone.
#include "safetensors_header.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <utility>

namespace trsp_fast {
namespace {

// What the safetensors package allows too: a longer header is a broken or hostile length field.
constexpr std::size_t kMaxHeaderBytes = 100'000'000;
// Offsets end up in int64 (Python buffers, off_t), so every number stays below 2^63.
constexpr std::uint64_t kMaxNumber = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxQuotedBytes = 120;

struct DType {
  std::string_view name;
  std::uint64_t bytes;
};

// The dtypes of whole bytes; F4 and F6 share bytes between elements and cannot be cut at element borders.
constexpr std::array kDTypes{
    DType{"BOOL", 1},        DType{"U8", 1},          DType{"I8", 1},      DType{"F8_E4M3", 1}, DType{"F8_E5M2", 1},
    DType{"F8_E4M3FNUZ", 1}, DType{"F8_E5M2FNUZ", 1}, DType{"F8_E8M0", 1}, DType{"U16", 2},     DType{"I16", 2},
    DType{"F16", 2},         DType{"BF16", 2},        DType{"U32", 4},     DType{"I32", 4},     DType{"F32", 4},
    DType{"U64", 8},         DType{"I64", 8},         DType{"F64", 8},     DType{"C64", 8},
};

const DType* find_dtype(std::string_view name) {
  const auto* found = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DType& d) { return d.name == name; });
  return found == kDTypes.end() ? nullptr : found;
}

bool multiply(std::uint64_t a, std::uint64_t b, std::uint64_t& product) {
  if (b != 0 && a > kMaxNumber / b) return false;
  product = a * b;
  return true;
}

// Text from the file, fit for a message: valid UTF-8 in, printable valid UTF-8 of bounded length out.
std::string quoted(std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool starts_character = (byte & 0xC0) != 0x80;
    if (starts_character && result.size() > kMaxQuotedBytes) {
      result += "...";
      break;
    }
    if (byte < 0x20 || byte == 0x7F) {
      result += "\\u00";
      result += kHex[byte >> 4];
      result += kHex[byte & 0xF];
    } else {
      result += c;
    }
  }
  return result + "\"";
}

std::string listed(const std::vector<std::uint64_t>& numbers) {
  std::string result = "[";
  for (const std::uint64_t n : numbers) {
    if (result.size() > kMaxQuotedBytes) return result + ", ...]";
    if (result.size() > 1) result += ", ";
    result += std::to_string(n);
  }
  return result + "]";
}

[[noreturn]] void reject_tensor(std::string_view name, const std::string& problem) {
  throw HeaderError("safetensors header: tensor " + quoted(name) + ": " + problem);
}

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  SafetensorsHeader read() {
    if (text_.size() > kMaxHeaderBytes) {
      fail("is " + std::to_string(text_.size()) + " bytes long, more than the " + std::to_string(kMaxHeaderBytes) +
           " the format allows");
    }
    // The format forbids leading white space, so that a file can be told by its ninth byte.
    if (peek() != '{') fail("must start with '{'");
    SafetensorsHeader header;
    bool has_metadata = false;
    read_object([&](std::string key) {
      if (key != "__metadata__") {
        header.tensors.push_back(read_tensor(std::move(key)));
        return;
      }
      if (std::exchange(has_metadata, true)) fail("__metadata__ appears twice");
      header.metadata = read_metadata();
    });
    skip_space();
    if (position_ != text_.size()) fail("has text after its closing '}'");
    return header;
  }

 private:
  [[noreturn]] void fail(const std::string& problem) const {
    std::string message = "safetensors header: ";
    if (tensor_) message += "tensor " + quoted(*tensor_) + ": ";
    if (!field_.empty()) message += std::string(field_) + ": ";
    throw HeaderError(message + problem + " (at byte " + std::to_string(position_) + ")");
  }

  // -1 at the end: no character of the text is negative here.
  int peek() const { return position_ < text_.size() ? static_cast<unsigned char>(text_[position_]) : -1; }

  void skip_space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++position_;
  }

  bool take(char wanted) {
    skip_space();
    if (peek() != wanted) return false;
    ++position_;
    return true;
  }

  void expect(char wanted) {
    if (!take(wanted)) fail(std::string("expected '") + wanted + "'");
  }

  // Calls on_value(key) with the reader before each value.
  template <typename OnValue>
  void read_object(OnValue on_value) {
    expect('{');
    if (take('}')) return;
    do {
      std::string key = read_string();
      expect(':');
      on_value(std::move(key));
    } while (take(','));
    expect('}');
  }

  std::map<std::string, std::string> read_metadata() {
    field_ = "__metadata__";
    std::map<std::string, std::string> metadata;
    read_object([&](std::string key) {
      std::string value = read_string();
      if (!metadata.try_emplace(key, std::move(value)).second) fail("key " + quoted(key) + " appears twice");
    });
    field_ = {};
    return metadata;
  }

  TensorEntry read_tensor(std::string name) {
    TensorEntry entry;
    entry.name = std::move(name);
    std::optional<std::string> dtype;
    std::optional<std::vector<std::uint64_t>> shape, offsets;
    tensor_ = entry.name;
    read_object([&](const std::string& field) {
      if (field == "dtype") {
        set_once(dtype, "dtype", [&] { return read_string(); });
      } else if (field == "shape") {
        set_once(shape, "shape", [&] { return read_numbers(); });
      } else if (field == "data_offsets") {
        set_once(offsets, "data_offsets", [&] { return read_numbers(); });
      } else {
        fail("field " + quoted(field) + " is none of dtype, shape, data_offsets");
      }
    });
    if (!dtype) fail("field dtype is missing");
    if (!shape) fail("field shape is missing");
    if (!offsets) fail("field data_offsets is missing");
    tensor_.reset();
    fill(entry, *dtype, std::move(*shape), *offsets);
    return entry;
  }

  template <typename T, typename Read>
  void set_once(std::optional<T>& value, std::string_view field, Read read) {
    field_ = field;
    if (value) fail("appears twice");
    value = read();
    field_ = {};
  }

  static void fill(TensorEntry& entry, const std::string& dtype_name, std::vector<std::uint64_t> shape,
                   const std::vector<std::uint64_t>& offsets) {
    const DType* dtype = find_dtype(dtype_name);
    if (dtype == nullptr) {
      reject_tensor(entry.name, "dtype: " + quoted(dtype_name) + " is not a known dtype of whole bytes");
    }
    if (offsets.size() != 2) {
      reject_tensor(entry.name, "data_offsets: has " + std::to_string(offsets.size()) + " numbers, not 2");
    }
    const auto [begin, end] = std::pair(offsets[0], offsets[1]);
    if (begin > end) reject_tensor(entry.name, "data_offsets: " + listed(offsets) + " end before they begin");

    std::uint64_t bytes = dtype->bytes;
    for (const std::uint64_t size : shape) {
      if (!multiply(bytes, size, bytes)) {
        reject_tensor(entry.name, "shape: " + listed(shape) + " takes 2^63 bytes or more");
      }
    }
    if (end - begin != bytes) {
      reject_tensor(entry.name, "data_offsets: " + listed(offsets) + " hold " + std::to_string(end - begin) +
                                    " bytes, but " + dtype_name + " of shape " + listed(shape) + " takes " +
                                    std::to_string(bytes));
    }
    entry.dtype = dtype->name;
    entry.shape = std::move(shape);
    entry.begin = begin;
    entry.end = end;
  }

  std::vector<std::uint64_t> read_numbers() {
    std::vector<std::uint64_t> numbers;
    expect('[');
    if (take(']')) return numbers;
    do {
      numbers.push_back(read_number());
    } while (take(','));
    expect(']');
    return numbers;
  }

  static bool is_digit(int c) { return c >= '0' && c <= '9'; }

  std::uint64_t read_number() {
    skip_space();
    if (!is_digit(peek())) fail("expected a non-negative integer");
    const bool leading_zero = peek() == '0';
    const std::size_t start = position_;
    std::uint64_t number = 0;
    for (; is_digit(peek()); ++position_) {
      const auto digit = static_cast<std::uint64_t>(peek() - '0');
      if (number > (kMaxNumber - digit) / 10) fail("a number is 2^63 or more");
      number = number * 10 + digit;
    }
    if (leading_zero && position_ - start > 1) fail("a number has a leading zero");
    if (peek() == '.' || peek() == 'e' || peek() == 'E') fail("a number is not an integer");
    return number;
  }

  std::string read_string() {
    skip_space();
    if (peek() != '"') fail("expected a string");
    ++position_;
    std::string result;
    while (true) {
      const int c = peek();
      if (c == -1) fail("a string has no end");
      if (c < 0x20) fail("a string holds an unescaped control character");
      if (c == '\\') {
        ++position_;
        read_escape(result);
      } else if (c >= 0x80) {
        copy_utf8(result);
      } else {
        ++position_;
        if (c == '"') return result;
        result += static_cast<char>(c);
      }
    }
  }

  void read_escape(std::string& result) {
    constexpr std::string_view kEscapes = "\"\\/bfnrt";
    constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const int c = peek();
    if (c == 'u') {
      ++position_;
      append_utf8(result, read_escaped_code_point());
      return;
    }
    const std::size_t which = c == -1 ? std::string_view::npos : kEscapes.find(static_cast<char>(c));
    if (which == std::string_view::npos) fail("a string holds an unknown escape");
    ++position_;
    result += kMeanings[which];
  }

  std::uint32_t read_hex4() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++position_) {
      const int c = peek();
      const int lower = c | 0x20;
      if (is_digit(c)) {
        value = value * 16 + static_cast<std::uint32_t>(c - '0');
      } else if (c != -1 && lower >= 'a' && lower <= 'f') {
        value = value * 16 + static_cast<std::uint32_t>(lower - 'a' + 10);
      } else {
        fail("a \\u escape needs four hexadecimal digits");
      }
    }
    return value;
  }

  // After "\u". A character beyond U+FFFF is written as two escapes, a high surrogate and a low one.
  std::uint32_t read_escaped_code_point() {
    const std::uint32_t high = read_hex4();
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || text_.substr(position_, 2) != "\\u") fail("a string holds half a surrogate pair");
    position_ += 2;
    const std::uint32_t low = read_hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("a string holds half a surrogate pair");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  static void append_utf8(std::string& result, std::uint32_t code_point) {
    if (code_point < 0x80) {
      result += static_cast<char>(code_point);
      return;
    }
    const int following = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
    constexpr std::array<std::uint32_t, 4> kLead{0, 0xC0, 0xE0, 0xF0};
    result += static_cast<char>(kLead[following] | (code_point >> (6 * following)));
    for (int i = following - 1; i >= 0; --i) result += static_cast<char>(0x80 | ((code_point >> (6 * i)) & 0x3F));
  }

  // One character of two to four bytes, refused if cut short, overlong, a surrogate or beyond U+10FFFF.
  void copy_utf8(std::string& result) {
    const int lead = peek();
    const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    constexpr std::array<std::uint32_t, 5> kSmallest{0, 0, 0x80, 0x800, 0x10000};
    std::uint32_t code_point = static_cast<std::uint32_t>(lead) & (0x7Fu >> length);
    bool valid = lead >= 0xC2 && lead <= 0xF4 && position_ + length <= text_.size();
    for (std::size_t i = 1; valid && i < length; ++i) {
      const auto byte = static_cast<unsigned char>(text_[position_ + i]);
      valid = (byte & 0xC0) == 0x80;
      code_point = (code_point << 6) | (byte & 0x3Fu);
    }
    const bool surrogate = code_point >= 0xD800 && code_point <= 0xDFFF;
    if (!valid || code_point < kSmallest[length] || code_point > 0x10FFFF || surrogate) {
      fail("a string is not valid UTF-8");
    }
    result += text_.substr(position_, length);
    position_ += length;
  }

  std::string_view text_;
  std::size_t position_ = 0;
  // What is being read, for messages.
  std::optional<std::string_view> tensor_;
  std::string_view field_;
};

void require_unique_names(const std::vector<TensorEntry>& tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const TensorEntry& tensor : tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) reject_tensor(*twice, "appears twice");
}

// `tensors` in offset order must tile [0, data_bytes).
void require_exact_cover(const std::vector<TensorEntry>& tensors, std::uint64_t data_bytes) {
  std::uint64_t covered = 0;
  for (const TensorEntry& tensor : tensors) {
    const auto reject = [&](const std::string& problem) {
      reject_tensor(tensor.name, "data_offsets: " + listed({tensor.begin, tensor.end}) + " " + problem);
    };
    if (tensor.end > data_bytes) reject("reach past the " + std::to_string(data_bytes) + " bytes of data");
    if (tensor.begin < covered) reject("overlap the tensor before, which ends at " + std::to_string(covered));
    if (tensor.begin > covered) reject("leave a hole after byte " + std::to_string(covered));
    covered = tensor.end;
  }
  if (covered != data_bytes) {
    throw HeaderError("safetensors header: the tensors cover " + std::to_string(covered) + " of the " +
                      std::to_string(data_bytes) + " bytes of data");
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view header, std::uint64_t data_bytes) {
  SafetensorsHeader result = Reader(header).read();
  require_unique_names(result.tensors);
  std::stable_sort(result.tensors.begin(), result.tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  require_exact_cover(result.tensors, data_bytes);
  return result;
}

}  // namespace trsp_fast

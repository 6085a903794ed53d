// Strict reader of a safetensors header from an untrusted file; needs the standard library only.
//
// A file is 8 bytes of little-endian header length, the header (a JSON object), then the tensor data. Whatever this
// accepts is safe to slice: the tensors cover the data exactly, once, without holes.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace trsp_fast {

// One sentence that names the tensor and the field at fault; always printable UTF-8 of bounded length.
class HeaderError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct TensorEntry {
  std::string name;
  std::string_view dtype;  // as spelled in the file, for example "BF16"; points to static storage
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  // bytes from the start of the data, end exclusive
  std::uint64_t end = 0;
};

struct SafetensorsHeader {
  std::map<std::string, std::string> metadata;
  std::vector<TensorEntry> tensors;  // in the order of their data; equal offsets (empty tensors) keep the file's order
};

// `header` is the JSON text without its 8-byte length, `data_bytes` the number of bytes that follow it in the file.
// Throws HeaderError for everything the format does not allow, and std::bad_alloc; nothing else.
SafetensorsHeader parse_safetensors_header(std::string_view header, std::uint64_t data_bytes);

}  // namespace trsp_fast

#include "removal_plan.h"

#include <algorithm>
#include <string_view>

namespace trsp_fast {
namespace {

void append_quoted(std::string& to, std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  to += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      to += '\\';
      to += c;
    } else if (byte < 0x20) {
      to += "\\u00";
      to += kHex[byte >> 4];
      to += kHex[byte & 0xF];
    } else {
      to += c;
    }
  }
  to += '"';
}

// Neighbours in the data of one file; `begin` counts from the start of the file.
struct Run {
  std::uint64_t begin = 0, bytes = 0;
  std::vector<const TensorEntry*> tensors;
};

std::vector<Run> runs_of(const PlanSource& source) {
  std::vector<Run> runs;
  for (const TensorEntry& tensor : source.kept) {
    const std::uint64_t begin = source.data_begin + tensor.begin;
    const bool follows = !runs.empty() && runs.back().begin + runs.back().bytes == begin;
    // An empty tensor has no bytes to be next to others: it goes with the run before it.
    if (!follows && (runs.empty() || tensor.end > tensor.begin)) runs.push_back({begin, 0, {}});
    runs.back().bytes += tensor.end - tensor.begin;
    runs.back().tensors.push_back(&tensor);
  }
  return runs;
}

std::string json(const PlanSource& source, const std::vector<Run>& runs) {
  std::string text = "{";
  if (!source.metadata.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : source.metadata) {
      if (text.back() != '{') text += ',';
      append_quoted(text, key);
      text += ':';
      append_quoted(text, value);
    }
    text += '}';
  }
  std::uint64_t offset = 0;
  for (const Run& run : runs) {
    for (const TensorEntry* tensor : run.tensors) {
      if (text.size() > 1) text += ',';
      append_quoted(text, tensor->name);
      text += ":{\"dtype\":\"" + std::string(tensor->dtype) + "\",\"shape\":[";
      for (std::size_t i = 0; i < tensor->shape.size(); ++i)
        text += (i ? "," : "") + std::to_string(tensor->shape[i]);
      text += "],\"data_offsets\":[" + std::to_string(offset) + ',';
      offset += tensor->end - tensor->begin;
      text += std::to_string(offset) + "]}";
    }
  }
  return text + '}';
}

// Length, JSON and spaces, as long as `phase` modulo `block`.
std::string head(const std::string& text, std::uint64_t phase, std::uint64_t block) {
  const std::uint64_t least = 8 + text.size();
  const std::uint64_t padding = (phase % block + block - least % block) % block;
  const std::uint64_t length = text.size() + padding;
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(length >> 8 * i & 0xFF);
  return bytes + text + std::string(padding, ' ');
}

// The whole blocks of a run, and the pieces of blocks at its two ends.
void append_ranges(std::vector<PlanRange>& ranges, std::uint64_t from, std::uint64_t to, std::uint64_t bytes,
                   std::uint64_t block) {
  const auto append = [&](std::uint64_t length, bool shared) {
    if (length) ranges.push_back({from, to, length, shared});
    from += length;
    to += length;
    bytes -= length;
  };
  if (!block || from % block != to % block) return append(bytes, false);
  append(std::min(bytes, (block - from % block) % block), false);
  append(bytes / block * block, true);
  append(bytes, false);
}

PlanTarget target_of(std::size_t number, const PlanSource& source, const std::vector<Run>& runs, std::uint64_t block) {
  PlanTarget target;
  target.source = number;
  target.head = block ? head(json(source, runs), runs.front().begin, block) : head(json(source, runs), 0, kHeadAlignment);
  target.bytes = target.head.size();
  for (const Run& run : runs) {
    append_ranges(target.ranges, run.begin, target.bytes, run.bytes, block);
    target.bytes += run.bytes;
    for (const TensorEntry* tensor : run.tensors) target.tensors.push_back(tensor->name);
  }
  return target;
}

}  // namespace

std::vector<PlanTarget> plan_removal(const std::vector<PlanSource>& sources, std::uint64_t block) {
  std::vector<PlanTarget> targets;
  for (std::size_t number = 0; number < sources.size(); ++number) {
    std::vector<Run> together;  // of one target
    std::uint64_t bytes = 0;
    for (Run& run : runs_of(sources[number])) {
      // A run without a whole block has nothing to share wherever it lies: it never needs a file of its own.
      const bool shareable = block && run.bytes >= (block - run.begin % block) % block + block;
      if (shareable && !together.empty() && (together.front().begin + bytes) % block != run.begin % block) {
        targets.push_back(target_of(number, sources[number], together, block));
        together.clear();
        bytes = 0;
      }
      bytes += run.bytes;
      together.push_back(std::move(run));
    }
    if (!together.empty()) targets.push_back(target_of(number, sources[number], together, block));
  }
  return targets;
}

}  // namespace trsp_fast

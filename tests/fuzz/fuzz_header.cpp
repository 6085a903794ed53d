// Mutates safetensors headers and gives them to the parser and the planner: fuzz_header CORPUS RUNS [SEED].
//
// A program of its own, without Python or torch, so that the sanitizers see nothing but the code under test. A file of
// the corpus is the number of data bytes in a line, then the header.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/removal_plan.h"
#include "../../csrc/safetensors_header.h"

namespace {

using namespace trsp_fast;
using Random = std::mt19937_64;

struct Input {
  std::uint64_t data_bytes = 0;
  std::string header;
};

[[noreturn]] void fail(const std::string& what, const Input& input) {
  std::cerr << "fuzz_header: " << what << "\n" << input.data_bytes << "\n" << input.header << "\n";
  std::abort();
}

std::vector<Input> read_corpus(const char* folder) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<Input> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    Input input;
    file >> input.data_bytes;
    file.get();
    input.header.assign(std::istreambuf_iterator<char>(file), {});
    if (!input.header.empty() && input.header.back() == '\n') input.header.pop_back();
    corpus.push_back(std::move(input));
  }
  return corpus;
}

std::size_t below(Random& random, std::size_t limit) { return limit ? random() % limit : 0; }

const std::vector<std::string> kTokens{
    "{", "}", "[", "]", ",", ":", "\"", "\\", "null", "true", "-1", "0", "1", "1.5", "1e9", "00", "01", " ", "\n", "\t",
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "4294967296",
    "\"dtype\"", "\"shape\"", "\"data_offsets\"", "\"__metadata__\"", "\"F32\"", "\"BF16\"", "\"F4\"", "\"\"", "\\u0000",
    "\\ud800", "\\udc00", "\\ud83d\\ude00", "\\u12", "\xff", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x00",
    ",\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}",
};

void mutate(Input& input, const std::vector<Input>& corpus, Random& random) {
  std::string& text = input.header;
  const std::size_t at = below(random, text.size() + 1), length = below(random, 24);
  switch (below(random, 9)) {
    case 0:  // another byte
      if (at < text.size()) text[at] = static_cast<char>(random());
      break;
    case 1:  // another bit
      if (at < text.size()) text[at] = static_cast<char>(text[at] ^ 1 << below(random, 8));
      break;
    case 2: text.insert(at, kTokens[below(random, kTokens.size())]); break;
    case 3: text.erase(at, length); break;
    case 4: text.insert(at, text.substr(below(random, text.size() + 1), length)); break;
    case 5: text.resize(at); break;
    case 6: {  // another number in the place of one
      const std::size_t digit = text.find_first_of("0123456789", at);
      if (digit == std::string::npos) break;
      const std::size_t end = std::min(text.find_first_not_of("0123456789", digit), text.size());
      text.replace(digit, end - digit, std::to_string(random() >> below(random, 64)));
      break;
    }
    case 7: {  // the rest of another header
      const Input& other = corpus[below(random, corpus.size())];
      text = text.substr(0, at) + other.header.substr(below(random, other.header.size() + 1));
      break;
    }
    case 8: input.data_bytes = random() >> below(random, 64); break;
  }
}

void check_plan(const Input& input, const SafetensorsHeader& parsed, Random& random) {
  PlanSource source{8 + input.header.size(), parsed.metadata, {}};
  std::uint64_t kept = 0;
  for (const TensorEntry& tensor : parsed.tensors) {
    if (below(random, 2)) continue;
    source.kept.push_back(tensor);
    kept += tensor.end - tensor.begin;
  }
  const std::uint64_t block = below(random, 2) ? 4096 : 0;
  std::uint64_t planned = 0;
  std::size_t names = 0;
  for (const PlanTarget& target : plan_removal({source}, block)) {
    std::uint64_t end = target.head.size();
    for (const PlanRange& range : target.ranges) {
      if (range.to != end) fail("a hole in the plan", input);
      if (range.shared && (!block || range.from % block || range.to % block || range.bytes % block))
        fail("a shared range that is not whole blocks", input);
      end += range.bytes;
      planned += range.bytes;
    }
    if (end != target.bytes) fail("a target of another size", input);
    names += target.tensors.size();
    const SafetensorsHeader again =
        parse_safetensors_header(std::string_view(target.head).substr(8), target.bytes - target.head.size());
    if (again.tensors.size() != target.tensors.size()) fail("a head that reads differently", input);
  }
  if (planned != kept || names != source.kept.size()) fail("a plan that loses tensors", input);
}

// True where the header was accepted.
bool run(const Input& input, Random& random) {
  SafetensorsHeader parsed;
  try {
    parsed = parse_safetensors_header(input.header, input.data_bytes);
  } catch (const HeaderError& error) {
    const std::string what = error.what();
    if (what.empty() || what.size() > 1000 || what.find('\n') != std::string::npos) fail("a bad message", input);
    return false;
  }
  std::uint64_t end = 0;
  for (const TensorEntry& tensor : parsed.tensors) {
    if (tensor.begin != end || tensor.end < tensor.begin) fail("accepted tensors with a hole or an overlap", input);
    end = tensor.end;
  }
  if (end != input.data_bytes) fail("accepted tensors that do not cover the data", input);
  check_plan(input, parsed, random);
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: fuzz_header CORPUS RUNS [SEED]\n";
    return 2;
  }
  const std::vector<Input> corpus = read_corpus(arguments[1]);
  Random random(count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 0);
  std::size_t intact = 0, accepted = 0;
  for (const Input& input : corpus) intact += run(input, random);
  const long runs = std::strtol(arguments[2], nullptr, 10);
  for (long i = 0; i < runs; ++i) {
    Input input = corpus[below(random, corpus.size())];
    for (std::size_t j = below(random, 6) + 1; j > 0; --j) mutate(input, corpus, random);
    accepted += run(input, random);
  }
  // Both must happen, or the mutations are too wild or too tame to find anything.
  std::cout << "fuzz_header: " << corpus.size() << " headers, " << intact << " of them valid; " << runs << " mutations, "
            << accepted << " accepted\n";
  return intact == 0 || (runs >= 1000 && (accepted == 0 || accepted == static_cast<std::size_t>(runs)));
}

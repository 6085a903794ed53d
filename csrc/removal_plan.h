// Which bytes of a checkpoint go where when layers leave it. Pure: no file is touched, so it is tested by itself.
//
// Neighbouring tensors that stay form a run. File systems share extents by whole blocks, so a run can be shared when its
// offsets in source and target agree modulo the block size; a run with whole blocks that does not agree with the target
// so far starts a target file of its own, whose header is padded until it does.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "safetensors_header.h"

namespace trsp_fast {

// One safetensors file of the checkpoint.
struct PlanSource {
  std::uint64_t data_begin = 0;  // offset of its tensor data in the file
  std::map<std::string, std::string> metadata;
  std::vector<TensorEntry> kept;  // in the order of their data, under the names they will have
};

struct PlanRange {
  std::uint64_t from = 0, to = 0, bytes = 0;  // offsets in the source and in the target file
  bool shared = false;                        // whole blocks, congruent: fit to be shared
};

// One safetensors file of the result; it draws on one source.
struct PlanTarget {
  std::size_t source = 0;
  std::string head;  // everything before the tensor data: length, JSON, padding
  std::uint64_t bytes = 0;
  std::vector<std::string> tensors;
  std::vector<PlanRange> ranges;  // ascending, without gaps: they and the head are the whole file
};

// block is the file system's block size, or 0 where nothing can be shared: then every source keeps one target, its data
// at a multiple of kHeadAlignment. Sources of which nothing stays have no target.
std::vector<PlanTarget> plan_removal(const std::vector<PlanSource>& sources, std::uint64_t block);

// Weights are mapped from the file, and some CPU kernels give other last bits at other alignments.
constexpr std::uint64_t kHeadAlignment = 4096;

}  // namespace trsp_fast

// Python bindings of the torch-free part. No torch type may pass here: torch bundles another pybind11 than PyPI's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <chrono>
#include <future>
#include <system_error>

#include "move_ranges.h"
#include "removal_plan.h"
#include "safetensors_header.h"

namespace py = pybind11;

namespace {

using namespace trsp_fast;

py::tuple to_tuple(const TensorEntry& tensor) {
  py::tuple shape(tensor.shape.size());
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) shape[i] = py::int_(tensor.shape[i]);
  return py::make_tuple(py::str(tensor.name), py::str(tensor.dtype.data(), tensor.dtype.size()), shape, tensor.begin,
                        tensor.end);
}

py::tuple parse_header(const py::bytes& header, std::uint64_t data_bytes) {
  // HeaderError is a std::invalid_argument, which pybind11 raises as ValueError.
  const SafetensorsHeader parsed = parse_safetensors_header(std::string_view(header), data_bytes);
  py::dict metadata;
  for (const auto& [key, value] : parsed.metadata) metadata[py::str(key)] = py::str(value);
  py::list tensors(parsed.tensors.size());
  for (std::size_t i = 0; i < parsed.tensors.size(); ++i) tensors[i] = to_tuple(parsed.tensors[i]);
  return py::make_tuple(metadata, tensors);
}

py::list plan(const std::vector<std::pair<py::bytes, std::uint64_t>>& files,
              const std::map<std::string, std::string>& names, std::uint64_t block) {
  std::vector<PlanSource> sources;
  for (const auto& [header, data_bytes] : files) {
    SafetensorsHeader parsed = parse_safetensors_header(std::string_view(header), data_bytes);
    PlanSource source{8 + std::string_view(header).size(), std::move(parsed.metadata), {}};
    for (TensorEntry& tensor : parsed.tensors) {
      const auto kept = names.find(tensor.name);
      if (kept == names.end()) continue;
      tensor.name = kept->second;
      source.kept.push_back(std::move(tensor));
    }
    sources.push_back(std::move(source));
  }
  py::list targets;
  for (const PlanTarget& target : plan_removal(sources, block)) {
    py::list ranges;
    for (const PlanRange& range : target.ranges)
      ranges.append(py::make_tuple(range.from, range.to, range.bytes, range.shared));
    targets.append(py::make_tuple(target.source, py::bytes(target.head), target.bytes, target.tensors, ranges));
  }
  return targets;
}

using MoveTuple = std::tuple<int, int, std::uint64_t, std::uint64_t, std::uint64_t, bool>;

// The work runs without the GIL while this thread comes back for it ten times a second: for the progress and Ctrl-C.
py::tuple run_moves(const std::vector<MoveTuple>& tuples, unsigned threads, const py::object& on_progress,
                    bool in_kernel) {
  std::vector<Move> moves;
  for (const auto& [from, to, from_offset, to_offset, bytes, share] : tuples)
    moves.push_back({from, to, from_offset, to_offset, bytes, share});
  MoveProgress progress;
  auto running = std::async(std::launch::async, [&] { move_ranges(moves, threads, in_kernel, progress); });
  const auto wait = [&](auto duration) {
    const py::gil_scoped_release release;
    return running.wait_for(duration) == std::future_status::ready;
  };
  const auto finish = [&] {
    const py::gil_scoped_release release;
    running.wait();
  };
  try {
    for (bool done = false; !done;) {
      done = wait(std::chrono::milliseconds(100));
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!on_progress.is_none()) on_progress(progress.shared.load(), progress.copied.load());
    }
  } catch (...) {
    progress.cancelled = true;
    finish();
    throw;
  }
  try {
    running.get();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return py::make_tuple(progress.shared.load(), progress.copied.load());
}

}  // namespace

PYBIND11_MODULE(_surgery, module) {
  module.doc() = "Layer surgery on safetensors files, without torch.";
  module.def("parse_header", &parse_header, py::arg("header"), py::arg("data_bytes"),
             "Parse and check a safetensors header (without its 8-byte length) that data_bytes of data follow.\n\n"
             "Returns the metadata dict and a list of (name, dtype, shape, begin, end) in data order; bytes.\n"
             "Raises ValueError with one sentence that names the tensor and the field.");
  module.def("plan", &plan, py::arg("files"), py::arg("names"), py::arg("block"),
             "Plan the files of a checkpoint that keeps the tensors `names` maps to their new names.\n\n"
             "files: (header, data_bytes) of each source. block: the file system's block size, 0 where nothing can be\n"
             "shared. Returns a list of (source, head, bytes, tensors, ranges) per target file, ranges being\n"
             "(from, to, bytes, shared) with offsets in the two files. Raises ValueError like parse_header.");
  module.def("move_ranges", &run_moves, py::arg("moves"), py::arg("threads"), py::arg("on_progress") = py::none(),
             py::arg("in_kernel") = false,
             "Share or copy ranges (from_fd, to_fd, from_offset, to_offset, bytes, share) between open files.\n\n"
             "on_progress(shared, copied) is called with bytes ten times a second. Returns the two at the end.\n"
             "in_kernel: copy by copy_file_range, as a file server can by itself.\n"
             "Raises OSError for what the system refuses, RuntimeError for a source that ends early.");
  module.def("can_share", &can_share, py::arg("from_fd"), py::arg("to_fd"), py::arg("block"),
             "Whether the two files' systems share extents; tried with their first block.");
}

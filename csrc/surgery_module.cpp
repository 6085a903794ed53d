// Python bindings of the torch-free part. No torch type may pass here: torch bundles another pybind11 than PyPI's.
#include <pybind11/pybind11.h>

#include "safetensors_header.h"

namespace py = pybind11;

namespace {

py::tuple to_tuple(const trsp_fast::TensorEntry& tensor) {
  py::tuple shape(tensor.shape.size());
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) shape[i] = py::int_(tensor.shape[i]);
  return py::make_tuple(py::str(tensor.name), py::str(tensor.dtype.data(), tensor.dtype.size()), shape, tensor.begin,
                        tensor.end);
}

py::tuple parse_header(const py::bytes& header, std::uint64_t data_bytes) {
  // HeaderError is a std::invalid_argument, which pybind11 raises as ValueError.
  const trsp_fast::SafetensorsHeader parsed = trsp_fast::parse_safetensors_header(std::string_view(header), data_bytes);
  py::dict metadata;
  for (const auto& [key, value] : parsed.metadata) metadata[py::str(key)] = py::str(value);
  py::list tensors(parsed.tensors.size());
  for (std::size_t i = 0; i < parsed.tensors.size(); ++i) tensors[i] = to_tuple(parsed.tensors[i]);
  return py::make_tuple(metadata, tensors);
}

}  // namespace

PYBIND11_MODULE(_surgery, module) {
  module.doc() = "Layer surgery on safetensors files, without torch.";
  module.def("parse_header", &parse_header, py::arg("header"), py::arg("data_bytes"),
             "Parse and check a safetensors header (without its 8-byte length) that data_bytes of data follow.\n\n"
             "Returns the metadata dict and a list of (name, dtype, shape, begin, end) in data order; bytes.\n"
             "Raises ValueError with one sentence that names the tensor and the field.");
}

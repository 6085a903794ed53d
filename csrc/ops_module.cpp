// Makes trsp_fast._C importable. Loading the library is what registers the CPU kernels with PyTorch's dispatcher (the
// TORCH_LIBRARY_IMPL blocks of the other files); the module itself is empty.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels of trsp_fast, reached through torch.ops.trsp_fast.", 0,
      nullptr,               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

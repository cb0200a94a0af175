// The Python module of the CUDA extension. It has nothing of its own: importing it loads the ops of csrc/cuda into
// torch.
#include <Python.h>

namespace {

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C_cuda",
                      "CUDA implementation of the vdu_fast ops.",
                      -1,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }

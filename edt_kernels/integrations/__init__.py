"""The ops inside other libraries' models. Each module here needs its library; `edt_kernels` itself needs none."""

"""How long a call of an op keeps the CPU: `python -m benchmarks host [--quick] [--results FOLDER]`.

A small model at a small batch waits for its host: what a GPU computes in 5 µs should not take 50 µs to ask for.
All of a call runs, checks, torch's dispatcher, autograd, Triton's own launcher, but NVIDIA's driver, for which
a stub stands in that does nothing (host_stub.c, made by the C compiler that Triton needs anyway); tensors are
on the CPU. A real launch adds about 2 µs for each kernel, and CUDA's allocator is slower than the CPU's. Times
are CPU time of one thread, the least of many samples; `torch.add` of one number tells machines apart.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

# Microseconds of a call without and with gradients, and forward and backward together: what is aimed at.
_OPS = ("amm_attention", "adaln", "gated_residual", "gated_residual_adaln", "token_merge_adaln",
        "token_split_concat_adaln")  # fmt: skip


def use_stub_driver() -> None:
    """Makes Triton launch through the stub, for this process. Before anything is launched."""
    folder = Path(tempfile.mkdtemp(prefix="edt-kernels-stub-"))
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library,
               Path(__file__).with_name("host_stub.c")]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"host needs a C compiler, which Triton needs too; there is no {compiler}") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{compiler} could not compile host_stub.c: {error.stderr[-500:]}") from None
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["EDT_KERNELS_BACKEND"] = "triton"

    import ctypes

    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from edt_kernels import _backend

    class StubDriver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(StubDriver())
    _backend._INTERPRETED = True  # kernels take CPU tensors


def time_call(function, calls: int = 10, samples: int = 150) -> float:
    """Microseconds of CPU time, of the sample that is slower than a fifth of all."""
    for _ in range(20):
        function()
    times = []
    for _ in range(samples):
        start = time.thread_time_ns()
        for _ in range(calls):
            function()
        times.append((time.thread_time_ns() - start) / calls / 1000)
    return min(times)

"""Time and memory of a call, on a GPU or a CPU, and the ceilings of the device, measured with the same clock."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20 % and 80 % quantiles."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Budget:
    """How long one thing is timed, in milliseconds, after `warmup`; on a CPU, and at least so many rounds."""

    warmup: int = 50
    repeat: int = 300
    rounds: int = 12


QUICK = Budget(warmup=10, repeat=80, rounds=7)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes read plus bytes written each second by a copy of a large array, operations
    each second of a large matrix product."""

    copy_bytes_per_second: float
    operations_per_second: float
    matrix_dtype: str

    def floor_ms(self, num_bytes: int, operations: int) -> float:
        """The least time, were either all that there is to do."""
        return 1e3 * max(num_bytes / self.copy_bytes_per_second, operations / self.operations_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, budget: Budget) -> Ceilings:
    """A copy of 1 GiB and a product of 8192³ on a GPU, of 128 MiB and 1024³ on a CPU; the faster quantile."""
    on_gpu = device.type == "cuda"
    source = torch.ones((2**30 if on_gpu else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    if on_gpu:
        timings = {name: time_events([call], budget) for name, call in calls.items()}
    else:
        timings = time_in_turn(calls, budget)
    return Ceilings(
        2 * source.numel() * source.element_size() / timings["copy"].p20 * 1e3,
        2 * size**3 / timings["product"].p20 * 1e3,
        str(dtype).removeprefix("torch."),
    )


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def time_events(calls: list[Call], budget: Budget) -> Timing:
    """Between CUDA events around each call, the L2 cache overwritten before it. `calls` are the same call on
    different inputs, taken in turn. Where the host takes longer than the device, this is the host's time."""
    from triton.testing import do_bench

    turn = itertools.cycle(calls)
    times = do_bench(lambda: next(turn)(), warmup=budget.warmup, rep=budget.repeat, quantiles=list(QUANTILES))
    return Timing(*times)


def time_graph(calls: list[Call], budget: Budget) -> Timing:
    """Of one call, in replays of a CUDA graph of all of them: the device's time alone. `calls` are the same call
    on different inputs, together larger than the L2 cache, so that none finds its own there.

    Raises:
        RuntimeError: for what cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    timing = time_events([graph.replay], budget)
    return Timing(*(value / len(calls) for value in (timing.median, timing.p20, timing.p80)))


def time_in_turn(calls: dict[str, Call], budget: Budget) -> dict[str, Timing]:
    """On a CPU: rounds of one call of each, the order reversed each round, so that a busy machine slows all alike;
    two rounds are not counted. Ratios hold, the times themselves are only as good as the machine is quiet.
    """
    seconds = {name: [] for name in calls}
    start = time.perf_counter()
    for i in itertools.count(-2):
        for name in reversed(calls) if i % 2 else calls:
            before = time.perf_counter()
            calls[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - before)
        if i == -1:
            start = time.perf_counter()
        elif i + 1 >= budget.rounds and (time.perf_counter() - start) * 1e3 > budget.repeat * len(calls):
            break
    return {name: _quantiles([1e3 * value for value in values]) for name, values in seconds.items()}


def _quantiles(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[-1])


def peak_bytes(call: Call) -> int:
    """The most GPU memory that a call takes beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def first_call_seconds(call: Call, device: torch.device) -> float:
    """With what is compiled in it."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

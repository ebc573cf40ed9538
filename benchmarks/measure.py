"""Time and memory of a call, on a GPU or a CPU, and the ceilings of the device, measured with the same clock."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

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


# Sides of square products, the fastest of which counts. The largest is not: a CPU's caches are full, a GPU hot.
_SQUARES = {"cuda": (4096, 8192), "cpu": (256, 512, 1024)}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes read plus bytes written each second by a copy of a large array, operations
    each second of matrix products."""

    copy_bytes_per_second: float
    operations_per_second: float
    matrix_dtype: str

    def floor_ms(self, num_bytes: int, operations: int) -> float:
        """The least time, were either all that there is to do."""
        return 1e3 * max(num_bytes / self.copy_bytes_per_second, operations / self.operations_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, budget: Budget) -> Ceilings:
    """A copy of 1 GiB on a GPU, of 128 MiB on a CPU, and square products."""
    source = torch.ones((2**30 if device.type == "cuda" else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        2 * source.nbytes / _fast_ms(lambda: target.copy_(source), device, budget) * 1e3,
        product_rate([(size, size, size) for size in _SQUARES[device.type]], device, dtype, budget),
        str(dtype).removeprefix("torch."),
    )


def product_rate(
    sizes: Iterable[tuple[int, int, int]], device: torch.device, dtype: torch.dtype, budget: Budget
) -> float:
    """Operations each second of the fastest of these products, (rows, channels in, channels out) of a Linear."""
    rates = []
    for rows, channels_in, channels_out in sizes:
        x = torch.randn(rows, channels_in, device=device, dtype=dtype)
        weight = torch.randn(channels_out, channels_in, device=device, dtype=dtype)
        ms = _fast_ms(functools.partial(F.linear, x, weight), device, budget)
        rates.append(2 * rows * channels_in * channels_out / ms * 1e3)
    return max(rates)


def _fast_ms(call: Call, device: torch.device, budget: Budget) -> float:
    """The faster quantile. On a CPU the fastest call: what else the machine does slows most of them, and a ceiling
    of a busy moment would be below what a case reaches in a quiet one."""
    if device.type == "cuda":
        return time_events([call], budget).p20
    times = []
    while len(times) < budget.rounds or 1e3 * sum(times) < budget.warmup + budget.repeat:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


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

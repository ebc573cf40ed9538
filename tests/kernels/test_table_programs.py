"""How much each program of `backward_tables` has to do: its own Python, run without compiler and data."""

import contextlib
import heapq
from unittest import mock

import pytest
import torch
import triton

from benchmarks import static
from benchmarks.shapes import ATTENTION_256, AttentionShape
from edt_kernels.amm_attention import autograd, table_kernels

MULTIPROCESSORS = 132  # of an H100; one program has the registers of one
FIRST_STAGES = [shape for shape in ATTENTION_256 if shape.grid == (16, 16)]
NOTHING = torch.zeros(1, 1, dtype=torch.int64)  # in place of every tile


class Language:
    """triton.language with numbers for scalars; the loops inside that over distances have their lengths multiplied
    instead of being gone through, and `work` is the product."""

    int64, float32, constexpr = torch.int64, torch.float32, triton.language.constexpr

    def __init__(self):
        self.program, self.work, self._lengths = 0, 0, []

    def __getattr__(self, name):  # what makes or takes tiles
        return lambda *_, **__: NOTHING

    def program_id(self, _axis):
        return torch.tensor([[self.program]])

    def range(self, *bounds, **_):
        numbers = range(*map(int, bounds))
        if len(self._lengths) == 2:
            self.work += self._lengths[1] * len(numbers)
            return
        for number in numbers[: None if not self._lengths else 1]:
            self._lengths.append(len(numbers))
            yield number
            self._lengths.pop()

    arange = staticmethod(lambda start, _end: torch.tensor([start]))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    minimum = staticmethod(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    maximum = staticmethod(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)))
    abs = staticmethod(abs)
    cast = staticmethod(lambda number, _type: number)


def launch_of_tables(shape, batch_size: int) -> tuple[dict, int]:
    """The arguments of the launch that sums a bias's gradient on an H100, and how many programs it starts."""
    found = []

    @contextlib.contextmanager
    def record(launches, op, target):
        def run(kernel, *args, grid, warmup, **kwargs):
            launches.append(static.describe(op, kernel, args, kwargs))
            if kernel is table_kernels.backward_tables:
                found.append((dict(zip(kernel.arg_names, args)) | kwargs, grid[0]))

        unit = mock.patch.object(static.attention, "matrix_unit", return_value="wgmma")
        with unit, mock.patch.object(triton.JITFunction, "run", run), static.planning_anew():
            yield

    with mock.patch.object(static, "record_launches", record):
        static.attention_launches(shape.grid, shape.heads, shape.head_dim, torch.bfloat16, "sm_90", (batch_size,))
    return next(launch for launch in found if launch[0]["bias"] is not None and launch[0]["modulation"] is None)


def work_of_programs(arguments: dict, programs: int) -> list[int]:
    """For each, how many pairs of tiles it takes, times how many groups of batch items of each."""
    kernel, language, found = table_kernels.backward_tables, Language(), []
    given = {name: arguments[name] for name in kernel.arg_names}
    given = {name: NOTHING if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    patches = {"tl": language, "range": language.range, "rounded_to_half": lambda _: NOTHING}
    with mock.patch.multiple(table_kernels, create=True, **patches):
        for language.program in range(programs):
            language.work = 0
            kernel.fn(**(given | {"q": mock.Mock()}))
            found.append(language.work)
    return found


def checked_work(shape, batch_size: int) -> list[int]:
    """Of all programs; each pair of tiles is one's."""
    arguments, programs = launch_of_tables(shape, batch_size)
    work = work_of_programs(arguments, programs)
    tiles = -(-arguments["H"] // arguments["ROWS"]) * -(-arguments["W"] // arguments["COLUMNS"])
    assert sum(work) == tiles**2 * shape.heads * -(-batch_size // arguments["ITEMS"])
    return work


@pytest.mark.parametrize("batch_size", [64, 128, 256, 512])
@pytest.mark.parametrize("shape", FIRST_STAGES, ids=str)
def test_programs_end_together(shape, batch_size):
    work = checked_work(shape, batch_size)
    assert len(set(work)) <= 2, set(work)  # two where the batch is not shared out evenly
    free_at = [0] * MULTIPROCESSORS  # a program starts where one ends first
    for taken in work:
        heapq.heapreplace(free_at, free_at[0] + taken)
    assert max(free_at) <= 1.06 * sum(work) / MULTIPROCESSORS, (len(work), set(work))


def test_a_share_of_the_batch_that_is_left_over_is_the_last():
    work = checked_work(FIRST_STAGES[0], 96)  # 19 shares of 5 items, and 1 item
    full, left = max(work), min(work)
    assert (full, left) == (5 * left, left)
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize(("side", "heads", "batch_size"), [(32, 8, 8), (16, 6, 512)])
def test_partial_sums_are_two_a_program_at_most(side, heads, batch_size):
    """Which bounds their memory: see test_gpu_memory_has_no_score_matrix."""
    arguments, programs = launch_of_tables(AttentionShape("", (side, side), heads, 52), batch_size)
    block = arguments["ITEMS"] * arguments["ROWS"] * arguments["COLUMNS"]
    assert 0 < arguments["bias_partials"].numel() <= 2 * programs * block**2
    assert programs <= autograd._TABLE_PROGRAMS  # of these, whose tiles divide it well

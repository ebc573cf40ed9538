"""Measures which tiles are right and fast on a GPU, into a table that `benchmarks.tiles.use` puts into use.

What an op asks for when it runs at a shape is what is measured: each of its passes, at its key. A candidate is
compiled; held, output and all gradients, to the error budget of `benchmarks.budget` against float64; and only
then timed. What is not right never gets into a table. Ctrl-C keeps what was measured, and the same
command goes on from there.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from triton.runtime.jit import JITFunction

import edt_kernels
from edt.model.presets import PRESETS
from edt_kernels import _backend, _launch, _tiles
from edt_kernels._tiles import CellTile, RowLoop, RowTile, ScoreTile, Tile, Tiles
from edt_kernels.amm_attention import autograd as attention

from . import tiles as tables
from .budget import error_and_budget, is_lost
from .results import OUTPUTS, commit, device_slug

_TABLES = ("rel_pos_bias", "modulation")  # inputs without a batch dimension
_SLICES = {"token_merge_adaln": 4, "token_split_concat_adaln": 2}


@dataclass(frozen=True)
class Shape:
    """An op at a shape, in the dtypes of autocast: norms take a float32 residual stream, all else is `dtype`.

    `grid` and `channels` are the residual stream's (of `token_split_concat_adaln` the skip's); for `amm_attention`
    the channels of all heads together. It has a bias and, with `modulation`, a learned modulation.
    """

    op: str
    grid: tuple[int, int]
    channels: int
    batch_size: int = 64
    heads: int = 1
    modulation: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        heads = (
            f" {self.heads}×{self.channels // self.heads}" if self.op == "amm_attention" else f" C{self.channels}"
        )
        return f"B{self.batch_size} {self.grid[0]}×{self.grid[1]}{heads}{' AMM' if self.modulation else ''}"


def tune(
    device: torch.device,
    shapes: Sequence[Shape],
    path: Path,
    timer: Callable[[list[Callable]], float],
    *,
    quick: bool = False,
    margin: float = 0.02,
    deadline: float = math.inf,
) -> None:
    """argmin over tiles of the time of each op's passes at each shape, among tiles with the right results.

    Writes the table after each measurement, by an atomic replacement.

    Args:
        device: the current one.
        shapes: what to measure, the most important first.
        path: the table. What it has already is not measured again.
        timer: calls that do the same on different data → microseconds of one.
        quick: only candidates that differ from the static choice in one number.
        margin: how much faster than the static choice, as a share of its time, another tile has to be.
        deadline: of `time.monotonic`, after which no further measurement is begun.

    Raises:
        RuntimeError: if a candidate crashed the GPU. It is recorded in the table: another run goes on without it.
        ValueError: for a path that cannot be written, or a table of another device, torch, Triton or version of
            the kernels; before anything is measured.
    """
    table = _open_table(path, device)
    found = tables.parse_entries(table["entries"])
    with tqdm(total=2 * len(shapes), desc="tuning", unit="pass") as bar:
        for shape in shapes:
            trial = _Trial(shape, device)
            for question, heuristic in trial.questions.items():
                if time.monotonic() > deadline:
                    return
                if question not in found:
                    bar.set_description(f"{question[0]} {shape}")
                    save = functools.partial(_write_table, path, table)
                    search = _Search(trial, question, heuristic, found, table["faults"], timer, margin, save)
                    entry = search.run(quick)
                    if entry:
                        table["entries"].append(entry)
                        save()
                        found |= tables.parse_entries([entry])
                bar.update()


class _Trial:
    """An op at a shape: its inputs, what dispatch asks for there, and the right results."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        torch.manual_seed(0)
        self.inputs = _make_inputs(shape, device)
        self.questions = _Questions()
        with_table = [name for name in _TABLES if shape.op == "amm_attention" and name in self.inputs]
        # A table may be frozen: other kernels, or the same without a gradient, run then.
        self.frozen = [names for n in (2, 1, 0) for names in itertools.combinations(with_table, n)]
        with _record_launches(), _use(self.questions):  # outputs of the right shape, even if nothing runs
            with torch.no_grad():
                outputs = _call(edt_kernels, shape, self.inputs)
            self.upstream = [torch.randn_like(out) for out in outputs]
            self.results()
        if not self.questions:
            raise ValueError("EDT_KERNELS_BACKEND is 'reference', which has no kernels to tune; unset it")

    def results(self, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
        return _differentiate(edt_kernels, self.shape, self.inputs, self.upstream, frozen=frozen)

    @functools.cached_property
    def exact_and_eager(self) -> tuple[dict[str, Tensor], ...]:
        return tuple(_reference(self.shape, self.inputs, self.upstream, dtype) for dtype in (torch.float64, None))

    def fault(self) -> str | None:
        """What is wrong with the results of the tiles in use."""
        exact, eager = self.exact_and_eager
        for frozen in self.frozen:
            with _poisoned_memory():  # what no program writes would else be what the last candidate left there
                results = self.results(frozen)
            for name, result in results.items():
                error, budget = error_and_budget(result, exact[name], eager[name])
                if not error <= budget:
                    return f"{name}: error {error:.3e}, budget {budget:.3e}"
        again = self.results(frozen)
        different = [name for name, result in results.items() if not torch.equal(again[name], result)]
        return f"{different[0]} differs from run to run" if different else None

    @functools.cached_property
    def calls(self) -> dict[str, list[Callable]]:
        """Of each pass, a call for each of several sets of inputs, which together exceed the L2 cache twice."""
        calls = {name: [call] for name, call in self._record_calls(self.inputs).items()}
        on_gpu = self.device.type == "cuda"
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if on_gpu else 0
        size = min(sum(t.nbytes for t in call.args if isinstance(t, Tensor)) for (call,) in calls.values())
        for _ in range(min(2 * cache // size, 63)):
            for name, call in self._record_calls(_make_inputs(self.shape, self.device)).items():
                calls[name].append(call)
        return calls

    def _record_calls(self, inputs: dict[str, Tensor]) -> dict[str, functools.partial]:
        with _RecordOps() as record, torch.autograd.set_multithreading_enabled(False):  # the mode is this thread's
            _differentiate(edt_kernels, self.shape, inputs, self.upstream)
        return record.calls


class _Questions(dict):
    """A table that has nothing, and remembers what it was asked for and what dispatch did without."""

    def get(self, question, heuristic):
        self[question] = heuristic
        return heuristic


class _RecordOps(TorchDispatchMode):
    """The calls of the registered ops, by pass."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, functools.partial] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "edt_kernels":
            op, backward, _ = func.name().partition("::")[2].partition("_backward")
            self.calls[f"{op}.{'backward' if backward else 'forward'}"] = functools.partial(func, *args)
        return func(*args, **(kwargs or {}))


class _Search:
    """The search for the fastest right tiles of a pass at a shape."""

    def __init__(self, trial, question, heuristic, found: dict, faults: list[dict], timer, margin: float, save):
        """`found` are the tiles of other passes, in use meanwhile."""
        self.trial, self.question, self.heuristic, self.found = trial, question, heuristic, found
        self.pass_name, self.key = question[0], dict(question[1:])
        self.faults, self.timer, self.margin, self.save = faults, timer, margin, save
        self.known_faults = len(faults)
        self.microseconds: dict[tuple, float] = {}  # of all that was tried; infinite where it was rejected
        self.rejected = Counter()  # by reason
        for fault in faults:
            if (fault["pass"], fault["key"]) == (self.pass_name, self.key):
                self._reject(tables.parse_tiles(self.pass_name, fault["tiles"]), "known fault")

    def run(self, quick: bool) -> dict | None:
        """The table's entry; None where nothing works."""
        unit = "fma" if self.key["dtype"] == "float32" else attention.matrix_unit(self.trial.device)
        ways = candidates(self.pass_name, self.key, self.heuristic, unit, quick)
        self._compile([start | {kernel: tile} for start, options in ways for kernel in options
                       for tile in options[kernel]])  # fmt: skip
        best = min((self._descend(*way) for way in ways), key=self._time)
        if self._time(best) == math.inf:
            del self.faults[self.known_faults :]  # what is wrong is more likely the other pass
            self.save()
            tqdm.write(
                f"NOTHING WORKS: {self.pass_name} {self.trial.shape}: {dict(self.rejected)}", file=sys.stderr
            )
            return None
        # Once more, in turns: the fastest of many is partly the luckiest.
        times = [[self._clock(tiles) for tiles in (self.heuristic, best)] for _ in range(3)]
        static, fastest = (statistics.median(column) for column in zip(*times))
        if not fastest < static * (1 - self.margin):
            best, fastest = self.heuristic, static
        return {
            "pass": self.pass_name,
            "key": self.key,
            "tiles": _to_json(best),
            "microseconds": round(fastest, 2),
            "static_tiles": _to_json(self.heuristic),
            "static_microseconds": round(static, 2) if static < math.inf else None,
            "shape": str(self.trial.shape),
            "candidates": len(self.microseconds),
            "rejected": dict(self.rejected),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }

    def _descend(self, start: Tiles, options: dict[str, Sequence[Tile]]) -> Tiles:
        """One kernel after the other, since each is launched by itself."""
        for kernel, tiles in options.items():
            tiles = tqdm(tiles, desc=kernel, leave=False, disable=None)
            fastest = min((start | {kernel: tile} for tile in tiles), key=self._time)
            if self._time(fastest) < self._time(start) * (1 - self.margin):
                start = fastest
        return start

    def _time(self, tiles: Tiles) -> float:
        """Microseconds of a candidate, which is checked and timed only once; infinite if it is not right."""
        name = _name(tiles)
        if name not in self.microseconds:
            try:
                with self._use(tiles):
                    fault = self.trial.fault()
                if fault:
                    self._record_fault(tiles, fault)
                else:
                    self.microseconds[name] = self._clock(tiles)
            except Exception as error:  # of many types: out of shared memory, of registers, a compiler's own
                if is_lost(self.trial.device):
                    self._record_fault(tiles, "crashed the device")
                    raise RuntimeError(
                        f"{self.pass_name} {self.trial.shape}: {_to_json(tiles)} crashed the device ({error}); "
                        "it is recorded, and another run goes on without it"
                    ) from error
                self._reject(tiles, type(error).__name__)
        return self.microseconds[name]

    def _clock(self, tiles: Tiles) -> float:
        if self.microseconds.get(_name(tiles)) == math.inf:
            return math.inf
        with self._use(tiles):
            calls = self.trial.calls[self.pass_name]
            with torch.no_grad():
                return self.timer(calls)

    def _use(self, tiles: Tiles):
        return _use({**self.found, self.question: tiles})

    def _compile(self, candidates: list[Tiles]) -> None:
        """In parallel: it takes far longer than all else. What does not compile is rejected."""
        launches, codes = {}, {}
        for tiles in candidates:
            with _record_launches() as recorded, self._use(tiles):
                for frozen in self.trial.frozen if recorded is not None else ():
                    self.trial.results(frozen)
            codes[_name(tiles)] = {_code(*launch): launch for launch in recorded or ()}
            launches |= codes[_name(tiles)]
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            jobs = {code: pool.submit(_warm_up, self.trial.device, *launch) for code, launch in launches.items()}
            bar = tqdm(jobs.items(), desc="compiling", leave=False, disable=None if jobs else True)
            errors = {code: job.exception() for code, job in bar}
        finally:
            pool.shutdown(cancel_futures=True)
        for tiles in candidates:
            failed = [type(errors[code]).__name__ for code in codes[_name(tiles)] if errors[code]]
            if failed:
                self._reject(tiles, failed[0])

    def _reject(self, tiles: Tiles, reason: str) -> None:
        name = _name(tiles)
        if name not in self.microseconds:
            self.microseconds[name] = math.inf
            self.rejected[reason] += 1

    def _record_fault(self, tiles: Tiles, reason: str) -> None:
        self._reject(tiles, "wrong")
        fault = {"pass": self.pass_name, "key": self.key, "tiles": _to_json(tiles), "reason": reason}
        self.faults.append(fault)
        self.save()
        tqdm.write(f"WRONG: {self.pass_name} {self.trial.shape} {_to_json(tiles)}: {reason}", file=sys.stderr)


def candidates(
    pass_name: str, key: dict, heuristic: Tiles, unit: str, quick: bool = False
) -> list[tuple[Tiles, dict[str, Sequence[Tile]]]]:
    """The ways to compute a pass, dispatch's own first: where to start from, and each kernel's tiles to try.

    `unit` is that of `amm_attention.autograd.matrix_unit`, "fma" for float32.
    """
    ways = []
    for way in sorted(tables.PASSES[pass_name], key=lambda way: way.keys() != heuristic.keys()):
        options = {kernel: _tiles_of(pass_name, kernel, key, unit) for kernel in way}
        start = dict(heuristic)
        if way.keys() != heuristic.keys():
            tokens = key["height"] * key["width"] + key["extra_tokens"]
            static = attention.tiles_of(unit, tokens, key["head_dim"])
            if not all(options.values()) or (quick and not way.keys() <= static.keys()):
                continue
            start = {
                kernel: static[kernel] if static.get(kernel) in tiles else tiles[0]
                for kernel, tiles in options.items()
            }
        for kernel, tiles in options.items():
            near = [tile for tile in tiles if sum(map(int.__ne__, astuple(tile), astuple(start[kernel]))) <= 1]
            options[kernel] = list(dict.fromkeys([start[kernel], *(near if quick else tiles)]))
        ways.append((start, options))
    return ways


def _tiles_of(pass_name: str, kernel: str, key: dict, unit: str) -> Sequence[Tile]:
    """What may be valid, and is not known to be wasteful or wrong."""
    op = pass_name.partition(".")[0]
    if op != "amm_attention":
        row_elements = _SLICES.get(op, 1) * triton.next_power_of_2(key["channels"])
        tiles = [
            RowTile(rows, num_warps)
            for rows, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
            if rows <= triton.next_power_of_2(key["rows"]) and 4 <= rows * row_elements // (32 * num_warps) <= 64
        ]
        if kernel == "forward":
            return tiles
        return [RowLoop(tile.rows, tile.num_warps, n) for tile in tiles for n in (132, 264, 528, 1056)]

    if kernel == "backward_tables":  # its scores feed no other product
        return [CellTile(*sizes) for sizes in itertools.product((16, 32, 64), (4, 8), (1, 2))]
    tokens = key["height"] * key["width"] + key["extra_tokens"]
    if kernel == "resident_forward" and (unit != "wgmma" or not 64 < tokens <= 256 or not key["many_heads"]):
        return []
    if kernel in ("resident_backward", "short_backward"):  # registers hold no other tile
        heads = 1000 if key["many_heads"] else 1
        chosen = attention.choose_backward(unit, tokens, key["head_dim"], heads, key["modulation"])
        return [attention.tiles_of(unit, tokens, key["head_dim"])[kernel]] if chosen == kernel else []
    limit = max(triton.next_power_of_2(tokens), 64)
    sizes = (16, 32, 64) if unit == "fma" else (16, 32, 64, 128)
    tiles = []
    for block_m, block_n, num_warps, num_stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3)):
        if max(block_m, block_n) > limit:
            continue
        if kernel == "resident_forward" and block_n != attention.padded(key["head_dim"]):
            continue
        # Triton gives each warp 16 rows of scores that feed another product; see `amm_attention.autograd._TILES`.
        rows = block_n if kernel == "backward_kv" else block_m
        enough = 16 * num_warps <= rows
        if unit == "wgmma" and rows == 64:
            enough = num_warps == 8
        if enough or unit == "fma":
            tiles.append(ScoreTile(block_m, block_n, num_warps, num_stages))
    return tiles


def graph_microseconds(calls: list[Callable]) -> float:
    """Median over replays of a CUDA graph of the calls, each at least once and 20 or more in all."""
    calls = calls * math.ceil(20 / len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []  # milliseconds of a replay; the first warms up
    while len(times) < 6 or (sum(times) < 30 and len(times) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times[1:]) / len(calls)


def _make_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    (H, W), B, C = shape.grid, shape.batch_size, shape.channels

    def randn(*size, dtype=shape.dtype):
        return torch.randn(size, dtype=dtype, device=device)

    stream = functools.partial(randn, dtype=torch.float32)
    if shape.op == "amm_attention":
        inputs = {"qkv": randn(B, H * W, 3, shape.heads, C // shape.heads)}
        inputs["rel_pos_bias"] = stream((2 * H - 1) * (2 * W - 1), shape.heads)
        return inputs | ({"modulation": stream(2 * H - 1, 2 * W - 1).abs() + 0.3} if shape.modulation else {})
    if shape.op == "token_split_concat_adaln":
        inputs = {"x": randn(B, H * W // 4, 4 * C), "skip": stream(B, H * W, C)}
    elif shape.op.startswith("gated"):
        inputs = {"x": stream(B, H * W, C), "y": randn(B, H * W, C)}
    else:
        inputs = {"x": stream(B, H * W, C)}
    return inputs | {"projection": randn(B, 3 * C * _SLICES.get(shape.op, 1)) / 2}  # the gate, shift and scale


def _call(
    namespace, shape: Shape, inputs: dict[str, Tensor], out_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The outputs of an op; `out_dtype` in place of the shape's."""
    op, (H, W) = getattr(namespace, shape.op), shape.grid
    if shape.op == "amm_attention":
        given = {name: inputs[name] for name in _TABLES if name in inputs}
        return [op(*inputs["qkv"].unbind(2), grid=(H, W), **given)]
    tokens = [inputs[name] for name in ("x", "skip", "y") if name in inputs]
    gate, *shift_and_scale = inputs["projection"].chunk(3, dim=-1)
    options = {"out_dtype": out_dtype or shape.dtype}
    if shape.op == "gated_residual":
        return [op(*tokens, gate)]
    if shape.op == "gated_residual_adaln":
        return list(op(*tokens, gate, *shift_and_scale, **options))
    if shape.op == "token_merge_adaln":
        options |= {"grid": (H, W)}
    elif shape.op == "token_split_concat_adaln":
        options = {"grid": (H // 2, W // 2)}
    return [op(*tokens, *shift_and_scale, **options)]


def _differentiate(
    namespace,
    shape: Shape,
    inputs: dict[str, Tensor],
    upstream: list[Tensor],
    dtype=None,
    frozen: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Outputs, and gradients of all inputs that are not frozen; all in `dtype`, if one is given."""
    leaves = {
        name: t.detach().to(dtype or t.dtype).requires_grad_(name not in frozen) for name, t in inputs.items()
    }
    outputs = _call(namespace, shape, leaves, dtype)
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstream = [gradient.to(out.dtype) for gradient, out in zip(upstream, outputs, strict=True)]
    gradients = dict(zip(learned, torch.autograd.grad(outputs, list(learned.values()), upstream)))
    if "qkv" in gradients:  # judged apart: each has its own scale
        gradients |= dict(zip("qkv", gradients.pop("qkv").unbind(2)))
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return results | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def _reference(shape: Shape, inputs, upstream, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Plain torch's results, of few enough samples at a time for its matrices of all scores (a GiB in float64)."""
    tokens = math.prod(shape.grid)
    step = max(2**27 // (shape.heads * tokens**2), 1) if shape.op == "amm_attention" else shape.batch_size
    parts = []
    for first in range(0, shape.batch_size, step):
        share = slice(first, first + step)
        some = {name: t if name in _TABLES else t[share] for name, t in inputs.items()}
        parts.append(_differentiate(edt_kernels.reference, shape, some, [t[share] for t in upstream], dtype))
    summed = [f"gradient of {name}" for name in _TABLES]
    return {  # pyright: ignore[reportReturnType] - a sum begins with 0
        name: sum(part[name] for part in parts) if name in summed else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }


def _compiles() -> bool:
    return not _backend._INTERPRETED


@contextlib.contextmanager
def _use(measured: dict):
    """Launches take these tiles, whatever else was measured."""
    with mock.patch.object(_tiles, "measured", measured):
        _launch.forget_plans()
        yield
    _launch.forget_plans()


@contextlib.contextmanager
def _record_launches():
    """Launches are recorded, as `_warm_up` takes them, instead of run. Yields None in the interpreter, which has
    nothing to compile, and does run them."""
    if not _compiles():
        yield None
        return
    launches: list[tuple] = []

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs):
        # Types in place of tensors, which would stay in memory.
        launches.append((kernel, [arg.dtype if isinstance(arg, Tensor) else arg for arg in args], kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _code(kernel: JITFunction, args: list, kwargs: dict) -> str:
    """The same for launches that compile to the same code."""
    kinds = [(arg == 1, arg % 16 == 0, arg < 2**31) if type(arg) is int else type(arg) for arg in args]
    kinds = [arg if isinstance(arg, torch.dtype) else kind for arg, kind in zip(args, kinds)]
    return repr((kernel, kinds, kwargs))


def _warm_up(device: torch.device, kernel: JITFunction, args: list, kwargs: dict) -> None:
    with torch.cuda.device(-1 if device.index is None else device.index):
        kernel.warmup(*args, grid=(1,), **kwargs)


@contextlib.contextmanager
def _poisoned_memory():
    """Deterministic mode fills uninitialised memory with NaN."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _name(tiles: Tiles) -> tuple:
    return tuple(tiles.items())


def _to_json(tiles: Tiles) -> dict[str, dict[str, int]]:
    return {kernel: asdict(tile) for kernel, tile in tiles.items()}


def _open_table(path: Path, device: torch.device) -> dict:
    """A table's content to go on with, or an empty one, once it is sure that it can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"output is {path}, which cannot be written: {error.strerror}") from error
    here = {**tables.conditions(tables.device_name(device)), "torch": torch.__version__}
    if not path.exists():
        return {**here, "entries": [], "faults": []}
    table = tables.read_table(path)
    there = {name: table.get(name) for name in here}
    if there != here:
        raise ValueError(f"{path} was measured with {there}; this is {here}: delete it or name another output")
    return {**table, "faults": table.get("faults", [])}


def _write_table(path: Path, table: dict) -> None:
    """A line for each entry; never half a file."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table.items() if type(value) is not list
    ]
    for name in ("entries", "faults"):
        rows = ",\n".join(json.dumps(row) for row in table[name])
        lines.append(f'"{name}": [\n{rows}\n]' if rows else f'"{name}": []')
    new = path.with_name(f".{secrets.token_hex(8)}.edt-half")  # a name that nobody else has
    try:
        new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def shapes_of(models: Sequence[str], ops: Sequence[str], batch_size: int, dtype: torch.dtype) -> list[Shape]:
    """What models launch, the most important first: at 256² before 512², attention before norms, without AMM
    (in training and most of sampling) before with it, early stages before late ones."""
    common = {"batch_size": batch_size, "dtype": dtype}
    presets = [PRESETS[model] for model in models]
    sizes = [(preset["sample_size"] // 2,) if "sample_size" in preset else (16, 32) for preset in presets]
    shapes = []
    for side in sorted(set(itertools.chain(*sizes))):
        attention, norms = [], []
        for stage, (preset, sides) in itertools.product(range(3), zip(presets, sizes)):
            if side not in sides:
                continue
            grid, channels = (side >> stage, side >> stage), preset["hidden_sizes"][stage]
            attention.append(
                Shape("amm_attention", grid, channels, heads=preset["num_attention_heads"][stage], **common)
            )
            norms += [
                Shape(op, grid, channels, **common) for op in tables.OPS[1:] if stage < 2 or "token" not in op
            ]
        shapes += [*attention, *norms, *(replace(shape, modulation=True) for shape in attention)]
    return [shape for shape in shapes if shape.op in ops]


def report(table: dict) -> str:
    """A line for each measurement: the static choice's time, the chosen tiles' time, and these tiles."""
    lines = [f"{'pass':33} {'shape':26} {'static µs':>10} {'chosen µs':>10} {'ratio':>6}  tiles"]
    for entry in table["entries"]:
        static, chosen = entry["static_microseconds"], entry["microseconds"]
        ratio = f"{chosen / static:.3f}" if static else "wrong"
        text = "the same"
        if entry["tiles"] != entry["static_tiles"]:
            sizes = {kernel: ", ".join(f"{n} {v}" for n, v in t.items()) for kernel, t in entry["tiles"].items()}
            text = "; ".join(f"{kernel}: {size}" for kernel, size in sizes.items())
        lines.append(f"{entry['pass']:33} {entry['shape']:26} {static or '':>10} {chosen:>10} {ratio:>6}  {text}")
    faults = [
        f"WRONG, never chosen: {fault['pass']} {fault['tiles']}: {fault['reason']}" for fault in table["faults"]
    ]
    return "\n".join([*lines, *faults])


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 if a candidate crashed the GPU.

    Raises:
        ValueError: for arguments that it cannot take, and without a GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help=f"the table; default: {OUTPUTS}/<device>/tiles.json")  # fmt: skip
    parser.add_argument("--ops", nargs="+", default=tables.OPS, choices=tables.OPS, metavar="OP",
                        help=f"of {', '.join(tables.OPS)}")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=("EDT-XL/2", "EDT-B/2", "EDT-S/2"), choices=list(PRESETS),
                        metavar="MODEL", help="presets with the shapes, the most important first")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="then no further measurement is begun; each takes up to two minutes")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="only candidates that differ from the static choice in one number")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; it must be at least 1")
    if not options.seconds >= 0:
        raise ValueError(f"seconds is {options.seconds}; it must be a number of at least 0")
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA or ROCm GPU; torch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    path = options.output or OUTPUTS / device_slug(tables.device_name(device)) / "tiles.json"
    shapes = shapes_of(options.models, options.ops, options.batch_size, getattr(torch, options.dtype))
    deadline = time.monotonic() + options.seconds
    try:
        tune(device, shapes, path, graph_microseconds, quick=options.quick, deadline=deadline)
    except RuntimeError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    finally:
        if path.is_file():
            print(
                f"{report(json.loads(path.read_text()))}\nThe table is {path}; {tables.VARIABLE} names one to use."
            )
    return 0


if __name__ == "__main__":
    from .__main__ import main as command

    sys.exit(command(["tune", *sys.argv[1:]]))

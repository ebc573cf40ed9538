"""Compiled code with one instruction removed or changed: would the executor have noticed?"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from executed import SCHEDULES

from benchmarks.compiled.launch import executing
from benchmarks.compiled.program import FaultError, Program
from benchmarks.compiled.ptx import UnsupportedError, parse

_SYNCHRONISING = re.compile(
    r"^\s*(bar\.sync|bar\.warp\.sync|cp\.async\.(?:wait_group|commit_group)|fence\.proxy\.async|wgmma\.(?:fence|commit_group|wait_group))"
)
# One operand or operator of these is changed.
_COMPUTING = re.compile(
    r"^\s*(?:@!?%p\d+ )?(?:add\.s32|add\.s64|xor\.b32|or\.b32|and\.b32|shl\.b32|shr\.u32|bfe\.u32|mad\.lo\.s32"
    r"|setp\.\w+\.s32|selp\.b32|fma\.rn\.f32|add\.f32|mul\.f32)\s"
)


@dataclass
class Mutant:
    kind: str  # the instruction that is gone, or "value"
    program: Program
    change: str


def _change(line: str) -> str:
    """Another constant, operator or order of operands."""
    if constant := re.search(r", (-?\d+);", line):
        return f"{line[: constant.start()]}, {int(constant.group(1)) + 1};"
    head, operands = re.match(r"(.*?\s%\w+, )(.*);", line).groups()
    first, second, *rest = operands.split(", ")
    for old, new in (("add.", "sub."), ("xor.", "or."), ("or.", "xor."), ("and.", "or."), ("mul.f", "add.f")):
        if re.search(rf"\b{re.escape(old)}", head):
            return re.sub(rf"\b{re.escape(old)}", new, head, count=1) + operands + ";"
    if rest and re.search(r"\b(fma|mad)", head):
        return f"{head}{first}, {rest[0]}, {second};"
    return f"{head}{', '.join([second, first, *rest])};"


def mutants(program: Program, values: int, seed: int = 0) -> Iterator[Mutant]:
    """Without each synchronising instruction in turn; and `values` others, one changed at a time."""
    lines = program.kernel.text.split("\n")
    start = next(number for number, line in enumerate(lines) if ".reqntid" in line)
    synchronising = [n for n in range(start, len(lines)) if _SYNCHRONISING.match(lines[n])]
    computing = [n for n in range(start, len(lines)) if _COMPUTING.match(lines[n])]
    chosen = random.Random(seed).sample(computing, min(values, len(computing)))
    for number in [*synchronising, *chosen]:
        changed = "" if number in synchronising else _change(lines[number])
        if changed == lines[number]:
            continue
        kind = _SYNCHRONISING.match(lines[number]).group(1) if not changed else "value"
        text = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
        try:
            mutant = Program(parse(text))
        except UnsupportedError:
            continue
        place = program.kernel.places.get(number + 1, "")
        yield Mutant(
            kind, mutant, f"line {number + 1}: {lines[number].strip()} → {changed.strip() or 'nothing'}, {place}"
        )


@dataclass
class Launch:
    """A launch that can be repeated: its program, and its arguments as they were."""

    program: Program
    arguments: list
    rest: tuple

    def repeat(self, program: Program, schedule) -> tuple[list[torch.Tensor], list]:
        """The arguments after a run of another program, and what it found."""
        arguments = _copy(self.arguments)
        grid, shared_bytes, threads = self.rest
        run = program.run(grid, arguments, shared_bytes, threads, schedule)
        return [argument for argument in arguments if isinstance(argument, torch.Tensor)], run.findings

    def notices(self, program: Program) -> bool:
        """Whether a run of it faults, finds something, depends on the schedule or gives other numbers."""
        try:
            results = [self.repeat(program, schedule) for schedule in SCHEDULES]
        except FaultError:
            return True
        if any(findings for _, findings in results):
            return True
        expected = self.repeat(self.program, SCHEDULES[0])[0]
        return any(_differ(a, b) for result, _ in results for a, b in zip(result, expected))


def _differ(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """By more than two rounding steps of the whole, which the budget would not see either."""
    if not expected.is_floating_point():
        return not torch.equal(result, expected)
    nan = expected.isnan()
    if not torch.equal(nan, result.isnan()):
        return True
    result, exact = (t.double().masked_fill(nan, 0).nan_to_num() for t in (result, expected))
    return bool((result - exact).norm() > 2 * torch.finfo(expected.dtype).eps * exact.norm())


def _copy(arguments: list) -> list:
    """Of tensors that may share a storage."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies = []
    for argument in arguments:
        if not isinstance(argument, torch.Tensor):
            copies.append(argument)
            continue
        argument = argument.detach()
        storage = argument.untyped_storage()
        copy = storages.setdefault(storage.data_ptr(), storage.clone())
        empty = torch.empty(0, dtype=argument.dtype)
        copies.append(empty.set_(copy, argument.storage_offset(), argument.shape, argument.stride()))
    return copies


def launches(run, target: str) -> dict[str, Launch]:
    """The first launch of each kernel that `run` launches."""
    found: dict[str, Launch] = {}

    class Recorded:
        def __init__(self, name: str, program: Program):
            self.name, self.program, self.kernel = name, program, program.kernel

        def run(self, grid, arguments, shared_bytes, threads, *others):
            found.setdefault(self.name, Launch(self.program, _copy(arguments), (grid, shared_bytes, threads)))
            return self.program.run(grid, arguments, shared_bytes, threads, *others)

    with executing(target, replace=Recorded):
        run()
    return found

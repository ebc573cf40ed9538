"""PTX of a few lines, and a run of it."""

import torch

from benchmarks.compiled.program import AS_WRITTEN, Program, Run, Schedule
from benchmarks.compiled.ptx import parse


def program(body: str, parameters: int, threads: int = 32) -> Program:
    """A kernel of 64-bit parameters p0, p1, ..., already in %d0, %d1, ..., with the thread's number in %r0, its
    lane in %r1 and its warp in %r2."""
    declared = ",\n".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(parameters))
    return Program(
        parse(f"""
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry small(
{declared}
)
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<32>;
.reg .b32 %r<256>;
.reg .b64 %d<32>;
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %laneid;
shr.u32 %r2, %r0, 5;
{body}
ret;
}}
""")
    )


def run(
    body: str,
    *arguments: torch.Tensor | int,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    schedule: Schedule = AS_WRITTEN,
) -> Run:
    return program(body, len(arguments), threads).run((programs,), list(arguments), shared, schedule=schedule)


def kinds(result: Run) -> list[str]:
    return [finding.kind for finding in result.findings]

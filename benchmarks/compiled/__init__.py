"""Runs what the compiler made: the PTX of compiled kernels, executed on the CPU.

Triton's interpreter shows that a kernel's Python is right. What the compiler made of it, layouts, barriers,
asynchronous copies, matrix instructions, runs here: every instruction of the PTX is executed as the PTX ISA
defines it (the manual's sections are named where they are needed), on the CPU, by warps of 32 lanes.

    ptx.py        text → instructions
    semantics.py  what each instruction computes, as a table
    program.py    instructions with names → instructions with places, for the machine; running them
    machine/      the machine in C++: warps, barriers, asynchronous groups, memory and its checks, matrix products
    build.py      the machine compiled, once, by g++
    launch.py     a Triton launch → its compiled program → run on CPU tensors; `executing()` for whole ops
    cases.py      what is executed of this project, and its verdict
    cost.py       what was counted while it ran, and the floors that follow

What a run proves, and what not, is said in benchmarks/README.md.
"""

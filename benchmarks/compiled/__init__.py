"""Runs what the compiler made: the PTX of compiled kernels, executed on the CPU.

Triton's interpreter shows that a kernel's Python is right. What the compiler made of it, layouts, barriers,
asynchronous copies, matrix instructions, runs here: every instruction of the PTX is executed as the PTX ISA
defines it (the manual's sections are named where they are needed), on the CPU, by warps of 32 lanes.

    ptx.py        text → instructions
    semantics.py  what each instruction computes: a table of the element-wise ones, the operands of the others
    lowering.py   instructions with names → the machine's, with places
    machine/      the machine in C++: numbers, memory and its checks, warps and barriers, copies, matrix
                  products, the tensor memory accelerator
    build.py      the machine compiled, once, by g++
    program.py    a compiled kernel, and runs of it on the memory of tensors
    launch.py     Triton launches on CPU tensors: whole ops, by the programs compiled for a GPU
    cost.py       what a training step's kernels do, counted while they run, and the floors that follow

What a run proves, and what not, is said in benchmarks/README.md.
"""

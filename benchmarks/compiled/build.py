"""The machine, made into a shared library by g++ when it is first needed and kept in the user's cache."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .semantics import ELEMENTWISE, FUNCTIONS, OPERATIONS, Elementwise, register_bits

_SOURCES = Path(__file__).parent / "machine"
_COMPILER = ("g++", "-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-fno-math-errno", "-fwrapv",
             "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC")  # fmt: skip
# Every element-wise instruction twice where it can flush: the numbers of the machine's operations start after
# them.
VARIANTS = [
    (opcode, flush)
    for opcode, row in ELEMENTWISE.items()
    for flush in (False, True)
    if not flush or "f32" in (row.result, *row.operands)
]
NUMBERS = {variant: number for number, variant in enumerate(VARIANTS)}
NUMBERS |= {name: len(VARIANTS) + number for number, name in enumerate(OPERATIONS)}


def needs() -> str:
    """What is missing to run compiled kernels; nothing if all is there."""
    return "" if shutil.which("g++") else "g++ is not installed; compiled kernels run on a machine written in C++"


@functools.cache
def library() -> ctypes.CDLL:
    if missing := needs():
        raise RuntimeError(missing)
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir())}
    files |= {"operations.inc": _operations(), "elementwise.inc": _elementwise()}
    # What -march=native means here: a cache may be shared by machines.
    native = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True, text=True)
    key = hashlib.sha256(repr((files, _COMPILER, native.stdout)).encode()).hexdigest()[:16]
    folder = _cache()
    built = folder / f"{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:  # replaced at once, so that others never see a part
            for name, text in files.items():
                Path(work, name).write_text(text, encoding="utf-8")
            made = Path(work, "machine.so")
            result = subprocess.run(
                [*_COMPILER, "-o", made, Path(work, "machine.cpp")], capture_output=True, text=True
            )
            if result.returncode:
                raise RuntimeError(
                    f"g++ could not compile the machine of benchmarks/compiled:\n{result.stderr[-2000:]}"
                )
            os.replace(made, built)
    return ctypes.CDLL(str(built))


def _cache() -> Path:
    """The user's cache folder; for a user without one, a folder for this user among the temporary files."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folders = [Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "edt-kernels", "machine"),
               Path(tempfile.gettempdir(), f"edt-kernels-machine-{os.getuid()}")]  # fmt: skip
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise RuntimeError(f"the machine needs a folder to be compiled into; none of {folders} can be written")


def _operations() -> str:
    """Names of functions; a structure of each operation's operands, and the call of the machine's function of that
    name."""
    structures, cases = [], []
    for number, (name, fields) in enumerate(OPERATIONS.items()):
        single = [field for field in fields.split() if not field.startswith("*")]
        several = [f"int count; int {field[1:]}[];" for field in fields.split() if field.startswith("*")]
        ints = f"int {', '.join(single)};" if single else ""
        structures.append(f"struct {_camel(name)} {{ {' '.join([ints, *several])} }};")
        cases.append(f"case {number}: return m.{name}(w, mask, *(const {_camel(name)}*)operands);")
    dispatch = "template <class M> bool dispatch(M& m, Warp& w, u32 mask, int operation, const int* operands) {"
    functions = ", ".join(name.upper().replace(".", "_") for name in FUNCTIONS)
    return (
        "\n".join(
            [
                f"enum Function {{ {functions} }};",
                *structures,
                dispatch,
                "switch (operation) {",
                *cases,
                "} return false; }",
            ]
        )
        + "\n"
    )


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _elementwise() -> str:
    functions = [_function(f"e{number}", ELEMENTWISE[v[0]], *v) for number, v in enumerate(VARIANTS)]
    names = ", ".join(f"e{number}" for number in range(len(VARIANTS)))
    kind = "typedef void (*Elementwise)(u8*, const int*, u32);"
    return "\n".join([*functions, kind, f"static const Elementwise ELEMENTWISE[] = {{{names}}};"]) + "\n"


def _function(name: str, row: Elementwise, opcode: str, flush: bool) -> str:
    def bits(kind: str, predicate: bool) -> str:
        return "u8" if predicate else f"u{register_bits(kind)}"

    pointers, values = [], []
    for at, (kind, predicate) in enumerate(zip(row.operands, row.predicates)):
        register, letter = bits(kind, predicate), "abcd"[at]
        value = f"as<{kind}>(p{letter}[lane])"
        pointers.append(f"const {register}* p{letter} = (const {register}*)(r + x[{at + 1}]);")
        values.append(f"{kind} {letter} = {f'flush({value})' if flush and kind == 'f32' else value};")
    result = bits(row.result, row.predicate)
    expression = f"({row.result})({row.expression})"
    expression = f"flush({expression})" if flush and row.result == "f32" else expression
    body = f"{{ {' '.join(values)} out[lane] = as<{result}>({expression}); }}"
    return (
        f"static void {name}(u8* r, const int* x, u32 mask) {{  // {opcode}\n"
        f"  {result}* out = ({result}*)(r + x[0]); {' '.join(pointers)}\n"
        f"  if (mask == ALL) {{\n#pragma GCC ivdep\n    for (int lane = 0; lane < 32; lane++) {body}\n"
        f"  }} else LANES(mask) {body}\n}}"
    )

"""Mistakes in the kernels' source, put in by hand: the executor finds them, the interpreter some of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import build

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(build.needs()), reason=build.needs())]
ROOT = Path(__file__).parents[2]
KERNELS, LAUNCHERS = "amm_attention/kernels.py", "amm_attention/autograd.py"
RESIDENT_KERNELS = "amm_attention/resident_kernels.py"

INTERPRET = """
import torch
from attention_cases import Case, check
from edt_kernels.amm_attention import autograd
autograd._RESIDENT_HEADS = 1
torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN
check({case}, torch.float16, "cpu")
"""
EXECUTE = """
import torch
from attention_cases import Case
from executed import judge
from edt_kernels.amm_attention import autograd
autograd._RESIDENT_HEADS = 1
print("found:", *judge({case}, torch.bfloat16, "sm_90").faults())
"""
# A file, what is in it and what it becomes, a case; what is found, and whether the interpreter's test fails too.
MISTAKES = {
    "a tile counted by the wrong side: too many programs": (
        LAUNCHERS,
        "kernels.backward_kv, B * _ceil(N, tile.block_n),",
        "kernels.backward_kv, B * _ceil(N, tile.block_m),",
        "Case((16, 16), heads=2, batch_size=1)",
        "out of bounds",
        True,  # it reads and writes beyond its arrays, and mostly dies of that
    ),
    "a missing mask: rows beyond the last, which a factor of zero hides": (
        KERNELS,
        'load_statistic(logsumexp + first, i, valid, float("inf"), MASKED), 0.0',
        "tl.load(logsumexp + first + i), 0.0",
        "Case((5, 7))",
        "out of bounds: 4 bytes at byte 560 of argument 7, which has bytes 0 to 560",
        None,  # if what lies there in memory happens to be NaN or infinite
    ),
    "swapped strides of heads and samples": (
        KERNELS,
        "row_offsets(batch, j, head, stride_kb, stride_kn, stride_kh, ALIGN)",
        "row_offsets(batch, j, head, stride_kh, stride_kn, stride_kb, ALIGN)",
        "Case((9, 9), heads=2, batch_size=1)",
        "out of bounds",
        True,
    ),
    "keys by way of the queries, in whose storage they are": (
        KERNELS,
        "k_tile = load_rows_transposed(k, k_offsets,",
        "k_tile = load_rows_transposed(q + heads * D, k_offsets,",
        "Case((9, 9))",
        "with gaps",
        False,
    ),
    "a row too far, in the pass with a whole head on the chip": (
        RESIDENT_KERNELS,
        "tl.store(delta + first_row + i, row_delta)",
        "tl.store(delta + first_row + i + 1, row_delta)",
        "Case((8, 16), heads=2, batch_size=1, modulation=None)",
        "out of bounds: 4 bytes at byte 1024 of argument 7, which has bytes 0 to 1024",
        True,
    ),
}


def outcome(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests", ROOT / "tests" / "compiled")))
    variables = {**os.environ, "PYTHONPATH": path, "EDT_KERNELS_BACKEND": "triton", **environment}
    return subprocess.run(  # python -c looks into the working folder first
        [sys.executable, "-c", script], env=variables, cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_source_is_found(mistake, tmp_path):
    file, right, wrong, case, found, interpreter_fails = MISTAKES[mistake]
    shutil.copytree(ROOT / "edt_kernels", tmp_path / "edt_kernels")
    path = tmp_path / "edt_kernels" / file
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    executed = outcome(tmp_path, EXECUTE.format(case=case))
    assert found in executed.stdout + executed.stderr, executed
    interpreted = outcome(tmp_path, INTERPRET.format(case=case), TRITON_INTERPRET="1")
    assert interpreter_fails in (bool(interpreted.returncode), None), interpreted.stderr[-2000:]


def test_without_a_mistake_nothing_is_found():
    for _, _, _, case, _, _ in MISTAKES.values():
        executed = outcome(ROOT, EXECUTE.format(case=case))
        assert executed.stdout == "found:\n", executed.stderr[-2000:]
        assert outcome(ROOT, INTERPRET.format(case=case), TRITON_INTERPRET="1").returncode == 0

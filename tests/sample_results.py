"""Invented results of an invented device, for the tests of what is made of results."""

from dataclasses import replace

from benchmarks.measure import Ceilings, Timing
from benchmarks.results import Results, Row

CEILINGS = Ceilings(4e12, 8e14, "bfloat16")
ENVIRONMENT = {
    "device": "Sample GPU",
    "driver": "1.2",
    "versions": {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "diffusers": None},
    "commit": "0123456789abcdef",
    "date": "2026-01-02",
    "threads": 8,
    "cores": 16,
    "cuda": "13.0",
    "multiprocessors": 100,
    "memory_gib": 80,
}
# Times over ours: an implementation, its role, forward, forward and backward.
ATTENTION_PEERS = (
    ("eager, as released", "peer", 8.0, 5.0),
    ("torch.compile, dynamic=False", "peer", 4.0, 3.0),
    ("doubled keys, SDPA memory-efficient", "peer", 3.0, 2.5),
    ("doubled keys, SDPA cuDNN", "peer", 3.5, None),
    ("two passes, FlexAttention", "peer", 3.2, 2.8),
    ("SDPA flash", "bound", 1.0, 0.9),
    ("SDPA cuDNN", "bound", 1.0, 0.8),
    ("SDPA with bias, memory-efficient", "bound", 1.3, 1.6),
    ("FlexAttention with bias", "bound", 1.2, 1.4),
)


def timing(ms: float) -> Timing:
    return Timing(ms, 0.98 * ms, 1.05 * ms)


def row(suite, case, work, shape, implementation, role, ms=None, **values) -> Row:
    """With a device time of `ms` and 0.01 more between events; without it, a status is among the values."""
    times = {} if ms is None else {"ms": timing(ms + 0.01), "graph_ms": timing(ms)}
    fields = {"dtype": "bfloat16", "backend": "Triton kernels" if role == "ours" else "PyTorch"} | times | values
    return Row(suite, case, work, shape=shape, implementation=implementation, role=role, **fields)


def attention_rows(side, batch_size, sweep="stage", *, ours_ms=None, modulated=True) -> list[Row]:
    """Forward, and forward with backward, of ours and every peer."""
    heads, head_dim, tokens = 18, 52, side * side
    case = f"EDT-XL/2 {side}x{side} {heads}x{head_dim} B{batch_size}, bias" + " and modulation" * modulated
    elements = batch_size * tokens * heads * head_dim
    found = []
    for work, factor in (("forward", 1), ("forward+backward", 3.5)):
        shape = {
            "model": "EDT-XL/2", "grid": [side, side], "tokens": tokens, "heads": heads, "head_dim": head_dim,
            "batch_size": batch_size, "has_bias": True, "has_modulation": modulated, "grad_bias": factor > 1,
            "sweep": sweep,
        }  # fmt: skip
        num_bytes, operations = round(factor) * 8 * elements, round(factor * 4 * elements * tokens)
        floor = CEILINGS.floor_ms(num_bytes, operations)
        ms = ours_ms * factor if ours_ms else floor / 0.7
        peak = 2 * elements * (1 if factor == 1 else 4)
        counted = {"bytes": num_bytes, "operations": operations, "floor_ms": floor, "error_over_budget": 0.5}
        found.append(row("attention", case, work, shape, "ours", "ours", ms, peak_bytes=peak, **counted))
        for name, role, forward, backward in ATTENTION_PEERS:
            ratio = forward if factor == 1 else backward
            if ratio is None:
                values = {"status": "unsupported", "reason": "cuDNN takes no bias that needs a gradient"}
                found.append(row("attention", case, work, shape, name, role, **values))
            elif tokens > 2000 and "eager" in name:
                values = {"status": "out of memory", "reason": "CUDA out of memory"}
                found.append(row("attention", case, work, shape, name, role, **values))
            else:
                more = peak + (2 * batch_size * heads * tokens**2 * 2 if "eager" in name else peak)
                found.append(
                    row("attention", case, work, shape, name, role, ratio * ms, peak_bytes=more, **counted)
                )
    return found


def norm_rows(op="gated_residual_adaln", suite="adaln", batch_size=64) -> list[Row]:
    """Forward at 90 % of its floor; both passes so that backward is at 80 %; a peer that is not installed."""
    case = f"{op} EDT-XL/2 16x16 C936 B{batch_size}"
    shape = {"op": op, "model": "EDT-XL/2", "grid": [16, 16], "channels": 936, "batch_size": batch_size,
             "rows": 256 * batch_size, "width": 936}  # fmt: skip
    elements, found = 256 * 936 * batch_size, []
    forward_bytes, both_bytes = 12 * elements, 30 * elements
    forward_ms = CEILINGS.floor_ms(forward_bytes, 0) / 0.9
    both_ms = forward_ms + CEILINGS.floor_ms(both_bytes - forward_bytes, 0) / 0.8
    for work, ms, num_bytes in (("forward", forward_ms, forward_bytes), ("forward+backward", both_ms, both_bytes)):
        counted = {"dtype": "mixed", "bytes": num_bytes, "operations": 0,
                   "floor_ms": CEILINGS.floor_ms(num_bytes, 0), "peak_bytes": num_bytes // 2}  # fmt: skip
        found += [
            row(suite, case, work, shape, "ours", "ours", ms, **counted),
            row(suite, case, work, shape, "eager", "peer", 4 * ms, **counted),
            row(suite, case, work, shape, "torch.compile", "peer", 1.5 * ms, **counted),
            row(suite, case, work, shape, "torch.compile, dynamic=False", "peer", 1.4 * ms, **counted),
            row(suite, case, work, shape, "Liger-Kernel LayerNorm + torch", "peer", dtype="mixed",
                status="missing", reason="liger-kernel is not installed"),
        ]  # fmt: skip
    return found


def model_rows(suite, model, batch_size, *, ours_ms=100.0) -> list[Row]:
    """Peers at 4, 3.5 (the strictest eager), 8, 2 and 1.6 times ours; eager needs 2.5 times its memory."""
    work = {"model": "forward", "train": "training step", "sample": "250 steps, guidance 2"}[suite]
    shape = {"model": model, "resolution": 256, "batch_size": batch_size}
    shape |= {"steps": 250} if suite == "sample" else {}
    case = f"{model} 256² B{batch_size}"

    def one(name, role, factor, memory):
        ms = factor * ours_ms
        extra = {"images_per_second": 1e3 * batch_size / ms, "model_flop_utilisation": 0.5 / factor}
        first_call = 40.0 if "compile" in name else 1.0
        return row(suite, case, work, shape, name, role, ms, graph_ms=None, peak_bytes=int(memory * 2**30),
                   first_call_seconds=first_call, extra=extra,
                   error_over_budget=0.5 if role == "ours" else None)  # fmt: skip

    return [
        one("ours", "ours", 1, 10),
        one("ours + torch.compile", "variant", 0.9, 9),
        one("eager, released op sequence", "peer", 4, 25),
        one("eager, released op sequence, TF32", "peer", 8, 40),
        one("torch.compile of the released op sequence", "peer", 2, 15),
        one("reference backend", "peer", 3.5, 26),
        one("torch.compile of the reference backend", "peer", 1.6, 16),
    ]


def results(rows: list[Row], **environment) -> Results:
    return Results(ENVIRONMENT | environment, CEILINGS, rows)


def suites() -> dict[str, Results]:
    """As much as a run on a GPU leaves."""
    attention = [r for side in (16, 8, 4) for batch_size in (64, 256) for r in attention_rows(side, batch_size)]
    attention += [r for r in attention_rows(16, 256, modulated=False) if r.work == "forward"]
    attention += [r for side in (32, 64) for r in attention_rows(side, 65536 // side**2, "tokens")]
    for found in attention:
        if found.case.startswith("EDT-XL/2 16x16 18x52 B256"):
            found.shape["sweep"] = "tokens"
    norms = {
        "adaln": norm_rows() + norm_rows("adaln") + norm_rows(batch_size=256),
        "merge": norm_rows("token_merge_adaln", "merge"),
        "split": norm_rows("token_split_concat_adaln", "split"),
    }
    models = {
        "train": [r for name in ("EDT-S/2", "EDT-B/2", "EDT-XL/2") for r in model_rows("train", name, 256)],
        "model": model_rows("model", "EDT-XL/2", 64),
        "sample": model_rows("sample", "EDT-XL/2", 64) + model_rows("sample", "EDT-XL/2", 1),
    }
    return {suite: results(rows) for suite, rows in ({"attention": attention} | norms | models).items()}


def without_times(one: Row, status: str, reason: str) -> Row:
    return replace(one, status=status, reason=reason, ms=None, graph_ms=None, peak_bytes=None)

"""Adds up what the tests executed, whichever worker did it, and prints it at the end."""

from collections import Counter

_executed: list[dict] = []
_mutants: Counter = Counter()


def pytest_runtest_logreport(report):
    if report.when == "call":
        for name, value in report.user_properties:
            if name == "executed":
                _executed.append(value)
            elif name == "mutants":
                _mutants.update(value)


def pytest_terminal_summary(terminalreporter):
    if _executed:
        codes = {code for row in _executed for code in row["codes"]}
        kernels = {kernel for row in _executed for kernel in row["kernels"]}
        terminalreporter.section("compiled kernels, executed")
        launches, instructions = (sum(row[name] for row in _executed) for name in ("launches", "instructions"))
        worst = max(row["over_budget"] for row in _executed)
        terminalreporter.line(
            f"{len(_executed)} cases, {launches} launches of {len(codes)} codes of {len(kernels)} kernels × "
            f"targets, {instructions / 1e6:.0f} million warp instructions; worst error {worst:.2f} of its budget"
        )
    for kind in sorted({name.partition(":")[0] for name in _mutants}):
        found, missed = _mutants[f"{kind}:found"], _mutants[f"{kind}:missed"]
        terminalreporter.line(f"mutants, {kind}: {found} of {found + missed} found")

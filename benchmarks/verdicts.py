"""Whether stored results show that the targets are met.

A target is judged at each of its places: "met" or "missed" by measured rows alone, else "not measured". Where
several cases are at a place, the worst counts.
"""

import math
from dataclasses import dataclass, replace

from .results import Results, Row
from .targets import LARGEST, TARGETS, NotMeasuredError, Target, groups, ours_of


@dataclass(frozen=True)
class Verdict:
    target: Target
    place: str
    status: str = "not measured"  # or "met", "missed"
    figure: float | None = None
    note: str = ""  # the baseline, or why there is no figure
    ours: Row | None = None

    @property
    def batch_size(self) -> int | None:
        return self.ours and self.ours.shape["batch_size"]

    def __str__(self) -> str:
        text = self.status if self.figure is None else self.target.show(self.figure)
        return f"{text} ({self.note})" if self.note else text


def _judge(target: Target, place: str, rows: list[Row], results: Results) -> Verdict:
    ours = ours_of(rows)
    if ours is None:
        return Verdict(target, place, note="ours did not run")
    if ours.status != "ok":
        return Verdict(target, place, "missed", note=f"ours: {ours.status}", ours=ours)
    try:
        figure, note = target.figure(ours, rows, results)
    except NotMeasuredError as error:
        return Verdict(target, place, note=str(error), ours=ours)
    met = figure >= target.goal if target.at_least else figure <= target.goal
    return Verdict(target, place, "met" if met else "missed", figure, note, ours)


def evaluate(suites: dict[str, Results], *, worst: bool = True) -> list[Verdict]:
    """For each target and place the worst case, or every case. Nothing of a CPU is judged."""
    verdicts = []
    for target in TARGETS:
        results = suites.get(target.suite)
        rows = results.rows if results and results.environment["device"] != "cpu" else []
        for label, place in target.places.items():
            here = groups([row for row in rows if target.matches(row, place)])
            judged = [_judge(target, label, group, results) for group in here]
            if label.endswith(LARGEST):
                judged = _largest_batch(judged)
            judged.sort(key=_severity)
            judged = judged or [Verdict(target, label)]
            verdicts += judged[:1] if worst else judged
    return verdicts


def _largest_batch(judged: list[Verdict]) -> list[Verdict]:
    """The largest batch that fits both is 256, or the largest below one that was tried and did not fit."""
    fits = max((v.batch_size for v in judged if v.figure is not None), default=None)
    if fits is None:
        return judged
    if fits < 256 and all(v.batch_size <= fits for v in judged if v.ours):
        return [
            replace(v, status="not measured", note=f"not above batch {fits}: {v}", figure=None) for v in judged
        ]
    return [v for v in judged if v.batch_size == fits]


def _severity(verdict: Verdict) -> tuple[int, float]:
    figure = -math.inf if verdict.figure is None else verdict.figure
    return ("missed", "not measured", "met").index(verdict.status), figure * (1 if verdict.target.at_least else -1)

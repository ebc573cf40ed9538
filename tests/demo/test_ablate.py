import json

import pytest

from edt.cli import main
from edt.data.digits import load_split_digits
from edt.demo import ablation as ablate
from edt.demo.ablation import AblateOptions
from edt.demo.judge import frechet_distance
from edt.interrupt import StopRequest

QUICK = {"seeds": (0, 1), "steps": 3, "num_per_class": 2, "sampling_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    ablate.ablate(AblateOptions(output=folder, **QUICK), StopRequest())
    return folder


def test_every_case_once(output):
    report = json.loads((output / "ablation.json").read_text())
    cases = [(case["seed"], case["masking"], case["amm"]) for case in report["cases"]]
    assert cases == [(seed, masking, amm) for seed in (0, 1) for masking in (False, True) for amm in (False, True)]
    for case in report["cases"]:
        assert case["images"] == 20
        assert case["frechet_distance"] > report["real"]["frechet_distance"] > 0
    losses = {(case["seed"], case["masking"]): case["full_loss"] for case in report["cases"]}
    assert len(set(losses.values())) == 4


def test_table_has_means_over_seeds(output):
    table = (output / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| on", "| off"))]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| off", "off"],
        ["| off", "on"],
        ["| on", "off"],
        ["| on", "on"],
    ]
    cases = [case for case in json.loads((output / "ablation.json").read_text())["cases"]
             if not case["masking"] and not case["amm"]]  # fmt: skip
    mean = sum(case["full_loss"] for case in cases) / 2
    spread = abs(cases[0]["full_loss"] - cases[1]["full_loss"]) / 2**0.5
    assert rows[0].endswith(f"| {mean:.4f} ± {spread:.4f} |")


def test_goes_on_from_what_is_done(output, monkeypatch):
    report = json.loads((output / "ablation.json").read_text())
    monkeypatch.setattr(ablate, "draw", lambda *args: pytest.fail("drawn again"))
    assert ablate.ablate(AblateOptions(output=output, **QUICK), StopRequest())["cases"] == report["cases"]


def test_other_options_are_refused(output, capsys):
    args = [
        "--output",
        str(output),
        "--steps",
        "4",
        "--num-per-class",
        "2",
        "--sampling-steps",
        "2",
        "--seeds",
        "0",
    ]
    assert main(["ablate", *args]) == 2
    assert "has cases of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ablation.json is no JSON, or torn"),
        ("[1]", "ablation.json is JSON, but list"),
        ("{}", "ablation.json is none of edt ablate"),
        ('{"settings": {}, "cases": [{}]}', "ablation.json is none of edt ablate"),
        ('{"settings": {}, "cases": {"seed": 1}}', "ablation.json is none of edt ablate"),
        (None, "has a table.md, but no ablation.json of edt ablate"),
    ],
)
def test_reports_of_others_stay(tmp_path, text, message):
    name = "table.md" if text is None else "ablation.json"
    (tmp_path / name).write_text(text or "mine")
    before = (tmp_path / name).read_text()
    with pytest.raises(ValueError, match=message):
        ablate.ablate(AblateOptions(output=tmp_path, **QUICK), StopRequest())
    assert (tmp_path / name).read_text() == before


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,), (0, 2**63)])
def test_seeds_are_checked(tmp_path, seeds):
    with pytest.raises(ValueError, match="seed"):
        AblateOptions(output=tmp_path, seeds=seeds).check()


def test_frechet_distance():
    digits = load_split_digits()
    real = digits.held_out_images
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    # Of equal covariances it is the squared distance of the means.
    assert frechet_distance(real + 0.5, real) == pytest.approx(64 * 0.25, rel=1e-4)
    # Of images s times as far from their mean, tr C·(s − 1)².
    mean = real.mean(0)
    variance = real.reshape(len(real), -1).var(0, ddof=1).sum()
    assert frechet_distance(mean + 2 * (real - mean), real) == pytest.approx(variance, rel=1e-4)

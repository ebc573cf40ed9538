"""Targets, pages, pictures and README tables made of invented results."""

import csv
import json
import re
import subprocess
from dataclasses import replace

import pytest
import sample_results as sample

from benchmarks import __main__ as command
from benchmarks import host, plots, report, results, tables
from benchmarks.measure import Timing
from benchmarks.verdicts import Verdict, evaluate


@pytest.fixture(autouse=True)
def _few_panels(monkeypatch):
    """Most of the tests' time is laying out pictures."""
    monkeypatch.setattr(plots, "_PANELS", 2)


def verdicts(suites) -> dict[tuple[str, str], Verdict]:
    return {(verdict.target.id, verdict.place): verdict for verdict in evaluate(suites)}


def test_targets_are_met_and_missed_by_the_figures_and_never_guessed():
    found = verdicts(sample.suites())
    expected = {
        ("attention-eager", "N 256 B 64"): ("met", 8.0),
        ("attention-emulation", "N 64 B 256"): ("met", 3.0),
        ("attention-cudnn", "N 256 B 256"): ("met", 1.0),
        ("attention-cudnn", "N 256 B 64"): ("not measured", None),  # there with modulation only
        ("attention-floor", "N 256 B 256"): ("missed", 0.7),
        ("attention-both-eager", "N 256 B 64"): ("met", 5.0),
        ("attention-both-emulation", "N 256 B 64"): ("met", 2.5),
        ("attention-both-flash", "N 256 B 64"): ("missed", 1 / 0.9),
        ("train-eager-small", "EDT-S/2 B 256"): ("met", 3.5),
        ("gated_residual_adaln-forward", "B 64"): ("met", 0.9),
        ("gated_residual_adaln-backward", "B 256"): ("met", 0.8),
        ("token_merge_adaln-compile", "B 64"): ("met", 1.4),
        ("token_merge_adaln-compile", "B 256"): ("not measured", None),
        ("train-memory", "EDT-S/2 B 256"): ("met", 0.4),
        ("train-utilisation", "EDT-XL/2 largest B that fits both"): ("met", 0.5),
        ("sample-one", "EDT-XL/2 B 1"): ("missed", 3.5),
        ("sample-eager-small", "EDT-S/2 B 64"): ("not measured", None),
        ("sample-eager", "EDT-XL/2 B 64"): ("met", 3.5),
    }
    for key, (status, figure) in expected.items():
        assert found[key].status == status, key
        assert found[key].figure == (figure and pytest.approx(figure, rel=1e-3)), key
    assert {verdict.status for verdict in evaluate({})} == {"not measured"}
    on_cpu = {name: replace(suite, environment=suite.environment | {"device": "cpu"})
              for name, suite in sample.suites().items()}  # fmt: skip
    assert {verdict.status for verdict in evaluate(on_cpu)} == {"not measured"}


def test_the_strictest_baseline_counts_and_tf32_and_failures_are_none():
    rows = sample.model_rows("train", "EDT-S/2", 256)
    suites = {"train": sample.results(rows)}
    found = verdicts(suites)
    assert (
        found["train-eager-small", "EDT-S/2 B 256"].note == "reference backend"
    )  # at 3.5, released at 4, TF32 at 8
    assert found["train-eager-small", "EDT-S/2 B 256"].figure == pytest.approx(3.5, rel=1e-3)
    assert found["train-compile-small", "EDT-S/2 B 256"].note == "torch.compile of the reference backend"
    assert (
        found["train-memory", "EDT-S/2 B 256"].note == "eager, released op sequence"
    )  # takes less than the other
    tied = [replace(row, ms=rows[2].ms) if row.implementation == "reference backend" else row for row in rows]
    assert verdicts({"train": sample.results(tied)})["train-eager-small", "EDT-S/2 B 256"].figure == pytest.approx(
        4, rel=1e-3
    )

    names = ("eager, released op sequence", "reference backend")
    failed = [
        sample.without_times(row, "out of memory", "") if row.implementation in names else row for row in rows
    ]
    verdict = verdicts({"train": sample.results(failed)})["train-eager-small", "EDT-S/2 B 256"]
    assert (verdict.status, verdict.figure) == ("not measured", None)
    assert verdict.note == "eager, released op sequence: out of memory, reference backend: out of memory"


def test_of_several_cases_the_worst_counts_and_ours_that_is_wrong_misses():
    rows = sample.attention_rows(16, 64)
    plain = [replace(row, case="the same, bias", shape=row.shape | {"has_modulation": False}) for row in rows]
    slow = [replace(row, graph_ms=sample.timing(2 * row.graph_ms.median)) if row.role == "ours" else row
            for row in plain]  # fmt: skip
    found = verdicts({"attention": sample.results(rows + slow)})
    assert found["attention-both-eager", "N 256 B 64"].figure == pytest.approx(2.5)
    assert found["attention-both-eager", "N 256 B 64"].status == "missed"
    assert found["attention-eager", "N 256 B 64"].figure == pytest.approx(8)  # forward is judged with modulation

    wrong = [sample.without_times(row, "wrong", "off") if row.role == "ours" else row for row in rows]
    found = verdicts({"attention": sample.results(wrong)})["attention-eager", "N 256 B 64"]
    assert (found.status, found.figure, found.note) == ("missed", None, "ours: wrong")


def test_the_largest_batch_is_only_known_where_a_larger_one_did_not_fit():
    place = "EDT-XL/2 largest B that fits both"
    small = sample.model_rows("train", "EDT-XL/2", 64)
    alone = verdicts({"train": sample.results(small)})["train-eager", place]
    assert alone.status == "not measured"
    assert "not above batch 64: 3.50×" in str(alone)
    large = [sample.without_times(row, "out of memory", "") for row in sample.model_rows("train", "EDT-XL/2", 128)]
    found = verdicts({"train": sample.results(small + large)})["train-eager", place]
    assert (found.status, found.batch_size) == ("met", 64)


def test_attention_memory_counts_what_the_caller_holds():
    rows = sample.attention_rows(16, 64)
    ours = next(row for row in rows if row.role == "ours" and row.work == "forward+backward")
    tensor, per_row, table = 64 * 256 * 18 * 52 * 2, 64 * 256 * 18 * 4, 31 * 31 * 18 * 4
    matrix = 18 * 256 * 256 * 2
    for extra, status in ((0, "met"), (1, "missed")):
        ours.peak_bytes = 4 * tensor + per_row + table + matrix + extra  # out and the gradients
        assert verdicts({"attention": sample.results(rows)})["attention-memory", "N 256 B 64"].status == status


def test_page_of_a_device(tmp_path):
    suites = {name: sample.suites()[name] for name in ("attention", "adaln", "sample")}
    attention = suites["attention"].rows
    attention[:] = [row for row in attention if row.shape["batch_size"] == 64 or row.shape["sweep"] == "tokens"]
    attention[2] = sample.without_times(attention[2], "wrong", "output 0: 9 times the error allowed")
    for name, suite in suites.items():
        suite.save(tmp_path, name)
    (tmp_path / "static.json").write_text("[]")
    calls = [f"{op}: {work}" for op in ("torch.add", "adaln") for work in host.WORKS]
    found = {"microseconds": dict.fromkeys(calls, 12.5), "launches": dict.fromkeys(calls, 1)}
    (tmp_path / "host.json").write_text(json.dumps(found))
    report.write_folder(tmp_path)
    page = (tmp_path / "report.md").read_text()

    assert page.startswith("# Benchmarks: Sample GPU\n")
    assert f"## host: what a call keeps the CPU\n\n```\n{host.summary(found)}\n```\n" in page
    assert "driver 1.2" in page
    assert "diffusers missing" in page
    assert "copy 4000 GB/s" in page
    assert "[static.md](static.md)" in page
    line = next(line for line in page.splitlines() if "16x16 18x52 B64, bias and modulation | forward |" in line)
    assert line.split(" | ")[3:] == [
        "0.04382 (0.04294–0.04601)", "70 %", "29 MiB", "8.00×", "**wrong**", "3.00×", "3.50×", "3.20× |",
    ]  # fmt: skip
    assert "- torch.compile, dynamic=False, **wrong** in 1 of 13: output 0: 9 times the error allowed" in page
    assert "missing in 6 of 6: liger-kernel is not installed" in page
    assert "| 100 (98.01–105) e |" in page  # between events, for want of a graph
    assert "| 2.00×, first call 40 s |" in page
    assert "| 4.00× |" in page  # of one second there is nothing to say
    bounds = page[page.index("Lower bounds") :].splitlines()[2]
    assert (
        bounds == "| case | work | dtype | SDPA flash | SDPA cuDNN | SDPA with bias, memory-efficient | "
        "FlexAttention with bias |"
    )
    sentence = "sampling at batch 1, times as fast as eager bf16"
    assert f"| {sentence} | ≥ 5× | **missed (1 missed, 2 not measured)** | EDT-XL/2 B 1: 3.50×" in page

    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"attention-speedup.png", "attention-memory.png", "attention-roofline.png", "attention-tokens.png",
            "sample-speedup.png", "sample-memory.png", "adaln-speedup.png"} <= pictures  # fmt: skip
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    assert all(f"]({name})" in page for name in pictures)


def test_a_picture_has_times_of_one_clock():
    rows = [row for row in sample.attention_rows(16, 64) if row.work == "forward"]
    assert plots.of_one_clock(rows) == rows
    uncaptured = replace(rows[1], graph_ms=None)
    assert plots.of_one_clock([rows[0], uncaptured, *rows[2:]]) == [rows[0], *rows[2:]]


def test_page_of_a_cpu_says_so_and_nothing_is_drawn_without_data(tmp_path):
    rows = [replace(row, graph_ms=None, floor_ms=None, peak_bytes=None) for row in sample.norm_rows()]
    sample.results(rows, device="cpu").save(tmp_path, "adaln")
    sample.results([sample.norm_rows()[-1]], device="cpu").save(tmp_path, "split")
    report.write_folder(tmp_path)
    page = (tmp_path / "report.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert all("CPU times of the reference path" in heading for heading in headings[:-1])
    assert page.endswith("## Targets\n\nThey are of a GPU: not measured here.\n")
    assert [path.name for path in tmp_path.glob("*.png")] == ["adaln-speedup.png"]

    empty = tmp_path / "demo"
    empty.mkdir()
    (empty / "report.json").write_text("{}")
    report.write_folder(empty)
    assert [path.name for path in empty.iterdir()] == ["report.json"]


def test_no_share_is_above_what_can_be():
    ours = sample.model_rows("model", "EDT-S/2", 4)[0]
    assert "50.0% MFU" in tables.ours_cells(ours)[2]
    ours.extra["model_flop_utilisation"] = 1.57
    images, share, *_ = tables.ours_cells(ours)[2].split(", ")
    assert (images, share) == ("40 images/s", "MFU over a ceiling that was measured too low")


def test_a_wrong_or_missing_row_never_is_a_number():
    rows = sample.norm_rows()
    rows[0] = sample.without_times(rows[0], "wrong", "x: 3 times the error allowed")
    table = tables.suite_table(sample.results(rows))
    line = next(line for line in table.splitlines() if "| forward |" in line)
    cells = line.strip("| ").split(" | ")
    assert cells[3] == "**wrong**"
    assert all("×" not in cell for cell in cells)  # nothing to compare with: their own times
    assert re.search(r"- .*Liger.*, missing in \d of \d: ", table)  # it ran nowhere: no column
    assert "Liger" not in table.splitlines()[0]
    assert "forward, mixed | ours wrong: x: 3 times" in tables.case_table({"adaln": sample.results(rows)})


def test_results_survive_their_file(tmp_path):
    stored = sample.suites()["attention"]
    stored.save(tmp_path, "attention")
    assert results.load(tmp_path / "attention.json") == stored
    with open(tmp_path / "attention.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(stored.rows)
    assert float(lines[0]["graph_ms_median"]) == stored.rows[0].graph_ms.median
    assert float(lines[0]["fraction_of_floor"]) == pytest.approx(0.7)
    assert lines[0]["shape_model"] == "EDT-XL/2"
    assert [path.name for path in tmp_path.glob("*.part")] == []

    again = results.open_results(
        tmp_path, "attention", sample.ENVIRONMENT | {"date": "2026-02-03"}, sample.CEILINGS
    )
    assert again.rows == stored.rows
    assert again.environment["date"] == "2026-02-03"
    for other in ({"commit": "fedcba"}, {"device": "Other GPU"}, {"versions": {}}):
        fresh = results.open_results(tmp_path, "attention", sample.ENVIRONMENT | other, sample.CEILINGS)
        assert fresh.rows == []
    changed = results.Results(sample.ENVIRONMENT | {"commit": "abcdef+changes"}, sample.CEILINGS, stored.rows)
    changed.save(tmp_path, "merge")
    assert results.open_results(tmp_path, "merge", changed.environment, sample.CEILINGS).rows == []
    again.add([replace(stored.rows[0], peak_bytes=1)])
    assert len(again.rows) == len(stored.rows)
    (tmp_path / "model.json").write_text(json.dumps({"results": {}}))
    with pytest.raises(ValueError, match="no result file"):
        results.load(tmp_path / "model.json")


README = """# Title

<!-- benchmarks:ops-gpu -->
<!-- /benchmarks:ops-gpu -->

between

<!-- benchmarks:model-gpu -->
old text
<!-- /benchmarks:model-gpu -->
<!-- benchmarks:cpu --><!-- /benchmarks:cpu -->
the end
"""


@pytest.fixture
def repository(tmp_path):
    """A git repository with a README and no results; what is committed there is returned as a function."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "results" / "demo").mkdir(parents=True)
    (tmp_path / "results" / "demo" / "report.json").write_text("{}")
    (tmp_path / "README.md").write_text(README)

    def commit():
        git("add", "-A")
        git("commit", "-q", "-m", "results")

    commit()
    return tmp_path, commit


def test_readme_has_committed_results_alone(repository, capsys):
    root, commit = repository
    folder, readme = root / "results" / "sample-gpu", root / "README.md"

    def write():
        assert report.write_committed(root / "results", readme) == 0
        return readme.read_text()

    text = write()
    assert text.count(report.NOT_YET) == 2
    assert "old text" not in text
    assert text.endswith("<!-- /benchmarks:cpu -->\nthe end\n")
    assert write() == text

    sample.results(sample.attention_rows(16, 64)).save(folder, "attention")
    sample.results(sample.model_rows("train", "EDT-S/2", 256)).save(folder, "train")
    assert write() == text  # untracked
    assert "train.json is not committed" in capsys.readouterr().out
    assert not (folder / "report.md").exists()

    commit()
    text = write()
    assert report.NOT_YET not in text
    line = "| Sample GPU | EDT-XL/2 16x16 18x52 B64, bias and modulation | forward, bfloat16 |"
    assert f"{line} 0.04382 | 70 % | doubled keys, SDPA memory-efficient | 3.00× |" in text
    assert "](results/sample-gpu/report.md)" in text
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    page = (folder / "report.md").read_text()
    assert write() == text
    assert (folder / "report.md").read_text() == page
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == pictures

    sample.results(sample.attention_rows(16, 64, ours_ms=1e-3)).save(folder, "attention")  # changed since
    text = write()
    assert text.count(report.NOT_YET) == 1
    assert "EDT-S/2 256² B256" in text
    assert "attention.json is not committed" in capsys.readouterr().out
    assert not (root / "results" / "demo" / "report.md").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmarks:cpu -->", "has no end"),
        ("<!-- benchmarks:speed -->\n<!-- /benchmarks:speed -->", "names are"),
        ("<!-- /benchmarks:cpu -->", "out of place"),
        ("<!-- benchmarks:cpu --><!-- benchmarks:ops-gpu --><!-- /benchmarks:cpu -->", "out of place"),
        ("<!-- benchmarks:cpu --><!-- /benchmarks:cpu -->" * 2, "out of place"),
    ],
)
def test_markers_that_are_wrong(repository, text, message):
    root, _ = repository
    (root / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.write_committed(root / "results", root / "README.md")
    assert (root / "README.md").read_text() == text


def test_readme_has_the_committed_ablation(repository):
    root, commit = repository
    (root / "README.md").write_text("<!-- benchmarks:ablation --><!-- /benchmarks:ablation -->")
    table = root / "results" / "ablation" / "table.md"
    table.parent.mkdir()
    table.write_text("| masking |\n")
    report.write_committed(root / "results", root / "README.md")
    assert "Not yet measured with `edt ablate`." in (root / "README.md").read_text()
    commit()
    report.write_committed(root / "results", root / "README.md")
    text = (root / "README.md").read_text()
    assert text == "<!-- benchmarks:ablation -->\n| masking |\n<!-- /benchmarks:ablation -->"


def test_the_command_fills_every_page_and_its_links_lead_from_there(repository):
    root, commit = repository
    (root / "benchmarks").mkdir()
    pages = [root / "README.md", root / "benchmarks" / "README.md"]
    for page in pages:
        page.write_text("<!-- benchmarks:ops-gpu --><!-- /benchmarks:ops-gpu -->")
    sample.results(sample.norm_rows()).save(root / "results" / "sample-gpu", "adaln")
    commit()
    assert command.main(["report", "--results", str(root / "results"), "--readme", *map(str, pages)]) == 0
    for page in pages:
        [link] = re.findall(r"\]\((\S+)\)", page.read_text())
        assert (page.parent / link).samefile(root / "results" / "sample-gpu" / "report.md")


def test_a_wrong_marker_on_one_page_leaves_all_as_they_are(repository):
    root, _ = repository
    (root / "wrong.md").write_text("<!-- benchmarks:cpu -->")
    with pytest.raises(ValueError, match=r"wrong\.md: the marker .* has no end"):
        report.write_committed(root / "results", root / "README.md", root / "wrong.md")
    assert (root / "README.md").read_text() == README


def test_results_that_git_does_not_know(tmp_path):
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="git knows nothing"):
        report.write_committed(tmp_path, tmp_path / "README.md")


def slower(rows, role: str, factor: float):
    """The rows, those of a role by so much slower."""

    def scale(timing):
        return timing and Timing(*(factor * value for value in (timing.median, timing.p20, timing.p80)))

    return [
        replace(row, ms=scale(row.ms), graph_ms=scale(row.graph_ms)) if row.role == role else row for row in rows
    ]


def test_a_machine_agrees_with_the_tables_or_not(tmp_path, capsys):
    def run(rows, tolerance="0.1", **environment) -> tuple[int, str, str]:
        sample.results(rows, **environment).save(tmp_path / "here", "adaln")
        folders = [str(tmp_path / "here"), "--tables", str(tmp_path / "there")]
        status = command.main(["compare", *folders, "--tolerance", tolerance])
        return status, *capsys.readouterr()

    rows = sample.norm_rows()
    sample.results(rows).save(tmp_path / "there", "adaln")
    status, out, _ = run(rows)
    assert status == 0
    assert "  1.00×  " in out
    assert ", 0 disagreements" in out

    status, out, _ = run(slower(rows, "ours", 1.3))
    assert status == 1
    assert "  1.30×  " in out
    assert "ours: 1.30 times as long here, tolerated is 1.10" in out
    assert run(slower(rows, "ours", 1.3), "0.5")[0] == 0
    assert run(slower(rows, "ours", 0.5))[0] == 0
    assert run(slower(rows, "peer", 2.0))[0] == 0  # is not ours to answer for, but shown

    status, out, _ = run(
        [sample.without_times(rows[0], "wrong", "output 0: 9 times the error allowed"), *rows[1:]]
    )
    assert status == 1
    assert "ours: wrong here: output 0: 9 times the error allowed" in out

    status, _, err = run(rows, device="Another GPU")
    assert status == 2
    assert "have no case of one device in common" in err

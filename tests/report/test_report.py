"""Reports: every figure from a record, verdicts by their rule, pages that need nothing else."""

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from fabric_jax.cli.main import main
from fabric_jax.report.build import write_report
from fabric_jax.report.claims import all_verdicts
from fabric_jax.report.figures import interval
from fabric_jax.report.published import published
from fabric_jax.report.records_index import Index
from fabric_jax.sweeps.records import Record, read_folder

Folder = Callable[..., Path]
Make = Callable[..., Record]


def verdicts(path: Path) -> dict[str, Any]:
    index = Index(tuple(read_folder(path)))
    return {verdict.claim: verdict for verdict in all_verdicts(index)}


def gemma_claim(path: Path) -> Any:
    return next(v for claim, v in verdicts(path).items() if "gemma-3-1b" in claim)


@pytest.mark.parametrize(
    ("seed", "ours", "verdict"),
    [
        (200.0, 200.0, "holds"),  # 80 % less than 1,000
        (200.0, 300.0, "holds under these conditions"),
        (300.0, 300.0, "does not hold"),
    ],
)
def test_a_saving_is_taken_within_a_recipe(
    folder: Folder, memory_record: Make, seed: float, ours: float, verdict: str
) -> None:
    path = folder(
        memory_record("bitnet-1b", "ternary1.6", "seed", seed),
        memory_record("gemma-3-1b", "float16", "seed", 1000.0),
        memory_record("bitnet-1b", "ternary1.6", "ours", ours),
        memory_record("gemma-3-1b", "float16", "ours", 1000.0),
    )
    found = gemma_claim(path)
    assert found.verdict == verdict
    digests = {value.digest for _, value in found.evidence if value.digest}
    assert digests <= {record.digest for _, record in read_folder(path)}
    assert len(digests) == 4


def test_what_was_not_measured_is_said(folder: Folder, memory_record: Make) -> None:
    path = folder(
        memory_record("bitnet-1b", "ternary1.6", "ours", 200.0),
        memory_record("gemma-3-1b", "float16", "ours", 0.0, status="out_of_memory"),
    )
    found = gemma_claim(path)
    assert found.verdict == "not measured"
    # The other one ran out of memory, which the table shows.
    write_report(path, path)
    assert "out of memory" in (path / "report.md").read_text()


def test_lossless_is_held_to_the_published_figures(folder: Folder, make_record: Make) -> None:
    cell = {
        "implementation": "xla",
        "packing": "ternary2",
        "dtype": "float32",
        "embedding": "float32",
        "act_quant": "per_token",
        "model": "a",
    }
    limit = published()["lossless"]
    for factor, verdict in ((0.9, "holds"), (1.1, "does not hold")):
        metrics = {
            "kl_mean": limit["kl_mean"] * factor,
            "kl_p99": 1e-3,
            "kl_max": 1e-2,
            "top1_agreement": 0.995,
            "perplexity_ratio": 1.0,
            "positions": 100,
        }
        path = folder(make_record("lossless", "cpu", cell, metrics))
        (found,) = (v for claim, v in verdicts(path).items() if "lossless" in claim)
        assert found.verdict == verdict


class Page(HTMLParser):
    """Ids, links and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif tag in ("link", "img", "script", "iframe"):
            self.fetched += [v for k, v in attrs if k in ("src", "href") and v]


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(
    folder: Folder, make_record: Make, memory_record: Make
) -> None:
    records = [
        memory_record(model, weights, recipe, 100.0 + i)
        for i, model in enumerate(("bitnet-125m", "bitnet-1b"))
        for weights in ("ternary2", "ternary1.6")
        for recipe in ("seed", "ours", "smallest")
    ]
    records += [
        make_record(
            "biomed",
            "cpu",
            {"rank": rank, "targets": ["all"], "seed": seed, "model": "a model"},
            {"accuracy": 0.5 + 0.01 * seed, "questions": 33},
            figure={"x": "rank", "y": "accuracy", "series": "targets", "log": "x", "kind": "line"},
        )
        for rank in (4, 8)
        for seed in (0, 1, 2)
    ]
    path = folder(*records)
    written = write_report(path, path)
    assert {p.name for p in written} >= {"report.md", "report.html", "memory.svg", "rank.svg"}
    html = (path / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.fetched == []
    assert "url(http" not in html
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    inside = [link for link in page.links if link.startswith("#")]
    assert len(inside) > 20
    assert {link[1:] for link in inside} <= set(page.ids)
    for record in records:
        assert f'id="r-{record.digest}"' in html
        # Said once for a sweep, if it is the same but for the name.
        assert record.command.removesuffix(record.name).rstrip() in html
        assert f'id="r-{record.digest}"><summary>{record.name} (' in html
    # A figure of ours leads to its record in the Markdown too.
    text = (path / "report.md").read_text()
    lines = (path / "all.jsonl").read_text().splitlines()
    for shown, number in re.findall(r"\[(\d{3})\]\(all\.jsonl#L(\d+)\)", text):
        assert f'"peak_bytes":{int(shown) << 20}' in lines[int(number) - 1]
    assert (path / "figures" / "memory.svg").read_text().startswith("<svg")


def test_reports_of_equal_records_are_equal(folder: Folder, memory_record: Make) -> None:
    path = folder(memory_record("bitnet-125m", "ternary2", "ours", 100.0))
    write_report(path, path)
    first = (path / "report.html").read_bytes()
    write_report(path, path)
    assert (path / "report.html").read_bytes() == first


def test_intervals_are_students() -> None:
    # Three values 1, 2, 3: deviation 1, t(0.975, 2) = 4.303.
    assert math.isclose(interval([1.0, 2.0, 3.0]), 4.303 / math.sqrt(3), rel_tol=1e-4)
    assert interval([1.0]) == 0.0


def test_an_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no records" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_published_figures_are_those_of_the_claims() -> None:
    """The savings that are claimed follow from the tables as they are kept here."""
    vram = published()["vram_mib"]
    for small, large, claimed in (
        (("bitnet-1b", "ternary1.6"), ("gemma-3-1b", "float16"), 77.8),
        (("bitnet-1b", "ternary1.6"), ("qwen3-0.6b", "float16"), 65.6),
        (("bitnet-13b", "ternary1.6"), ("qwen3-4b", "int4"), 29.0),
    ):
        saving = 100 * (1 - vram[small[0]][small[1]] / vram[large[0]][large[1]])
        assert abs(saving - claimed) < 0.3


def variant_records(make_record: Make, numbers: dict[str, list[float]]) -> list[Record]:
    figure = {"x": "variant", "y": "bits", "series": "", "log": "", "kind": "bar", "baseline": "a"}
    return [
        make_record(
            "ablations.variants",
            "cpu",
            {"variant": variant, "seed": seed},
            {"bits": value, "packs": variant != "c", "source": f"of {variant}"},
            figure=figure,
            columns=["bits", "packs", "source"],
        )
        for variant, values in numbers.items()
        for seed, value in enumerate(values)
    ]


def table_row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_seeds_are_taken_together_and_differences_are_paired(
    folder: Folder, make_record: Make
) -> None:
    # Seeds move both by a whole bit; the difference is 0.1, 0.2 and 0.3.
    numbers = {"b": [2.1, 3.2, 4.3], "a": [2.0, 3.0, 4.0], "c": [1.0, 2.0, 3.0]}
    path = folder(*variant_records(make_record, numbers))
    write_report(path, path)
    text = (path / "report.md").read_text()
    # Deviation 1.1 of three values: 0.635; of the differences 0.1: 0.0577.
    found = table_row(text, "b")
    assert found == ["b", "3", "3.2 ± 0.6", "True", "of b", "+0.20 ± 0.06"]
    assert table_row(text, "a")[-1] == "–"
    assert table_row(text, "c")[-3:] == ["False", "of c", "-1 ± 0"]
    # Single runs have their names linked.
    order = re.findall(r"^\| ([abc]) \|", text, re.MULTILINE)
    assert order == ["c", "a", "b"]
    assert (path / "figures/ablations-variants.svg").read_text().count("</g>") > 10


def test_a_seed_without_a_partner_is_left_out_of_differences(
    folder: Folder, make_record: Make
) -> None:
    records = variant_records(make_record, {"a": [2.0, 3.0], "b": [2.5, 3.5, 9.0]})
    path = folder(*records)
    write_report(path, path)
    assert table_row((path / "report.md").read_text(), "b")[-1] == "+0.5 ± 0"


def test_a_metric_that_no_record_has_is_no_column(folder: Folder, make_record: Make) -> None:
    records = [
        make_record(
            "ablations.runs",
            "cpu",
            {"rank": rank, "seed": seed},
            {"accuracy": 0.5, "step_seconds": None},
            columns=["accuracy", "step_seconds"],
        )
        for rank in (4, 8)
        for seed in (0, 1)
    ]
    path = folder(*records)
    write_report(path, path)
    text = (path / "report.md").read_text()
    assert "| rank | seeds | accuracy |" in text
    assert "None" not in text


def test_rows_are_in_the_order_of_their_settings(folder: Folder, make_record: Make) -> None:
    records = [
        make_record("ablations.order", "cpu", {"name": name, "rows": rows}, {"loss": rows + 0.25})
        for name, rows in (("b", 1024), ("a", 8), ("b", 128), ("a", 16))
    ]
    path = folder(*records)
    write_report(path, path)
    rows = re.findall(r"^\| \[?(\w)\b.*?\| (\d+) \|", (path / "report.md").read_text(), re.M)
    assert rows == [("b", "128"), ("b", "1024"), ("a", "8"), ("a", "16")]


def test_a_path_that_another_setting_tells_is_no_column(folder: Folder, make_record: Make) -> None:
    cells = [{"model": "tiny", "text": "", "rows": rows} for rows in (1, 2)]
    cells += [{"model": "runs/model", "text": "runs/text.jsonl", "rows": rows} for rows in (1, 2)]
    path = folder(*(make_record("ablations.paths", "cpu", cell, {"loss": 1.5}) for cell in cells))
    write_report(path, path)
    text = (path / "report.md").read_text()
    assert "| model | rows | loss |" in text
    assert "runs/model" in text


def test_fine_tuning_in_equal_cells_is_told_and_decides_nothing(
    folder: Folder, make_record: Make
) -> None:
    cell = {"model": "bitnet-125m", "shape": "custom", "rows": 8, "length": 128, "packing": True}
    cell |= {"recipe": "fast"}
    speeds = {"cuda": 8000.0, "cpu": 100.0}
    records = [
        make_record(
            "finetune_throughput",
            platform,
            cell,
            {
                "real_tokens_per_second": speed,
                "positions_per_second": speed,
                "positions": 22 * 1024,
                "epoch_seconds": 22 * 1024 / speed,
                "epoch_steps": 22,
                "steps_run": 22,
                "step_seconds": 1024 / speed,
                "compile_seconds": 1.0,
                "roofline_seconds": 0.001,
            },
        )
        for platform, speed in speeds.items()
    ]
    path = folder(*records)
    write_report(path, path)
    text = (path / "report.md").read_text()
    assert "faster on a GPU than on the CPU: not measured" in text
    assert "80 to 80 times faster" in text


def test_what_records_of_a_sweep_share_is_said_once(folder: Folder, make_record: Make) -> None:
    cells = [{"rank": rank, "model": "the only model", "seed": 0} for rank in (4, 8)]
    path = folder(*(make_record("ablations.few", "cpu", cell, {"loss": 1.5}) for cell in cells))
    write_report(path, path)
    html = (path / "report.html").read_text()
    records = html[html.index('id="records"') :]
    assert records.count('"model":"the only model"') == 1
    assert 'cell: {"rank":4}' in records
    assert 'cell: {"rank":8}' in records


def test_a_gpu_is_held_against_its_own_host(folder: Folder, make_record: Make) -> None:
    cell = {"model": "bitnet-1b", "packing": "ternary2", "batch": 1}

    def record(experiment: str, platform: str, cpu: str, speed: float, **more: Any) -> Record:
        device = {"platform": platform, "kind": platform, "cpu": cpu, "cores": 2}
        metrics = {"decode_tokens_per_second": speed, "first_token_seconds": 0.1, "of_limit": 0.5}
        return make_record(experiment, platform, cell, metrics, device=device, **more)

    # The same cell on another machine's processor is no host of this GPU.
    path = folder(
        record("decode_throughput", "cuda", "its processor", 500.0),
        record("decode_throughput", "cpu", "another", 400.0),
        record("host_decode", "cpu", "its processor", 100.0),
        record("host_decode", "cpu", "another", 400.0, digest="0" * 16),
    )
    (found,) = (v for claim, v in verdicts(path).items() if "faster on a GPU" in claim)
    assert found.verdict == "holds under these conditions"
    assert [value.text for _, value in found.evidence] == ["500", "100"]
    assert any("5.0 to 5.0 times, cuda against its processor" in text for text in found.reasons)


def test_other_settings_than_the_published_ones_stand_apart(
    folder: Folder, memory_record: Make
) -> None:
    plain = {"rows": 1, "length": 128, "rank": 8}
    later = {"started": "2026-02-01T00:00:00+00:00"}
    long = plain | {"length": 1024}
    path = folder(
        memory_record("bitnet-1b", "ternary2", "ours", 500.0, settings=plain),
        memory_record("bitnet-1b", "ternary2", "ours", 900.0, settings=long, **later),
    )
    write_report(path, path)
    text = (path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| bitnet-1b | TQ2_0 |"))
    assert "[500]" in row
    assert "900" not in row
    # All the same the other one is in the table of all cells.
    assert "900 MiB" in text
    assert "In every cell: model=bitnet-1b weights=ternary2 recipe=ours rows=1 rank=8." in text


def test_a_plan_is_not_compared_with_a_measurement(folder: Folder, memory_record: Make) -> None:
    path = folder(
        memory_record("bitnet-1b", "ternary1.6", "ours", 200.0),
        memory_record("gemma-3-1b", "float16", "ours", 1000.0, kind="compiled"),
        memory_record("bitnet-1b", "ternary1.6", "seed", 300.0),
        memory_record("gemma-3-1b", "float16", "seed", 1000.0),
    )
    found = gemma_claim(path)
    assert found.verdict == "does not hold"
    assert any("run on cuda (A GPU): 70.0 to 70.0 %" in text for text in found.reasons)


def test_no_phone_was_measured(folder: Folder, memory_record: Make) -> None:
    path = folder(memory_record("bitnet-13b", "ternary2", "ours", 4000.0, kind="compiled"))
    (found,) = (v for claim, v in verdicts(path).items() if "phone's memory" in claim)
    assert found.verdict == "holds under these conditions"
    assert "1 of 1 are below 8 GB, compiled for cuda." in found.reasons


def test_links_lead_from_wherever_the_report_is(
    folder: Folder, memory_record: Make, tmp_path: Path
) -> None:
    path = folder(memory_record("bitnet-1b", "ternary2", "ours", 500.0))
    elsewhere = path.rename(tmp_path / "my (records)")
    out = tmp_path / "a" / "report"
    write_report(elsewhere, out)
    (place,) = set(re.findall(r"\]\(([^)#]+)#L1\)", (out / "report.md").read_text()))
    assert (out / unquote(place)).resolve() == (elsewhere / "all.jsonl").resolve()


def test_a_baseline_of_other_seeds_alone_is_no_difference(
    folder: Folder, make_record: Make
) -> None:
    records = variant_records(make_record, {"a": [2.0, 3.0], "b": [2.5, 3.5], "c": [1.0]})
    # Of the baseline one seed is left, which c has not.
    path = folder(*(record for record in records if record.cell != {"variant": "a", "seed": 0}))
    write_report(path, path)
    text = (path / "report.md").read_text()
    assert table_row(text, "b")[-1] == "+0.5"
    assert table_row(text, "c")[-1] == "–"


def test_names_have_no_logarithm(folder: Folder, make_record: Make) -> None:
    figure = {"x": "name", "y": "loss", "series": "", "log": "xy", "kind": "line", "baseline": ""}
    cells = ({"name": name} for name in ("a", "b"))
    made = (make_record("ablations.names", "cpu", c, {"loss": 1.5}, figure=figure) for c in cells)
    path = folder(*made)
    write_report(path, path)
    assert (path / "figures/ablations-names.svg").is_file()

"""The report in the repository is that of the records in the repository."""

import re
import shlex
from pathlib import Path

from fabric_jax.report.build import write_report
from fabric_jax.sweeps.identity import cell_digest
from fabric_jax.sweeps.records import read_folder
from fabric_jax.sweeps.runner import SweepOptions, plan

RECORDS = Path(__file__).resolve().parents[2] / "experiments/results/records"
AGAIN = "run `fabric-jax report experiments/results/records` and commit what it writes"


def test_the_report_is_made_from_the_records(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    for path in RECORDS.glob("*.jsonl"):
        (records / path.name).write_bytes(path.read_bytes())
    written = {str(path.relative_to(records)) for path in write_report(records, records)}
    committed = {
        str(path.relative_to(RECORDS)) for path in RECORDS.rglob("*") if path.suffix != ".jsonl"
    }
    assert written == committed - {"figures"}, AGAIN
    assert (records / "report.md").read_text() == (RECORDS / "report.md").read_text(), AGAIN
    # Outlines of letters depend on matplotlib's version; what is drawn is checked by name.
    pages = [(folder / "report.html").read_text() for folder in (records, RECORDS)]
    drawn = [re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL) for page in pages]
    assert drawn[0] == drawn[1], AGAIN


def test_no_file_is_large() -> None:
    for path in RECORDS.rglob("*"):
        assert path.stat().st_size < 1_000_000, path


def test_every_linked_figure_and_record_is_there() -> None:
    text = (RECORDS / "report.md").read_text()
    for place in set(re.findall(r"\]\(([^)#]+)(?:#L\d+)?\)", text)):
        assert (RECORDS / place).is_file(), place


def test_a_record_leads_to_the_command_that_makes_it_again(tmp_path: Path) -> None:
    places = read_folder(RECORDS)
    for where, record in places:
        assert cell_digest(record.experiment, record.platform, record.cell) == record.digest, where
    # All would take ten seconds.
    for where, record in places[::8]:
        words = shlex.split(record.command)
        assert words[:3] == ["fabric-jax", "sweep", f"experiments.{record.experiment}"]
        options = SweepOptions(
            experiment=words[2],
            platform=words[words.index("--platform") + 1],
            out=str(tmp_path),
            overrides=tuple(word for word in words if "=" in word),
        )
        assert [task.draft.digest for task in plan(options)[1]] == [record.digest], where

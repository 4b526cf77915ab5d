"""The charts in the repository are what the tables say."""

from pathlib import Path

from elastic_ep import charts

FOLDER = Path(__file__).parent.parent / "statecharts"


def test_charts_do_not_drift() -> None:
    assert {file.name: file.read_text() for file in FOLDER.iterdir()} == charts.rendered()


def test_charts_are_written(tmp_path: Path) -> None:
    charts.main(["--folder", str(tmp_path / "new")])
    assert {file.name: file.read_text() for file in (tmp_path / "new").iterdir()} == charts.rendered()


def test_the_readme_shows_the_chart_of_a_rank() -> None:
    chart = (FOLDER / "rank.mmd").read_text()
    assert f"```mermaid\n{chart}```\n" in (FOLDER.parent / "README.md").read_text()

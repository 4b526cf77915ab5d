"""The charts in the repository are what the tables say."""

from pathlib import Path

import pytest

from elastic_ep import charts

FOLDER = Path(__file__).parent.parent / "statecharts"


def test_charts_do_not_drift() -> None:
    assert charts.main(["--check", "--folder", str(FOLDER)]) == 0


def test_the_readme_shows_the_chart_of_a_rank() -> None:
    chart = (FOLDER / "rank.mmd").read_text()
    assert f"```mermaid\n{chart}```\n" in (FOLDER.parent / "README.md").read_text()


def test_a_changed_chart_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert charts.main(["--folder", str(tmp_path)]) == 0
    file = tmp_path / "rank.mmd"
    file.write_text(file.read_text().replace("Joining", "Joyning"))
    assert charts.main(["--check", "--folder", str(tmp_path)]) == 1
    assert "rank.mmd" in capsys.readouterr().err

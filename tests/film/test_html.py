"""A film is one file that needs nothing else and runs its own scripts alone; every log that can be read has one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from elastic_ep.event_log.log import EventLog
from elastic_ep.film.data import film
from elastic_ep.film.html import page
from elastic_ep.film.read import film_of
from elastic_ep.replay import DIFFERS, SAME, UNREADABLE, main
from tests.film.story import tell
from tests.test_replay import log as log  # a fixture


def test_it_needs_no_other_file_and_runs_its_own_scripts_alone() -> None:
    text = page(film({}, tell(1).lines[1:]), "a run")
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    scripts = re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL)
    assert [kind for kind, _ in scripts] == ["style", "style", "script", "script", "script"]
    for _, body in scripts:
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in policy[1]
    assert "unsafe" not in policy[1]


def test_what_a_log_says_never_becomes_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>&<!--"
    made = film({"version": evil, "started": evil}, [])
    text = page(made, evil)
    assert evil not in text
    assert "<img" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == made


def test_replay_writes_it(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "film.html"
    assert main([str(log.parent), "--html", str(file), "--quiet"]) == SAME
    assert "film of one loss" in capsys.readouterr().out
    assert "run: one loss" in file.read_text()
    assert main([str(log.parent), "--html", str(tmp_path / "no" / "film.html")]) == UNREADABLE
    assert "no film: " in capsys.readouterr().err


def test_of_a_cut_log_it_is_partial_and_says_so(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.write_bytes(log.read_bytes()[:-7])
    assert "cut off" in film_of(log)["partial"]
    assert main([str(log), "--html", str(tmp_path / "film.html"), "--quiet"]) == SAME
    assert "not whole: the log is cut off" in capsys.readouterr().err


def test_of_a_changed_log_it_goes_up_to_the_change(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    place = len(lines) - 2
    log.write_bytes(b"".join([*lines[:place], lines[place].replace(b"1", b"2", 1), *lines[place + 1 :]]))
    made = film_of(log)
    assert "checksum" in made["partial"]
    assert len(made["scenes"]) == 1
    assert main([str(log), "--html", str(tmp_path / "film.html"), "--quiet"]) == DIFFERS
    assert (tmp_path / "film.html").exists()


def test_of_an_old_log_or_none_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "events.jsonl").write_text('{"n":0,"t_ns":1,"run":{"format":1,"version":"0.0.1"},"crc":0}\n')
    for place, why in ((folder, ""), (tmp_path / "nothing", "No such file")):
        assert main([str(place), "--html", str(tmp_path / "film.html")]) != SAME
        said = capsys.readouterr().err
        assert said.startswith("no film: ")
        assert why in said
    assert not (tmp_path / "film.html").exists()


def test_files_that_were_over_before_are_not_read(tmp_path: Path) -> None:
    now_ns = 0
    events = EventLog(tmp_path / "run", max_bytes=0, clock_ns=lambda: now_ns)
    events.begin({"machines": {}})
    events.close()
    whole = (tmp_path / "run" / "events.jsonl").read_bytes()
    assert film_of(tmp_path / "run", since_ns=10**12)["scenes"] == []
    (tmp_path / "run" / "events.000001.jsonl").write_bytes(b"not a log, and not looked at\n")
    assert film_of(tmp_path / "run", since_ns=10**12)["scenes"] == []
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == whole

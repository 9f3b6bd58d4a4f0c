"""The wheel: what a user gets who installs harmony without a clone works from any folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("harmony", "experiments", "datasets", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since a build leaves files where it works."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", copy, copy]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (file,) = copy.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``installed(program, *words)`` runs a program of an environment with the wheel alone; dependencies are ours."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("HARMONY_")}

    def run(program, *words):
        words = [folder / "bin" / program, *words]
        return subprocess.run(words, cwd=elsewhere, env=clean, capture_output=True, text=True, timeout=300)

    return run


def test_a_wheel_holds_every_file(wheel):
    files = {path for path in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in path}
    expected = set()
    for folder, target in (
        ("harmony", "harmony"),
        ("experiments", "harmony/experiments"),
        ("datasets", "harmony/datasets"),
    ):
        paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
        expected |= {f"{target}/{path}" for path in paths if "__pycache__" not in path.parts}
    assert {path for path in expected - files if not path.endswith("README.md")} == set()
    assert files - expected == set()
    assert "harmony/apps/comfyui/README.md" in files, "how to install the nodes"


def test_commands_find_what_they_need(installed):
    """Console scripts, configurations, experiments, bundled data and weights, from a folder without any of them."""
    where = installed("python", "-c", "import harmony; print(harmony.__path__[0])").stdout.strip()
    assert where.endswith("site-packages/harmony")
    shown = installed("harmony-fit", "experiment=color_long", "--cfg", "job")
    assert shown.returncode == 0 and "max_steps: 2000" in shown.stdout, shown.stderr
    assert "table1" in installed("harmony-evaluate", "--help").stdout
    for command in ("prepare", "harmonize", "edit", "export", "bench", "browse", "demo", "doctor"):
        result = installed(f"harmony-{command}", "--help")
        assert result.returncode == 0 and "Usage:" in result.stdout, (command, result.stderr)


def test_a_picture_is_made_with_the_shipped_weights(installed, tmp_path):
    """``evaluate`` on the bundled renders: dataset, backbone and ControlNet are those of the wheel."""
    words = ["limit=2", "steps=1", "logger=none", f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}"]
    result = installed("harmony-evaluate", *words)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs" / "evaluate").iterdir()
    assert "test/pasted/bg_drift" in json.loads((run / "metrics.json").read_text())

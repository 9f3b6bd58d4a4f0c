"""``make paper`` in the order in which it would run; nothing is run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def planned(folder: Path) -> list[str]:
    """The commands that ``make paper`` would run in ``folder``."""
    done = subprocess.run(["make", "-n", "paper"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "-m harmony." in line and "doctor" not in line]


@pytest.fixture
def checkout(tmp_path):
    """As much of a checkout as make looks at."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "constraints.txt", tmp_path / ".ci")
    return tmp_path


def test_structure_is_trained_beside_the_colour_of_this_study(checkout):
    """Guards the order: every training is exported, structure begins behind color's export, studies come last."""
    lines = planned(checkout)
    kinds = [line.split("-m harmony.")[1].split()[0] for line in lines]
    assert kinds == ["fit", "export"] * 5 + ["evaluate"] * 6
    (beside,) = (n for n, line in enumerate(lines) if "module.companion=work/paper/color_long" in line)
    exported = next(n for n, line in enumerate(lines) if "output=work/paper/color_long.partial" in line)
    assert exported < beside and "experiment=structure_long" in lines[beside]
    assert all("controlnets.structure=work/paper/structure_long" in line for line in lines if "evaluate" in line)


def test_what_is_there_is_not_made_again(checkout):
    """Guards resumption: a training whose export failed is exported, not trained; a finished study stays."""
    paper = checkout / "work" / "paper"
    paper.mkdir(parents=True)
    for name in ("color_long", "structure_long", "raw_long", "color_relight", "paint_by_example"):
        (paper / f"{name}.fitted").touch()
        if name != "raw_long":
            (paper / name).mkdir()
    (paper / "table1.done").touch()
    lines = planned(checkout)
    assert not any("harmony.fit" in line for line in lines)
    assert [line for line in lines if "export" in line] == [line for line in lines if "raw_long.partial" in line]

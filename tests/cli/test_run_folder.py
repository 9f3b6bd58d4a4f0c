"""Run folders: whose they are, and that nobody works in another one's."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harmony.cli import run_folder as folders
from harmony.cli.run_folder import make_folder, remove_made, run_folder
from harmony.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """``configuration(**more)``: that of a run called ``mine``."""
    monkeypatch.setattr(folders, "held", {})
    monkeypatch.delenv("HARMONY_RUN_DIR", raising=False)
    return lambda **more: OmegaConf.create(
        {"name": "mine", "resume": True, "paths": {"runs": str(tmp_path), "run": None}, **more}
    )


OTHER = """
import os, sys, time
from omegaconf import OmegaConf
from harmony.cli.run_folder import run_folder
cfg = {"name": "mine", "resume": True, "paths": {"runs": sys.argv[1], "run": None}}
print(run_folder(OmegaConf.create(cfg)), flush=True)
if os.fork():
    sys.stdin.read()
else:
    time.sleep(60)  # a worker that outlives the command
"""


def test_a_run_belongs_to_one_process(configuration, tmp_path):
    """Guards a second terminal: the same command is refused while the first runs, and goes on when it was killed."""
    words = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        folder = Path(other.stdout.readline().strip())
        with pytest.raises(UserError, match=f"another process works in {folder}: wait for its end, or begin anew"):
            run_folder(configuration())
        fresh = run_folder(configuration(resume=False))
        assert fresh != folder and len(list((tmp_path / "mine").iterdir())) == 2
        other.kill()
    (fresh / "metrics.json").write_text("{}")
    assert run_folder(configuration()) == folder == run_folder(configuration()), "twice in one process is no conflict"


def test_a_refused_command_leaves_no_folder(configuration, tmp_path, monkeypatch):
    """Guards ``runs/``: what a command made and wrote nothing into goes again, with the folders above it; nothing that
    was there before, that holds results, or that another run is in.
    """
    monkeypatch.setattr(folders, "made", [])
    runs = tmp_path / "new" / "runs"
    refused = run_folder(configuration(paths={"runs": str(runs), "run": None}))
    (refused / "checkpoints").mkdir()
    remove_made()
    assert not runs.parent.exists() and not folders.held
    refused = run_folder(configuration(paths={"runs": str(runs), "run": None}))
    beside = runs / "mine" / "of another process"
    beside.mkdir()
    remove_made()
    assert list((runs / "mine").iterdir()) == [beside]
    beside.rmdir()
    kept = run_folder(configuration(paths={"runs": str(runs), "run": None}))
    (kept / "metrics.csv").write_text("step,name,value\n")
    make_folder(tmp_path / "there")
    folders.made.clear()
    make_folder(tmp_path / "there")
    remove_made()
    assert kept.exists() and (tmp_path / "there").exists()


def test_only_a_run_of_the_experiment_is_resumed(configuration, tmp_path):
    """Guards other folders: nothing in them is overwritten."""
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="there is no such run folder"):
        run_folder(configuration(resume=str(tmp_path / "photos")))
    theirs = run_folder(configuration(name="theirs"))
    before = (theirs / "config.yaml").read_text()
    with pytest.raises(UserError, match="is a run of theirs, not of mine: give one of <paths.runs>/mine"):
        run_folder(configuration(resume=str(theirs)))
    assert (theirs / "config.yaml").read_text() == before and not any((tmp_path / "photos").iterdir())
    mine = run_folder(configuration())
    assert run_folder(configuration(resume=str(mine))) == mine

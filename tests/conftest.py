"""Fixtures of all tests: the environment is offline and single-threaded, and nothing is written into the checkout."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
# set before torch or a library of Hugging Face is imported, for these tests and the processes they start
os.environ.update(
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    FIFTYONE_DO_NOT_TRACK="1",
    OMP_NUM_THREADS="1",
)
sys.path.insert(0, str(ROOT))  # so that the tests see this checkout whatever is installed


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread where torch is in use already: a test never waits for the threads of another."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries write by themselves goes to a folder of the test; what a run left in the environment goes away."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path_factory.getbasetemp()))
    for name in ("HARMONY_RUN_DIR", "HARMONY_EXPERIMENTS", "HARMONY_DATASETS"):
        monkeypatch.setenv(name, "")  # registers the variable, so that what a test sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Overrides that keep caches and runs of an entry point inside ``tmp_path``."""
    return [f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the photographs that lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not here")
    return SHARED_DATA

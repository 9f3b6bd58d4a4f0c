"""SIGTERM, Ctrl-C and SIGKILL in everything that takes its time: all is gone soon, and the same command goes on.

``pytest -rP tests/test_kill_matrix.py`` shows a row for each: moment, signal, processes below, seconds, exit code.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from harmony.models.shipped import ASSETS

ROOT = Path(__file__).resolve().parents[1]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
WITHIN = {signal.SIGTERM: 10, signal.SIGINT: 10, signal.SIGKILL: 50}  # seconds from the signal until nothing is left;
# FiftyOne's web server, which nobody can end after a SIGKILL, waits 30 s for its database
pytestmark = pytest.mark.slow


class Command:
    """A command in a session of its own, its lines, and the processes below it."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]):
        mine = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        mine |= {"FIFTYONE_DATABASE_DIR": str(folder / "db"), "WANDB_DIR": str(folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        where = {"env": {**os.environ, **mine, **environment}, "cwd": folder, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, "-m", *words], **pipes, **where)
        self.lines, self.folder = [], folder
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def below(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def runs(self, word: str) -> bool:
        """Whether a process below has ``word`` in its command line."""
        for process in self.below():
            try:
                if any(word in part for part in process.cmdline()):
                    return True
            except psutil.Error:
                continue
        return False

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)

    def wait_until(self, reached: Callable[["Command"], bool], seconds: float = 500) -> None:
        until = time.monotonic() + seconds
        while not reached(self):
            assert self.process.poll() is None and time.monotonic() < until, "".join(self.lines[-40:])
            time.sleep(0.05)

    def stop(self, number: int) -> tuple[int, float]:
        """Exit code, and seconds until the command and all below it are gone. A terminal signals the whole group."""
        below, began = self.below(), time.monotonic()
        os.killpg(self.process.pid, number) if number == signal.SIGINT else os.kill(self.process.pid, number)
        self.process.wait(30)
        while left := [process for process in below if is_running(process)]:
            assert time.monotonic() < began + 60, left
            time.sleep(0.05)
        return self.process.returncode, time.monotonic() - began

    def kill(self) -> None:
        """After a test, whatever came of it."""
        for process in (*self.below(), psutil.Process(self.process.pid)) if self.process.poll() is None else ():
            process.kill()
        self.process.wait()


def says(pattern: str) -> Callable[[Command], bool]:
    return lambda command: command.said(pattern)


def is_running(process: psutil.Process) -> bool:
    """Not so when it is dead and waits for init to notice, which may take a while."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Moment:
    """``words`` are stopped when ``reached``; the same words then get to ``again``, or to the end where it is None."""

    words: str
    reached: Callable[[Command], bool]
    again: Callable[[Command], bool] | None = None
    never: str | None = None  # what the second go does not say, because the first has done it
    environment: dict[str, str] = field(default_factory=dict)
    prepared: bool = True  # whether the studio set is prepared
    database: bool = False  # whether it starts FiftyOne's
    later: float = 0  # seconds after ``reached``
    before: str | None = None  # words of a command that runs to its end first


MINI = "dataset=open_images dataset.dir={mini} paths.work=work"
RUN = "paths.work=work paths.runs=runs logger=none evaluate=null trainer.accelerator=cpu"
FIT = f"harmony.fit experiment=color {RUN} "
SHORT = "trainer.max_steps=40 checkpoint_every=5 trainer.log_every_n_steps=1 callbacks.speed.every=1 data.batch_size=4"
STUDY = "harmony.evaluate experiment=table1 paths.work=work paths.runs=runs logger=none limit=2 steps=2"
MOMENTS = {
    "database starts": Moment(
        f"harmony.prepare {MINI}",
        lambda c: c.runs("--51-service"),
        says("look at the pixels"),
        prepared=False,
        database=True,
    ),
    "import": Moment(
        f"harmony.prepare {MINI}",
        says("import into FiftyOne"),
        says("look at the pixels"),
        prepared=False,
        database=True,
    ),
    "fit prepares": Moment(
        FIT + "dataset=open_images dataset.dir={mini}",
        says("import into FiftyOne"),
        says("look at the pixels"),
        prepared=False,
        database=True,
    ),
    "captions": Moment(
        f"harmony.prepare {MINI} dataset.captions.given=false dataset.captions.captioner={{captioner}}",
        says("captions: shard 2/"),
        prepared=False,
        database=True,
    ),
    "browsing": Moment(
        "harmony.browse dataset=open_images port=5197",
        says("Ctrl-C ends it"),
        says("Ctrl-C ends it"),
        prepared=False,
        database=True,
        before=f"harmony.prepare {MINI} dataset.select.max_samples=3",
    ),
    "rendering": Moment(
        "harmony.prepare dataset=editing dataset.count=64 paths.work=work",
        lambda c: any("_" not in file.stem for file in Path(c.folder, "work").rglob("images/*.jpg")),  # a scene's last
        says(r"editing: 8/\d"),
        never="8/64",  # what is rendered stays
        prepared=False,
    ),
    "latents": Moment(FIT + SHORT, says("latents.*: shard 1/"), says("step 1/"), never="latents: shard 1/"),
    "compile": Moment(
        FIT + SHORT + " module.compile=true", lambda c: c.runs("cc1plus"), lambda c: c.runs("cc1plus"), never="shard 1/"
    ),
    "training": Moment(FIT + SHORT, says("step 7/"), None, never="step 1/"),
    "training, two ranks": Moment(FIT + SHORT + " trainer=ddp2", says("step 7/"), None, never="step 1/"),
    "a rank waits": Moment(
        FIT + SHORT + " trainer.num_nodes=2 trainer.strategy=ddp",
        says("Initializing distributed|MEMBER: 1/2"),
        says("Initializing distributed|MEMBER: 1/2"),
        environment={"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"},
        later=3,
    ),
    "a study waits": Moment(
        STUDY, says("waiting for"), says("waiting for"), never="pictures,", environment={"WORLD_SIZE": "2", "RANK": "0"}
    ),
    "harmonize": Moment(
        "harmony.harmonize composite={photo} mask={mask} prompt=x detail=none steps=999 paths.runs=runs",
        says("^(backbone|prompt) "),
        says("^(backbone|prompt) "),
        prepared=False,
        later=5,
    ),
}


def skip_beside_another_database() -> None:
    """Preparation is refused while another program of this user runs a database, which FiftyOne would join."""
    if any("--51-service" in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
        pytest.skip("FiftyOne would join the database that another program of this user runs")


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Path:
    """A work folder in which the studio set is prepared."""
    skip_beside_another_database()
    folder = tmp_path_factory.mktemp("studio")
    command = Command(["harmony.prepare", "dataset=studio", "paths.work=work"], folder, {})
    assert command.process.wait(300) == 0, "".join(command.lines)
    return folder / "work"


def files(shared_data: Path, folder: Path) -> dict[str, str]:
    """Photographs for the commands that want some."""
    import numpy as np
    from PIL import Image

    mini = shared_data / "openimages-mini"
    photo = sorted((mini / "test" / "data").glob("*.jpg"))[0]
    width, height = Image.open(photo).size
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : height // 2, width // 3 : width // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    captioner = shutil.copytree(ASSETS / "tiny" / "captioner", folder / "captioner")  # as if it knew photographs
    config = json.loads((captioner / "config.json").read_text())
    (captioner / "config.json").write_text(json.dumps(config | {"photographs": True}))
    return {"mini": str(mini), "photo": str(photo), "mask": str(folder / "mask.png"), "captioner": str(captioner)}


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("name", MOMENTS)
def test_it_ends_and_goes_on(name, number, tmp_path, shared_data, request):
    moment = MOMENTS[name]
    if name == "rendering":
        pytest.importorskip("mitsuba")
    if moment.database:
        skip_beside_another_database()
    if moment.prepared:
        shutil.copytree(request.getfixturevalue("studio"), tmp_path / "work")
    places = files(shared_data, tmp_path)
    if moment.before:
        before = Command(moment.before.format(**places).split(), tmp_path, moment.environment)
        assert before.process.wait(300) == 0, "".join(before.lines[-40:])
    words = moment.words.format(**places).split()
    first = Command(words, tmp_path, moment.environment)
    try:
        first.wait_until(moment.reached)
        time.sleep(moment.later)
        processes = len(first.below())
        code, seconds = first.stop(number)
    finally:
        first.kill()
    text = "".join(first.lines)
    second = Command(words, tmp_path, moment.environment)
    try:
        if moment.again is None:
            assert second.process.wait(500) == 0, "".join(second.lines[-40:])
        else:
            second.wait_until(moment.again)
    finally:
        second.kill()
    print(f"| {name} | {number.name} | {processes} | {seconds:.1f} s | {code} |")
    assert code == CODES[number] and seconds < WITHIN[number], text[-3000:]
    assert text.count("interrupted; the same command resumes") == (number != signal.SIGKILL), text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    assert not (moment.never and second.said(moment.never)), "".join(second.lines)

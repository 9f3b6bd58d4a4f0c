"""Guards the way out: SIGTERM and Ctrl-C end a command within seconds whatever it is doing; nothing stays behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from harmony.cli.command import INTERRUPTED, entry
from harmony.core import signals
from harmony.core.signals import worker_pool

ROOT = Path(__file__).resolve().parents[2]
TOY = """
import multiprocessing, os, signal, sqlite3, subprocess, sys, threading, time
from pathlib import Path
from harmony.cli.command import entry
from harmony.core import signals

STUBBORN = ["sh", "-c", "trap '' TERM INT; sleep 300 & echo ready $$ $!; wait"]

def ready(*pids):
    print("ready", *pids, flush=True)

def nothing():
    ready()
    time.sleep(300)

def in_c():
    database = sqlite3.connect(":memory:")
    ready()
    database.execute("with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n")

def swallows(begin=ready):
    while True:
        try:
            begin()
            time.sleep(300)
        except BaseException:
            begin = int

def finishes():
    try:
        ready()
        time.sleep(300)
    except KeyboardInterrupt:
        print("all done")

def breaks():
    try:
        ready()
        time.sleep(300)
    finally:
        raise ZeroDivisionError

def child():
    subprocess.run(STUBBORN)

def stuck_child():
    swallows(lambda: subprocess.run(STUBBORN))

def thread():
    threading.Thread(target=time.sleep, args=(300,)).start()
    nothing()

def full_pipe():
    ready()
    while True:
        os.write(2, b"x" * 4096)

def fork():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
    process.start()
    process.terminate()
    process.join()
    ready(*[os.getpid()] * (process.exitcode == -signal.SIGTERM))
    time.sleep(300)

def pool(then=lambda workers: workers.map(time.sleep, [300] * 2)):
    with signals.worker_pool(2) as workers:
        ready(*workers.map(pid, range(2), chunksize=1))
        then(workers)

def stuck_pool():
    pool(lambda workers: swallows(int))

def pid(n):
    time.sleep(0.3)  # so that each has one
    return os.getpid()

@entry("toy", config_dir=Path(__file__).parent)
def main(cfg):
    globals()[cfg.what]()

if __name__ == "__main__":
    signals.GRACE = float(os.environ.get("GRACE", 1))
    signals.ECHO = 0.2
    main()
"""
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def start(tmp_path):
    """``start(what)``: a command that does ``what``, when it has begun, and the pids that it tells."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text("what: nothing\n")
    began = []

    def begin(what, **environment):
        words = [sys.executable, str(tmp_path / "toy.py"), f"what={what}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, env=environment, start_new_session=True, **pipes)
        began.append(process)
        word, *pids = process.stdout.readline().split() or [process.stderr.read()]
        assert word == "ready", word
        return process, [psutil.Process(int(pid)) for pid in pids]

    yield begin
    for process in began:
        end(process)


def end(process: subprocess.Popen) -> None:
    """What is left of it after a failed test."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def leave(process: subprocess.Popen, within: float = 10) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def is_running(process: psutil.Process) -> bool:
    """Not so when it is dead and waits for init to notice, which may take a while."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process], within: float = 10) -> bool:
    until = time.monotonic() + within
    while left := any(map(is_running, processes)):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return not left


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("what", ["nothing", "in_c", "swallows"])
def test_a_command_ends_whatever_it_is_doing(start, what, number):
    """Asleep, in C code that hears of no signal, and where somebody catches everything."""
    process, _ = start(what)
    process.send_signal(number)
    assert leave(process) == (CODES[number], "", f"{INTERRUPTED}\n")


@pytest.mark.parametrize("what", ["finishes", "breaks", "thread"])
def test_what_the_command_makes_of_it_does_not_matter(start, what):
    """It ended as if nothing had happened, by another error, or a thread of it goes on."""
    process, _ = start(what)
    process.terminate()
    code, _, err = leave(process)
    assert (code, err) == (143, f"{INTERRUPTED}\n")


@pytest.mark.parametrize(("what", "grace"), [("child", 5), ("stuck_child", 1), ("pool", 5), ("stuck_pool", 1)])
def test_children_end_with_the_command(start, what, grace):
    """Those that ignore the signal and their own children, whether or not the command leaves by itself."""
    process, children = start(what, GRACE=str(grace))
    assert len(children) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert leave(process) == (130, "", f"{INTERRUPTED}\n"), "children say nothing"
    assert gone(children)


def test_workers_end_with_a_command_that_is_killed(start):
    process, workers = start("pool")
    process.kill()
    assert gone(workers) and len(workers) == 2


def test_a_second_signal_ends_it_at_once(start):
    process, _ = start("swallows", GRACE="300")
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    for _ in range(20):  # until one is heard so late that it is no echo of the first: the machine may be busy
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            break
    assert leave(process) == (143, "", f"{INTERRUPTED}\n")


def test_a_terminal_that_does_not_read_holds_nobody_up(start):
    process, _ = start("full_pipe")
    time.sleep(0.5)
    process.terminate()
    assert process.wait(10) == 143


def test_the_first_rank_alone_speaks(start):
    process, _ = start("swallows", RANK="1")
    process.terminate()
    assert leave(process) == (143, "", "")


def test_a_signal_of_a_forked_child_is_its_own(start):
    """The pipe and the handlers would be the parent's too."""
    process, ended_by_it = start("fork")
    assert ended_by_it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)


def test_an_ignored_signal_stays_ignored(start):
    """``nohup`` and shells in the background want it so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process, _ = start("nothing")
    signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(task)``: a command in this process, called by a function; its exit code."""
    (tmp_path / "toy.yaml").write_text("what: nothing\n")
    monkeypatch.setattr(sys, "argv", ["toy"])

    def run(task):
        try:
            entry("toy", config_dir=tmp_path)(task)()
        except SystemExit as left:
            return left.code
        return 0

    return run


def state() -> tuple:
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return (
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        wakeup,
        [os.environ.get(name) for name in (signals.PARENT, signals.WARNINGS)],
    )


def test_a_caller_goes_on_as_before(command, monkeypatch):
    """A command that is called as a function leaves nothing behind, signal or not, and its caller is not ended."""
    monkeypatch.setattr(signals, "GRACE", 0.3)
    monkeypatch.setattr(signals, "ECHO", 0.1)
    before, during = state(), []

    def task(cfg):
        during.append(state())

    def stopped(cfg):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(300)

    assert command(task) == 0 and state() == before and during[0] != before
    assert command(stopped) == 143 and state() == before
    time.sleep(0.6)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_nothing_is_installed_elsewhere(command, tmp_path):
    """Neither in another thread, nor for a call with a configuration."""
    before, during = state(), []

    def task(cfg):
        during.append(threading.current_thread() is threading.main_thread() and state())

    thread = threading.Thread(target=command, args=(task,))
    thread.start()
    thread.join()
    entry("toy", config_dir=tmp_path)(task)(OmegaConf.create())
    assert during == [False, before]


def test_a_pool_works():
    with worker_pool(1) as pool:
        assert pool.apply(os.getppid) == os.getpid()
    assert not multiprocessing.active_children()


@pytest.fixture
def prepares(tmp_path):
    """``fit`` on a machine whose FiftyOne takes for ever: the command, and the process in which it prepares."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "fiftyone.py").write_text(
        "import os, time\nprint('preparing in', os.getpid(), flush=True)\ntime.sleep(300)\n"
    )
    path = os.pathsep.join([str(tmp_path / "trap"), str(ROOT)])
    words = [sys.executable, "-m", "harmony.fit", f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(words, env=environment, cwd=tmp_path, start_new_session=True, **pipes)
    line = next((line for line in process.stdout if line.startswith("preparing in")), "")
    assert line, process.stderr.read()
    yield process, psutil.Process(int(line.split()[-1]))
    end(process)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_who_prepares_ends_with_the_command(prepares, number):
    """It stayed for ever with a database, and held the lock that the same command needs."""
    process, worker = prepares
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    assert gone([worker])
    code, _, err = leave(process)
    assert code in (-number, CODES.get(number)) and "Traceback" not in err

"""SIGTERM and Ctrl-C end a command within seconds whatever it is doing, and its children end with it.

Python runs a signal's handler between two steps of the main thread, and never while that thread waits in C: for another
rank, for a compiler, for a backward pass. So there are two ways out. The handler raises ``Interrupt``, and the program
leaves by itself, as after any error. A second thread hears of the signal at once, by the pipe that Python's C code
writes to; where the program has not left after ``GRACE`` seconds, it kills what the program has started and ends it.
"""

import atexit
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker, util
from multiprocessing.pool import Pool
from pathlib import Path
from types import FrameType

GRACE = 5.0  # seconds in which a program may leave by itself
ECHO = 1.0  # a signal so soon after the first is the same one: a launcher passes on what its whole group has had
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PARENT = "HARMONY_PARENT"  # the command that started this one
# multiprocessing's helper removes the semaphores that a killed program leaves, and need not tell the user of them.
QUIET = ("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
# Helpers that tidy up and end when the last process that uses them is gone: FiftyOne's database (which others may use
# too), and the lists of what multiprocessing and torch have to remove from shared memory.
HELPERS = (b"--51-service", b"multiprocessing.resource_tracker", b"torch_shm_manager")
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


class Interrupt(KeyboardInterrupt):
    """A signal told the command to end; ``code`` is the exit code that says so."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


class Watch:
    """Handlers of a command's signals, and the thread that ends the process where they cannot."""

    def __init__(self, line: str):
        self.line, self.number, self.raised, self.released = line, None, False, False
        self.pipe, self.pipe_in = os.pipe()
        os.set_blocking(self.pipe_in, False)
        self.wakeup = signal.set_wakeup_fd(self.pipe_in, warn_on_full_buffer=False)
        own = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup wants it
        self.handlers = {number: signal.signal(number, self.handle) for number in own}
        threading.Thread(target=self.watch, name="signals", daemon=True).start()

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if not self.raised:  # once: what is tidied up after it is not interrupted again
            self.raised = True
            raise Interrupt(self.number)

    def release(self) -> None:
        """Back to what was before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        self.released = True
        os.close(self.pipe_in)

    def heard(self, until: float | None) -> int | None:
        """The next of our signals; None when ``until`` has passed or after ``release``."""
        while select.select([self.pipe], [], [], until and max(0, until - time.monotonic()))[0]:
            word = os.read(self.pipe, 1)
            if not word or word[0] in SIGNALS:
                return word[0] if word else None
        return None

    def watch(self) -> None:
        first = self.heard(until=None)
        if first is not None:
            self.number = self.number or first
            began = time.monotonic()
            while self.heard(began + ECHO):
                continue
            self.heard(began + GRACE)
            if not self.released:
                self.end()
        os.close(self.pipe)

    def leave(self) -> None:
        """The last thing that a program does after a signal: what an interpreter takes apart may take its time."""
        with suppress(OSError, ValueError):  # nobody reads, or closed
            sys.stdout.flush()
        kill_descendants()
        util._exit_function()  # of multiprocessing: its semaphores outlive the process
        self.end()

    def end(self) -> None:
        """End the process and what it has started, now."""
        kill_descendants()
        if self.line and select.select([], [2], [], 0)[1]:  # a full pipe would make us wait
            os.write(2, f"{self.line}\n".encode())
        os._exit(128 + self.number)


current: Watch | None = None


@contextmanager
def obey(line: str, program: bool) -> Iterator[None]:
    """While a command runs: SIGTERM and SIGINT end it, by ``Interrupt`` or after ``GRACE`` seconds by force.

    Whatever the command made of the signal, raised something else or even finished, what leaves here is ``Interrupt``.
    ``line`` is said on standard error where force was needed. A ``program`` has to end after it, and force waits until
    it has; otherwise the caller goes on. In another thread than the main one nothing is installed.
    """
    global current
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: os.environ.get(name) for name in (PARENT, QUIET[0])}
    if before[PARENT] == str(os.getppid()):
        end_with(os.getppid())
    os.environ[PARENT] = str(os.getpid())
    os.environ[QUIET[0]] = ",".join(filter(None, [before[QUIET[0]], QUIET[1]]))
    prctl(SET_CHILD_SUBREAPER, 1)  # the children of a child that is gone are ours to end
    watch = current = Watch(line)
    atexit.register(watch.leave)  # before what the command registers, so it comes after
    try:
        yield
    finally:
        if watch.number is None or not program:
            watch.release()
            current = None
            prctl(SET_CHILD_SUBREAPER, 0)
            atexit.unregister(watch.leave)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        if watch.number is not None:
            watch.line = ""  # who gets this says it
            raise Interrupt(watch.number) from None


# A forked child has the pipe and the handlers too: what it is told would end its parent. Until it has let go of them
# it is told nothing.
fork = threading.local()


def before_fork() -> None:
    fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, fork.mask)


def after_fork_in_child() -> None:
    if current is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent decides
    after_fork()


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)


# Children -----------------------------------------------------------------------------------------------------------


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started here never hear of Ctrl-C, which a terminal sends to all: their parent decides."""
    resource_tracker.ensure_running()  # which comes with the first child and would let the signal in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited by a new program
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_pool(number: int) -> Pool:
    """``number`` fresh processes that leave Ctrl-C to this one and end with it."""
    with deaf_children():
        return multiprocessing.get_context("spawn").Pool(number, end_with, (os.getpid(),))


def end_with(parent: int) -> None:
    """Called in a child: it is killed when ``parent`` (on Linux the thread that started the child) ends in any way."""
    prctl(SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def prctl(option: int, value: int) -> None:
    """A setting of this process that Linux alone knows."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Processes below this one that still run, parents first, without ``HELPERS``."""
    children = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state != b"Z" and not any(word in (folder / "cmdline").read_bytes() for word in HELPERS):
                children[int(parent)].append(int(folder.name))
        except (OSError, ValueError):  # gone meanwhile
            continue
    below = children[os.getpid()]
    for pid in below:
        below += children[pid]
    return below


def kill_descendants() -> None:
    """Kill all that this process has started, and what that has started."""
    for _ in range(20):  # what a child started just before its end comes to us only then
        pids = descendants()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not pids:
            return
        time.sleep(0.05)

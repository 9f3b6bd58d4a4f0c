"""SIGTERM and Ctrl-C end a command and its child processes within seconds, whatever the command is doing.

Python runs a signal handler only between two bytecodes of the main thread, not while that thread waits in C code: for
another rank, a compiler or a backward pass. So a command can end in two ways. The handler raises ``Interrupt``, and the
program exits as after any error. A second thread reads the signal from the pipe that Python's C code writes to; if the
program has not exited after ``GRACE`` seconds, that thread kills the child processes and then the program.
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

GRACE = 5.0  # seconds that a program has to exit by itself
ECHO = 1.0  # seconds: a second signal within this time is the same one, which a launcher passed on to its children
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PARENT = "HARMONY_PARENT"  # environment variable: process id of the command that started this one
# The resource tracker of multiprocessing removes the semaphores of a killed program; this hides its warning.
WARNINGS, QUIET_TRACKER = "PYTHONWARNINGS", "ignore:resource_tracker:UserWarning"
# Helper processes that clean up and exit after the last process that uses them: FiftyOne's database (which other
# programs may use too, unlike its web server) and the trackers of shared memory of multiprocessing and torch.
HELPERS = (b"--51-service\0db", b"multiprocessing.resource_tracker", b"torch_shm_manager")
SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


class Interrupt(KeyboardInterrupt):
    """Raised when a signal ends the command; ``code`` is the exit code for that signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


class Watch:
    """The signal handlers of a command, and the thread that ends the process if the handlers cannot."""

    def __init__(self, line: str):
        self.line, self.number, self.is_raised, self.is_released = line, None, False, False
        self.pipe, self.pipe_in = os.pipe()
        os.set_blocking(self.pipe_in, False)
        self.wakeup = signal.set_wakeup_fd(self.pipe_in, warn_on_full_buffer=False)
        numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores some
        self.handlers = {number: signal.signal(number, self.handle) for number in numbers}
        threading.Thread(target=self.watch, name="signals", daemon=True).start()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise ``Interrupt`` for the first signal."""
        self.number = self.number or number
        if not self.is_raised:  # once, so that the cleanup after it is not interrupted
            self.is_raised = True
            raise Interrupt(self.number)

    def release(self) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        self.is_released = True
        os.close(self.pipe_in)

    def wait_for_signal(self, deadline: float | None) -> int | None:
        """Return the next signal of ``SIGNALS``; None after ``deadline`` or ``release``."""
        while select.select([self.pipe], [], [], deadline and max(0, deadline - time.monotonic()))[0]:
            word = os.read(self.pipe, 1)
            if not word or word[0] in SIGNALS:
                return word[0] if word else None
        return None

    def watch(self) -> None:
        """Wait for the first signal, give the program ``GRACE`` seconds, then end it (in a thread)."""
        number = self.wait_for_signal(deadline=None)
        if number is not None:
            self.number = self.number or number
            start = time.monotonic()
            while self.wait_for_signal(start + ECHO):
                continue
            self.wait_for_signal(start + GRACE)
            if not self.is_released:
                self.end()
        os.close(self.pipe)

    def leave(self) -> None:
        """End the program after a signal without the interpreter's own shutdown, which may take long."""
        with suppress(OSError, ValueError):  # no reader, or a closed stream
            sys.stdout.flush()
        kill_descendants()
        util._exit_function()  # of multiprocessing: otherwise its semaphores outlive the process
        self.end()

    def end(self) -> None:
        """Kill the process and its children immediately."""
        kill_descendants()
        if self.line and select.select([], [2], [], 0)[1]:  # writing to a full pipe would block
            os.write(2, f"{self.line}\n".encode())
        os._exit(128 + self.number)


current_watch: Watch | None = None


@contextmanager
def obey(line: str, program: bool) -> Iterator[None]:
    """Within this block SIGTERM and SIGINT end the command, by ``Interrupt`` or by force after ``GRACE`` seconds.

    After a signal the block always raises ``Interrupt``, even if the command raised another error or finished. ``line``
    is written to standard error if force was needed. With ``program`` the process must exit after the block, and is
    still ended by force if it does not; otherwise the caller continues. Outside the main thread this does nothing.
    """
    global current_watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    environment = {name: os.environ.get(name) for name in (PARENT, WARNINGS)}
    if environment[PARENT] == str(os.getppid()):
        end_with(os.getppid())
    os.environ[PARENT] = str(os.getpid())
    os.environ[WARNINGS] = ",".join(filter(None, [environment[WARNINGS], QUIET_TRACKER]))
    prctl(SET_CHILD_SUBREAPER, 1)  # so that children of a dead child become children of this process
    watch = current_watch = Watch(line)
    atexit.register(watch.leave)  # registered before the command's own functions, so it runs after them
    try:
        yield
    finally:
        if watch.number is None or not program:
            watch.release()
            current_watch = None
            prctl(SET_CHILD_SUBREAPER, 0)
            atexit.unregister(watch.leave)
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        if watch.number is not None:
            watch.line = ""  # the caller prints the line
            raise Interrupt(watch.number) from None


# A forked child inherits the pipe and the handlers, so a signal to it would end its parent. Signals are blocked until
# the child has removed them.
fork_state = threading.local()


def before_fork() -> None:
    fork_state.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, fork_state.mask)


def after_fork_in_child() -> None:
    if current_watch is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes: the parent decides
    after_fork()


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)


# Children -----------------------------------------------------------------------------------------------------------


@contextmanager
def ignore_ctrl_c_in_children() -> Iterator[None]:
    """Processes started within this block ignore Ctrl-C, which a terminal sends to all: their parent ends them."""
    resource_tracker.ensure_running()  # it starts with the first child and would unblock the signal
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a new program inherits the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def worker_pool(count: int) -> Pool:
    """A pool of ``count`` new processes that ignore Ctrl-C and end with this process."""
    with ignore_ctrl_c_in_children():
        return multiprocessing.get_context("spawn").Pool(count, end_with, (os.getpid(),))


def end_with(parent: int) -> None:
    """Let the system kill this child process when ``parent`` ends (on Linux: the thread that started the child)."""
    prctl(SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def prctl(option: int, value: int) -> None:
    """Change a Linux setting of this process; does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Ids of the running child processes, and theirs, parents first and without ``HELPERS``."""
    children = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state != b"Z" and not any(word in (folder / "cmdline").read_bytes() for word in HELPERS):
                children[int(parent)].append(int(folder.name))
        except (OSError, ValueError):  # the process has ended in the meantime
            continue
    pids = children[os.getpid()]
    for pid in pids:
        pids += children[pid]
    return pids


def kill_descendants() -> None:
    """Kill all child processes and their children."""
    for _ in range(20):  # a process that a child started just before its end shows up one round later
        pids = descendants()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not pids:
            return
        time.sleep(0.05)

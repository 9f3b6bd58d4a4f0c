"""Run folders ``<paths.runs>/<name>/<timestamp>``: a new one, or the unfinished one of the same configuration."""

import fcntl
import os
import time
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from harmony.cli.compose import load_yaml
from harmony.core.errors import UserError
from harmony.core.files import list_missing, remove_unused, write_text
from harmony.core.foreign import is_file_name

held: dict[Path, int] = {}  # run folders of this process, with the handle of each lock
made: list[list[Path]] = []  # folders that this process has made to write into, each with those above that it made
WAIT_SECONDS = 60  # how long a rank that was started from outside waits for rank 0 to make the run folder


def rank() -> int:
    """Rank of this process among those that train together, before any process group exists."""
    return int(next((os.environ[k] for k in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if os.environ.get(k)), 0))


def world() -> int:
    """How many processes torchrun or srun started."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def device() -> str:
    """The GPU of this process where there is one."""
    import torch

    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def identity(cfg: DictConfig) -> str:
    """The resolved configuration as YAML, without what differs between two goes of one run."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.paths.run = None
        cfg.pop("resume", None)
    return OmegaConf.to_yaml(cfg, resolve=True, sort_keys=True)


def unfinished(folder: Path, text: str) -> Path | None:
    """The newest run in ``folder`` of the configuration ``text`` that has no final ``metrics.json``."""
    wanted = text.encode()
    files = (path for path in folder.glob("*/config.yaml") if path.is_file())
    runs = (path.parent for path in files if path.read_bytes() == wanted)
    return max((run for run in runs if not (run / "metrics.json").exists()), default=None)


def hold(folder: Path) -> None:
    """Keep a run folder for this process until it ends. UserError where another process works in it."""
    if folder in held:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another process works in {folder}: wait for its end, or begin anew with resume=false"
        ) from None
    except OSError:  # a file system without locks
        os.close(handle)
        return
    held[folder] = handle


def let_go() -> None:
    """In a forked child: the lock ends with the command, not with a worker that outlives it."""
    for handle in held.values():
        os.close(handle)
    held.clear()


os.register_at_fork(after_in_child=let_go)


def remove_made() -> None:
    """Remove the folders that this process has made, where a refused command has written nothing into them."""
    for folders in made:
        remove_unused(folders, "config.yaml")
        for folder in folders[:1]:
            if folder in held and not folder.exists():
                os.close(held.pop(folder))
    made.clear()


def new_folder(parent: Path) -> Path:
    """``parent/<timestamp>``; runs that begin in the same second get a number."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}_{i:02d}" for i in range(1, 100))):
        folder = parent / name
        missing = list_missing(folder)
        try:
            folder.mkdir(parents=True)
            made.append(missing)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"{parent} holds 100 runs of this very second; wait and start again")


def run_folder(cfg: DictConfig) -> Path:
    """The folder of this run, ``<paths.runs>/<name>/<timestamp>``, absolute; also set as ``cfg.paths.run``.

    With ``resume: true`` the newest unfinished run of the same configuration goes on, with ``false`` a new one begins,
    with a path that folder is used. Rank 0 decides and writes ``config.yaml``; processes that it starts read
    HARMONY_RUN_DIR, processes started from outside (torchrun, SLURM) wait for the folder of their configuration.
    """
    text, resume = identity(cfg), cfg.get("resume", True)
    if not is_file_name(str(cfg.name or "unnamed")):
        raise UserError(f"name={str(cfg.name)[:100]}: give a name for a folder below paths.runs, without a path")
    parent = Path(cfg.paths.runs).resolve() / str(cfg.name or "unnamed")
    if rank() > 0:
        folder = follow_rank_zero(parent, text, resume)
    elif isinstance(resume, str):
        folder = Path(resume).resolve()
        refuse_other_run(folder, str(cfg.name or "unnamed"))
    else:
        folder = (unfinished(parent, text) if resume else None) or new_folder(parent)
    if rank() == 0:
        hold(folder)
        write_text(folder / "config.yaml", text)
        os.environ["HARMONY_RUN_DIR"] = str(folder)
    with open_dict(cfg):
        cfg.paths.run = str(folder)
    return folder


def refuse_other_run(folder: Path, name: str) -> None:
    """UserError unless ``folder`` is a run folder of the experiment ``name``."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={folder}: there is no such run folder")
    if (other := load_yaml(folder / "config.yaml").get("name")) != name:
        raise UserError(f"resume={folder} is a run of {other}, not of {name}: give one of <paths.runs>/{name}")


def follow_rank_zero(parent: Path, text: str, resume: bool | str) -> Path:
    """The run folder that rank 0 chose."""
    if os.environ.get("HARMONY_RUN_DIR"):
        return Path(os.environ["HARMONY_RUN_DIR"])
    if isinstance(resume, str):
        return Path(resume).resolve()
    if not resume:
        raise UserError("resume=false with processes started from outside needs the same HARMONY_RUN_DIR in each")
    for _ in range(WAIT_SECONDS * 10):
        folder = unfinished(parent, text)
        if folder:
            return folder
        time.sleep(0.1)
    raise UserError(f"rank {rank()} waited {WAIT_SECONDS} s for rank 0 to make a run folder in {parent}; is it shared?")


def make_folder(path: str | Path) -> Path:
    """The folder ``path``, absolute, made if need be. Raises UserError where it cannot be."""
    folder = Path(path).resolve()
    missing = list_missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder") from None
    made.append(missing)
    return folder

"""What a run depended on: versions, commit, device, command, for ``provenance.json``."""

import functools
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harmony.core.files import PACKAGE

LIBRARIES = ("torch", "torchvision", "lightning", "diffusers", "transformers", "hydra-core", "numpy", "polars")


def version(distribution: str) -> str | None:
    """Installed version of a distribution, None when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(root: Path = PACKAGE.parent) -> dict[str, Any]:
    """``commit`` and ``dirty`` of the checkout that the package lies in; nothing when it is installed elsewhere."""
    if not (root / ".git").exists():
        return {}
    try:
        ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
        commit = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
        return {"commit": commit, "dirty": bool(ask(["git", "status", "--porcelain"]).stdout.strip())}
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return {}


def device_name() -> str:
    """The accelerator that PyTorch sees, else the CPU's architecture and the number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def provenance(cfg: DictConfig, **extra: Any) -> dict[str, Any]:
    """What a run depended on, for ``provenance.json``; ``extra`` adds backbone hash, manifest hash, wall time."""
    return {
        "name": cfg.get("name"),
        "command": sys.argv,
        "seed": cfg.get("seed"),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "versions": {"harmony": version("harmony-diffusion"), **{name: version(name) for name in LIBRARIES}},
        "git": git_state(),
        **extra,
    }

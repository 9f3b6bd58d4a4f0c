"""The experiment logger of a command."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

# W&B's own switch, which comes before logger.offline: its values, and what they mean for it.
OFFLINE = {"offline": True, "dryrun": True, "online": False, "run": False}


def build_logger(cfg: DictConfig) -> "Logger":
    """The logger of the configuration, which knows the whole configuration.

    W&B is told to be quiet where it is offline: everything it says is in the run folder. With WANDB_MODE=disabled
    nothing is logged and no folder is written.
    """
    if not cfg.logger._target_.endswith("WandbLogger"):
        return instantiate(cfg.logger)
    mode = os.environ.get("WANDB_MODE", "")
    if mode == "disabled":
        return instantiate({"_target_": "lightning.pytorch.loggers.logger.DummyLogger"})
    options: dict[str, Any] = {"offline": OFFLINE.get(mode, cfg.logger.offline)}
    if options["offline"]:
        os.environ.setdefault("WANDB_SILENT", "true")
    logger = instantiate(cfg.logger, **options)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and W&B warns of it
    logger.log_hyperparams({"config": OmegaConf.to_container(cfg, resolve=True)})
    return logger


def log_page(logger: "Logger | None", page: Path) -> None:
    """Show the page of a run in W&B, where that is the logger."""
    if type(logger).__name__ == "WandbLogger":  # a dummy has every method
        import wandb

        logger.experiment.log({"report": wandb.Html(str(page), inject=False)})

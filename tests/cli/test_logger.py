"""The logger of a command: W&B's own switches hold."""

import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf

from harmony.cli.compose import CONFIGS, load_yaml
from harmony.cli.logger import build_logger


@pytest.fixture
def configuration(tmp_path):
    logger = load_yaml(CONFIGS / "logger" / "wandb.yaml")
    return OmegaConf.create({"name": "x", "paths": {"run": str(tmp_path)}, "seed": 3, "logger": logger})


def test_disabled_writes_nothing(configuration, tmp_path, monkeypatch):
    """Guards W&B's own switch: with WANDB_MODE=disabled there is no logger and no folder."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = build_logger(configuration)
    logger.log_metrics({"a": 1})
    assert isinstance(logger, DummyLogger) and not any(tmp_path.iterdir())


def test_a_run_knows_its_configuration(configuration, tmp_path, monkeypatch, capfd):
    """Guards what W&B shows of a run: all options, resolved; and it is quiet where it is offline."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = build_logger(configuration)
    config = dict(logger.experiment.config)["config"]
    logger.experiment.finish()
    assert config["seed"] == 3 and config["logger"]["save_dir"] == str(tmp_path)
    assert "wandb" not in "".join(capfd.readouterr())

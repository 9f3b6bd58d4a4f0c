"""The logger of a command: W&B's own switches hold."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from harmony.cli.compose import CONFIGS, compose, load_yaml
from harmony.cli.logger import Artifact, build_logger, log_artifacts, log_samples

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configuration(tmp_path):
    logger = load_yaml(CONFIGS / "logger" / "wandb.yaml")
    logger.update({"project": "p", "entity": None, "name": None, "group": "x", "tags": ["mine"]})
    folder = tmp_path / "x" / "2026-01-01_00-00-00"
    facts = {"name": "x", "paths": {"run": str(folder)}, "seed": 3, "module": {"lr": 0.1}, "logger": logger}
    return OmegaConf.create(facts | {"dataset": {"name": "studio"}, "model": {"path": "/somewhere/tiny"}})


def test_disabled_writes_nothing(configuration, tmp_path, monkeypatch):
    """Guards W&B's own switch: with WANDB_MODE=disabled there is no logger and no folder."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = build_logger(configuration, "fit")
    logger.log_metrics({"a": 1})
    log_samples(logger, [("a", {})], {})
    log_artifacts(logger, [Artifact("a", "dataset", {})], [])
    assert isinstance(logger, DummyLogger) and not any(tmp_path.iterdir())


def test_a_run_knows_its_configuration(configuration, tmp_path, monkeypatch, capfd):
    """Guards what W&B shows of a run: all options, resolved; and it is quiet where it is offline."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = build_logger(configuration, "fit")
    config, run = dict(logger.experiment.config), logger.experiment
    run.finish()
    assert config["seed"] == 3 and config["module"] == {"lr": 0.1}, "nested, as it was given"
    assert (run.name, run.group, run.job_type) == ("x/2026-01-01_00-00-00", "x", "fit")
    assert run.tags == ("studio", "tiny", "mine")
    assert "wandb" not in "".join(capfd.readouterr())
    again = build_logger(configuration, "fit")
    assert again.experiment.id == run.id, "what goes on is one run"
    again.experiment.finish()


def test_names_of_the_environment(monkeypatch):
    """Guards W&B's own variables: project, entity, name and group come from them where they are set."""
    own = {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g"}
    for name in own:
        monkeypatch.delenv(name, raising=False)
    plain = compose("fit", ["experiment=color", "name=color"]).logger
    assert (plain.project, plain.entity, plain.name, plain.group) == ("harmony", None, None, "color")
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    named = compose("fit", ["experiment=color", "name=color"]).logger
    assert (named.project, named.entity, named.name, named.group) == ("p", "e", "n", "g")


def test_artifacts_and_their_lineage(configuration, tmp_path, wandb_records):
    """Guards lineage offline: what was used is marked so; weights stay in place, all else is kept in the run folder."""
    files = {name: tmp_path / name for name in ("manifest.jsonl", "export/config.json", "export/net/w.safetensors")}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    logger = build_logger(configuration, "fit")
    folder = Path(configuration.paths.run)
    manifest = {"manifest.jsonl": files["manifest.jsonl"]}
    used = [Artifact("a set/1", "dataset", manifest, {"rows": 3})]
    log_artifacts(logger, used, [Artifact("net", "model", {"": tmp_path / "export"}, aliases=["best"])])
    files["manifest.jsonl"].write_text("another preparation")
    logger.experiment.finish()
    assert "WANDB_DATA_DIR" not in os.environ
    data, model = [r.artifact for r in wandb_records(folder) if r.WhichOneof("record_type") == "artifact"]
    assert (data.name, data.type, data.use_after_commit, data.metadata) == ("a-set-1", "dataset", True, '{"rows":3}')
    (copy,) = (Path(c.local_path) for c in data.manifest.contents)
    assert copy.is_relative_to(folder) and copy.read_text() == "manifest.jsonl"
    assert (model.name, model.type, model.use_after_commit) == ("net", "model", False)
    assert set(model.aliases) == {"latest", "best"}
    places = {c.path: Path(c.local_path) for c in model.manifest.contents}
    assert set(places) == {"config.json", "net/w.safetensors"}
    assert (
        places["net/w.safetensors"] == files["export/net/w.safetensors"]
        and places["config.json"] != files["export/config.json"]
    )


def test_the_table_of_pictures(configuration, wandb_records):
    """Guards what joins runs: a row a picture with its id; pictures where there are some, figures for all."""
    picture = np.full((4, 4, 3), 7, np.uint8)
    samples = {
        "a: a cat": {"id": "a", "caption": "a cat", "ours/fpsnr": 20.0},
        "b: a dog": {"id": "b", "caption": "a dog", "ours/fpsnr": 10},
    }
    logger = build_logger(configuration, "evaluate")
    log_samples(logger, [("b: a dog", {"input": picture, "ours": picture})], samples)
    logger.experiment.finish()
    folder = Path(configuration.paths.run)
    (file,) = folder.rglob("pictures_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["id", "caption", "input", "ours", "ours/fpsnr"]
    assert table["data"][0] == ["a", "a cat", None, None, 20.0]
    assert table["data"][1][:2] == ["b", "a dog"] and None not in table["data"][1]
    (stored,) = [r.artifact for r in wandb_records(folder) if r.WhichOneof("record_type") == "artifact"]
    (place,) = [c.local_path for c in stored.manifest.contents if c.path.endswith(".png")]
    assert Path(place).is_relative_to(folder) and np.array_equal(np.asarray(Image.open(place)), picture)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sweep_is_a_command(path, monkeypatch):
    """Guards the files of sweeps: what W&B's agent makes of one is a command of ours, for the ends of each range."""
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"]["name"].startswith("test/pasted/")
    for end in (0, -1):
        choices = {name: [p["min"], p["max"]] if "min" in p else p["values"] for name, p in sweep["parameters"].items()}
        given = {"args": {name: {"value": values[end]} for name, values in choices.items()}}
        macros = create_sweep_command_args(given) | {
            "env": ["env"],
            "interpreter": ["python"],
            "program": [sweep["program"]],
        }
        words = [w for part in create_sweep_command(list(sweep["command"])) for w in macros.get(part[2:-1], [part])]
        assert words[:4] == ["env", "python", "-m", sweep["program"]]
        cfg = compose(sweep["program"].removeprefix("harmony."), words[4:])
        assert cfg.logger.offline is False
        for name, values in choices.items():
            assert OmegaConf.select(cfg, name) == values[end]

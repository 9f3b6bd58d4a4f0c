"""The logger of a command: W&B's own switches hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from harmony.cli.artifacts import (
    ASSETS,
    Artifact,
    manifest_artifact,
    model_artifact,
    name_network,
    to_name,
)
from harmony.cli.compose import CONFIGS, compose, load_yaml
from harmony.cli.logger import (
    PROJECT,
    as_one_line,
    build_logger,
    check_wandb,
    log_artifacts,
    log_pictures,
    to_wandb,
)
from harmony.cli.run_folder import identity
from harmony.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def configuration(tmp_path):
    logger = load_yaml(CONFIGS / "logger" / "wandb.yaml")
    logger.tags = ["mine"]
    folder = tmp_path / "x" / "2026-01-01_00-00-00"
    facts = {"name": "x", "paths": {"run": str(folder)}, "seed": 3, "module": {"lr": 0.1}, "logger": logger}
    return OmegaConf.create(facts | {"dataset": {"name": "studio"}, "model": {"path": "/somewhere/tiny"}})


def test_disabled_writes_nothing(configuration, tmp_path, monkeypatch):
    """Guards W&B's own switch: with WANDB_MODE=disabled there is no logger and no folder."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = build_logger(configuration, "fit")
    logger.log_metrics({"a": 1})
    log_pictures(logger, {"a": {}}, {})
    log_artifacts(logger, [Artifact("a", "manifest", {})], [])
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


def list_options(configuration) -> dict:
    """What W&B is begun with."""
    logger = build_logger(configuration, "fit")
    logger.experiment.finish()
    return logger._wandb_init


def test_names_of_the_environment(configuration, monkeypatch):
    """Guards W&B's own variables: they set what the configuration leaves open, and are no part of a run's identity."""
    own = {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_RUN_GROUP": "g", "WANDB_JOB_TYPE": "j"}
    plain = list_options(configuration)
    assert [plain[key] for key in ("project", "entity", "group", "job_type")] == ["harmony", None, "x", "fit"]
    text = identity(compose("fit", ["experiment=color", "name=color"]))
    for name, value in (own | {"WANDB_TAGS": "theirs, mine,,"}).items():
        monkeypatch.setenv(name, value)
    options = list_options(configuration)
    assert [options[key] for key in ("project", "entity", "name", "group", "job_type")] == [*"pengj"]
    assert options["tags"] == ["studio", "tiny", "mine", "theirs"]
    configuration.logger.project = "q"
    assert list_options(configuration)["project"] == "q", "what is written comes first"
    assert identity(compose("fit", ["experiment=color", "name=color"])) == text


@pytest.mark.parametrize("identifier", ["abc123", "my-run-7"])
def test_a_run_keeps_its_id(identifier, configuration, monkeypatch):
    """Guards resuming: what goes on in a run folder is one run, also under an id of the user's."""
    monkeypatch.setenv("WANDB_RUN_ID", identifier)
    build_logger(configuration, "fit").experiment.finish()
    monkeypatch.delenv("WANDB_RUN_ID")
    again = build_logger(configuration, "fit").experiment
    again.finish()
    assert again.id == identifier


def test_what_wandb_refuses_is_said_before_the_work(configuration, tmp_path, monkeypatch):
    """Guards hours of work: no key or a mode that W&B does not know is one line, at once."""
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline: choose one of offline, dryrun, online"):
        check_wandb(configuration)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(configuration)
    environment = {key: value for key, value in os.environ.items() if key not in ("WANDB_MODE", "WANDB_API_KEY")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}  # no key of the user's
    words = ["harmony.evaluate", "logger.offline=false", f"paths.runs={tmp_path / 'runs'}"]
    run = subprocess.run([sys.executable, "-m", *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and not (tmp_path / "runs").exists()
    assert run.stderr.count("\n") == 1 and "run `wandb login`, or leave out logger.offline=false" in run.stderr


def test_what_wandb_refuses_at_the_end_costs_nothing(capsys):
    """Guards finished runs: an error of W&B is a line."""
    with as_one_line():
        raise ValueError("Artifact name may only contain\nthis")
    with as_one_line():
        raise AssertionError  # without a word
    assert "W&B did not take everything (ValueError: Artifact name may only contain this)" in capsys.readouterr().out


def read_artifacts(records) -> dict:
    """(kind, name) -> artifact, of the records of a run."""
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    return {(artifact.type, artifact.name): artifact for artifact in artifacts}


def test_artifacts_and_their_lineage(configuration, tmp_path, wandb_records):
    """Guards lineage offline: inputs are marked so; weights stay in place, all else is kept in the run folder."""
    run = tmp_path / "runs" / "color" / "now"
    files = [run / "export" / "controlnet" / name for name in ("config.json", "net.safetensors", "README.md")]
    for path in (manifest := tmp_path / "manifest.jsonl", *files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (run / "config.yaml").write_text("name: color\nmodel: {path: /somewhere/sd2}\n")
    logger, folder = build_logger(configuration, "fit"), Path(configuration.paths.run)
    model = model_artifact(run / "export" / "controlnet", {"step": 3}, ["best"])
    log_artifacts(logger, [manifest_artifact("a set/1", manifest)], [model])
    manifest.write_text("another preparation")
    logger.experiment.finish()
    assert "WANDB_DATA_DIR" not in os.environ
    artifacts = read_artifacts(wandb_records(folder))
    (data,) = (artifact for (kind, _), artifact in artifacts.items() if kind == "manifest")
    assert data.name.startswith("a-set-1-") and data.name.endswith("-manifest") and data.use_after_commit
    (copy,) = (Path(content.local_path) for content in data.manifest.contents)
    assert copy.is_relative_to(folder) and copy.read_text() == "manifest.jsonl"
    net = artifacts[("model", "color-sd2-model")]
    assert not net.use_after_commit and set(net.aliases) == {"latest", "best"} and net.metadata == '{"step":3}'
    places = {content.path: Path(content.local_path) for content in net.manifest.contents}
    assert set(places) == {"config.json", "net.safetensors"}, "no card, which may change later"
    assert places["net.safetensors"] == files[1] and places["config.json"].is_relative_to(folder)


def test_names_of_networks(tmp_path):
    """Guards lineage: two networks never share a name by chance."""
    assert name_network(ASSETS / "color" / "controlnet") == "shipped-color"
    run = tmp_path / "joint" / "now"
    for name in ("color", "structure"):
        (run / "export" / name / "controlnet").mkdir(parents=True)
    (run / "config.yaml").write_text("name: joint\nmodel: {path: tiny}\n")
    assert name_network(run / "export" / "color" / "controlnet") == "joint-color-tiny"
    assert name_network(run / "export" / "structure" / "controlnet") == "joint-structure-tiny"
    assert name_network(tmp_path / "mine" / "controlnet") == "mine"


@pytest.mark.parametrize("name", ["studio", "größe 1", "", "x" * 200, "a/b", "-model"])
def test_every_name_is_taken(name, wandb_records):
    """Guards finished runs: W&B takes ASCII of 128 characters, and each name for one kind alone."""
    names = [to_name(name, kind) for kind in ("manifest", "latents", "model")]
    assert len(set(names)) == 3 and all(len(each) <= 128 for each in names)
    for each in names:
        to_wandb(Artifact(name, each.rpartition("-")[2], {}))
    assert to_name(name, "model") != to_name(f"{name}!", "model")


def test_the_table_of_pictures(configuration, wandb_records):
    """Guards what joins runs: a row a picture with its id; pictures where there are some, figures for all."""
    picture = np.full((4, 4, 3), 7, np.uint8)
    samples = {"a": {"caption": "a cat", "ours/fpsnr": 20.0}, "b": {"caption": "a dog", "ours/fpsnr": 10}}
    logger = build_logger(configuration, "evaluate")
    log_pictures(logger, {"b": {"input": picture, "ours": picture}}, samples)
    logger.experiment.finish()
    folder = Path(configuration.paths.run)
    (file,) = folder.rglob("pictures_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["id", "caption", "input", "ours", "ours/fpsnr"]
    assert table["data"][0] == ["a", "a cat", None, None, 20.0]
    assert table["data"][1][:2] == ["b", "a dog"] and None not in table["data"][1]
    (stored,) = read_artifacts(wandb_records(folder)).values()
    (place,) = [content.local_path for content in stored.manifest.contents if content.path.endswith(".png")]
    assert Path(place).is_relative_to(folder) and np.array_equal(np.asarray(Image.open(place)), picture)


def make_command(path: Path, end: int) -> tuple[list[str], dict]:
    """What W&B's agent makes of a sweep, and the value of each parameter: at one end of its range."""
    sweep = yaml.safe_load(path.read_text())
    ranges = {name: [p["min"], p["max"]] if "min" in p else p["values"] for name, p in sweep["parameters"].items()}
    values = {name: choices[end] for name, choices in ranges.items()}
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep["program"]]}
    words = [word for part in create_sweep_command(list(sweep["command"])) for word in macros.get(part[2:-1], [part])]
    return words, values


SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_a_command(path):
    """Guards the files of sweeps: a command of ours at both ends of each range, and the test split has no say."""
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"]["name"].startswith("validation/pasted/") and sweep["project"] == PROJECT
    for end in (0, -1):
        (env, interpreter, option, program, *words), values = make_command(path, end)
        assert [env, interpreter, option, program] == ["/usr/bin/env", sys.executable, "-m", sweep["program"]]
        cfg = compose(program.removeprefix("harmony."), words)
        assert {name: OmegaConf.select(cfg, name) for name in values} == values


def test_a_sweep_runs_offline(tmp_path, prepared_work, wandb_records):
    """Guards sweeps: the very command runs where W&B is offline, under the id that the agent gives it."""
    (path,) = (path for path in SWEEPS if path.stem == "guidance")
    words, values = make_command(path, 0)
    small = [f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}", "limit=2", "steps=1"]
    prepared_work(tmp_path / "work", [], "evaluate")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_RUN_ID": "from-agent", "PYTHONPATH": str(ROOT)}
    subprocess.run([*words, *small], check=True, env=environment, cwd=ROOT, capture_output=True)
    (folder,) = (tmp_path / "runs" / "evaluate").iterdir()
    records = wandb_records(folder)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    keys = {item.key or "/".join(item.nested_key) for r in records for item in r.history.item}
    assert run.run_id == "from-agent" and "validation/pasted/fpsnr" in keys
    assert ("model", "shipped-color-model") in read_artifacts(records)

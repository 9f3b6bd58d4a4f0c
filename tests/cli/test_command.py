"""Commands as a person types them: composition, help, errors in one line, run folders that go on."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from harmony.cli import run_folder as run_folder_module
from harmony.cli.command import entry, literal, quote_names
from harmony.cli.compose import CONFIGS, compose
from harmony.cli.explain import check_experiment, parameters, refuse_missing
from harmony.cli.provenance import provenance
from harmony.cli.run_folder import run_folder
from harmony.core.errors import UserError
from harmony.core.files import write_json

ROOT = Path(__file__).resolve().parents[2]
PRIMARY = """
defaults:
  - trainer: one
  - dataset: null
  - _self_
  - experiment: null

seed: 0  # of everything that is drawn
name: run
resume: true
sizes: {small: 1}
open: {}
paths: {work: work, runs: runs, run: null}
logger: {save_dir: "${paths.run}"}
"""
TRAINER = """
_target_: fractions.Fraction
numerator: 1
max_steps: 1
devices: {devices}
"""
COLOR = """# @package _global_
# Colour alone
defaults: [override /trainer: two]
seed: 7
name: color
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A small set of configurations, with experiments and a dataset beside it; the current folder is elsewhere."""
    for name, text in {
        "configs/fit.yaml": PRIMARY,
        "configs/trainer/one.yaml": TRAINER.format(devices=1),
        "configs/trainer/two.yaml": TRAINER.format(devices=2),
        "experiments/color.yaml": COLOR,
        "experiments/long.yaml": "# Longer\ndefaults: [color, _self_]\ntrainer: {max_steps: 9}\n",
        "datasets/mini/recipe.yaml": "# Small\ndir: here\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HARMONY_EXPERIMENTS", str(tmp_path / "experiments"))
    monkeypatch.setenv("HARMONY_DATASETS", str(tmp_path / "datasets"))
    return tmp_path


@pytest.fixture
def command(house, monkeypatch, capsys):
    """Runs a toy entry point with a command line: exit code, what the task saw, standard output, standard error."""

    def run(*arguments, task=lambda cfg: None):
        seen = []

        @entry("fit", config_dir=house / "configs")
        def main(cfg):
            seen.append(cfg)
            task(cfg)

        monkeypatch.setattr(sys, "argv", ["harmony-fit", *arguments])
        try:
            main()
            code = 0
        except SystemExit as leave:
            code = leave.code or 0
        printed = capsys.readouterr()
        return code, seen, printed.out, printed.err

    return run


def experiment(house, text, name="odd"):
    (house / "experiments" / f"{name}.yaml").write_text(text)


# Composition ----------------------------------------------------------------------------------------------------------


def test_experiments_and_datasets_are_found_from_anywhere(command, house):
    code, (cfg,), _, _ = command("experiment=color", "dataset=mini", "trainer.max_steps=3")
    assert code == 0
    assert (cfg.seed, cfg.name, cfg.trainer.devices, cfg.trainer.max_steps, cfg.dataset.dir) == (
        7,
        "color",
        2,
        3,
        "here",
    )
    assert not list((house / "elsewhere").iterdir()), "Hydra wrote files of its own"


def test_an_experiment_starts_from_another(command):
    _, (cfg,), _, _ = command("experiment=long")
    assert (cfg.seed, cfg.trainer.devices, cfg.trainer.max_steps) == (7, 2, 9)


def test_the_environment_variable_comes_before_the_current_folder(house):
    here = Path.cwd() / "experiments"
    here.mkdir()
    (here / "color.yaml").write_text("seed: 1\n")
    (here / "mine.yaml").write_text("seed: 2\n")
    seeds = [compose("fit", [f"experiment={name}"], house / "configs").seed for name in ("color", "mine")]
    assert seeds == [7, 2]


def test_a_file_in_place_of_ours_is_said(command, house, monkeypatch):
    """Guards the current folder: its experiments and datasets win, also those that another starts from, with a line."""
    monkeypatch.delenv("HARMONY_EXPERIMENTS")
    monkeypatch.delenv("HARMONY_DATASETS")
    monkeypatch.setattr("harmony.cli.compose.bundled", lambda folder: house / folder)
    assert command("experiment=long", "dataset=mini")[2] == ""
    for name, text in {"experiments/color.yaml": COLOR, "datasets/mini/recipe.yaml": "dir: there\n"}.items():
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text)
    here = house / "elsewhere"
    expected = f"dataset=mini is that of {here}/datasets/mini/recipe.yaml, not harmony's own\n"
    assert command("experiment=long", "dataset=mini")[2] == expected, "the same text says the same"
    Path("experiments/color.yaml").write_text("seed: 8\n")
    expected = f"experiment=color is that of {here}/experiments/color.yaml, not harmony's own\n"
    code, (cfg,), out, _ = command("experiment=long")
    assert (code, cfg.seed, out) == (0, 8, expected)


def test_calling_main_with_a_configuration_just_runs_it(house):
    @entry("fit", config_dir=house / "configs")
    def main(cfg):
        return cfg.seed

    assert main(OmegaConf.create({"seed": 3})) == 3


def test_cfg_job_prints_and_does_not_run(command):
    code, seen, out, _ = command("experiment=color", "--cfg", "job")
    assert (code, seen) == (0, []) and OmegaConf.create(out).seed == 7


def test_help_is_for_people(command):
    code, seen, out, _ = command("--help")
    assert (code, seen) == (0, [])
    for words in (
        "one*  two",
        "color                Colour alone",
        "long",
        "mini",
        "of everything that is drawn",
        "--multirun",
    ):
        assert words in out
    assert "defaults:" not in out and "@package" not in out


def test_multirun(command):
    code, seen, _, _ = command("--multirun", "seed=1,2,3")
    assert code == 0 and [cfg.seed for cfg in seen] == [1, 2, 3]


def test_a_ddp_child_is_started_with_more_overrides(command):
    """What Lightning appends to the command line of the processes that it starts."""
    code, (cfg,), _, _ = command(
        "experiment=color", 'hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"
    )
    assert code == 0 and cfg.seed == 7


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.max_stepz=3"], "unknown key trainer.max_stepz; did you mean trainer.max_steps?"),
        (["sed=3"], "unknown key sed; did you mean seed?"),
        (["experimnt=color"], "unknown key experimnt; did you mean experiment?"),
        (["experiment=colour"], "unknown experiment=colour; did you mean color? There are: color, color_long, "),
        (["trainer=ones"], "unknown trainer=ones; did you mean one? There are: one, two"),
        (["~trainer.max_stepz"], "unknown key trainer.max_stepz; did you mean trainer.max_steps?"),
        (["trainer.max_stepz=3", "sed=3"], "did you mean trainer.max_steps?"),
        (["seed=[1"], "cannot read 'seed=[1'"),
        (["seed=???"], "seed not given; add seed=..."),
        (["--multirun", "experiment=color", "seed=1,2"], "--multirun does not work with trainer.devices=2"),
    ],
)
def test_bad_command_lines_end_in_one_line(command, arguments, words):
    code, seen, _, err = command(*arguments)
    assert (code, seen) == (2, [])
    assert words in err and err.startswith("harmony: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_stepz: 3}", "odd.yaml: unknown key trainer.max_stepz; did you mean trainer.max_steps?"),
        ("sizes: {smal: 3}", "unknown key sizes.smal; did you mean sizes.small?"),
        ("sead: 3", "unknown key sead; did you mean seed?"),
        ("defaults: [override /trianer: two]", "unknown key trianer; did you mean trainer?"),
        ("defaults: [override /trainer: too]", "unknown trainer=too; did you mean two?"),
        ("trainer: {_target_: harmony.nothing}", None),
        ("trainer: {_target_: harmony.nothing, a: 1}", "harmony.nothing cannot be imported"),
        ("sizes: {more: {_target_: fractions.Fraction, numerato: 1}}", "unknown key sizes.more.numerato; did you mean"),
        ("sizes: {more: {_target_: fractions.Fraction, numerator: 1}}", None),
        ("trainer: {denominator: 3}", None),
        ("open: {anything: 3}", None),
        ("seed: [", "odd.yaml is no valid YAML"),
        ("[1, 2]", "odd.yaml must hold a mapping"),
    ],
)
def test_typos_in_an_experiment_are_refused(command, house, text, words):
    experiment(house, text)
    code, seen, _, err = command("experiment=odd")
    assert code == (2 if words else 0), err
    assert bool(seen) == (words is None)
    assert (words or "") in err and err.count("\n") == (1 if words else 0)


def test_typos_of_an_ancestor_are_refused(house):
    experiment(house, "sizes: {smal: 3}")
    experiment(house, "defaults: [odd, _self_]\nseed: 3", "child")
    with pytest.raises(UserError, match="odd.yaml: unknown key sizes.smal"):
        check_experiment("fit", {"experiment": "child"}, house / "configs")


def test_a_parameter_without_a_default_value_wants_a_plus(command, house):
    code, _, _, err = command("trainer.denominator=2")
    assert code == 2 and "+trainer.denominator=..." in err


def raiser(error):
    def task(cfg):
        raise error

    return task


def test_exit_codes(command):
    assert command(task=raiser(UserError("mask.png is empty;\nmark something")))[::3] == (
        2,
        "harmony: error: mask.png is empty; mark something\n",
    )
    assert command(task=raiser(KeyboardInterrupt()))[::3] == (130, "interrupted; the same command resumes\n")
    code, _, _, err = command(task=raiser(OSError(errno.ENOSPC, "No space left on device", "shard")))
    assert code == 2 and "disk full (shard)" in err
    with pytest.raises(ZeroDivisionError):
        command(task=lambda cfg: 1 // 0)
    with pytest.raises(OSError, match="Input/output"):
        command(task=raiser(OSError(errno.EIO, "Input/output error")))


def test_an_interrupt_that_lightning_turned_into_an_exit(command):
    """What Lightning makes of a signal in a training is an exit with code 1, or with code 0."""
    for number, exit in ((signal.SIGINT, SystemExit(1)), (signal.SIGTERM, SIGTERMException())):

        def task(cfg):
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                raise exit

        # a queue's or a container's way to stop a training is no success
        assert command(task=task)[::3] == (128 + number, "interrupted; the same command resumes\n")


def test_help_that_nobody_reads_to_its_end(tmp_path):
    """``--help | head``: no traceback, though the pipe is closed."""
    words = [sys.executable, "-m", "harmony.doctor", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_a_module_and_a_console_script_from_another_folder(tmp_path):
    """Both start from a folder that is not the checkout; the traceback of a user error is not shown."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import sys; sys.argv[0] = 'harmony-doctor'; from harmony.doctor import main; sys.exit(main())"
    for start in (["-m", "harmony.doctor"], ["-c", script]):
        ask = [sys.executable, *start]
        good = subprocess.run([*ask, "check=python"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert good.returncode == 0 and good.stdout.startswith("python    ok"), good.stderr
        bad = subprocess.run([*ask, "chek=python"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (bad.returncode, bad.stdout) == (2, "")
        assert bad.stderr == "harmony: error: unknown key chek; did you mean check?\n"
    assert not list(tmp_path.iterdir())


# Run folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(house):
    return lambda *overrides: compose("fit", overrides, house / "configs")


def test_the_same_command_goes_on_until_it_is_finished(cfg):
    first = run_folder(cfg())
    assert first.is_absolute() and first.parent == Path("runs/run").resolve()
    assert run_folder(cfg()) == first
    assert run_folder(cfg("seed=1")) != first
    second = run_folder(cfg("resume=false"))
    assert second != first and run_folder(cfg()) == second
    for finished in (first, second):
        write_json(finished / "metrics.json", {"test/psnr": 1.0})
    third = run_folder(cfg())
    assert third not in (first, second)
    assert (third / "config.yaml").read_text() == (first / "config.yaml").read_text()


def test_the_run_folder_is_in_the_configuration_but_not_in_its_file(cfg):
    settings = cfg()
    folder = run_folder(settings)
    assert settings.paths.run == settings.logger.save_dir == str(folder)
    assert run_folder(settings) == folder, "the folder became part of what identifies the run"
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved.seed == 0 and saved.logger.save_dir is None
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_named_folder_goes_on(cfg, tmp_path):
    first, second = run_folder(cfg()), run_folder(cfg("resume=false"))
    assert run_folder(cfg(f"resume={first}")) == first != second
    with pytest.raises(UserError, match="no such run folder"):
        run_folder(cfg(f"resume={tmp_path / 'nowhere'}"))


def test_other_ranks_follow_rank_zero(cfg, monkeypatch):
    first = run_folder(cfg("resume=false"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process that Lightning started
    assert run_folder(cfg("resume=false")) == first
    monkeypatch.delenv("HARMONY_RUN_DIR")  # a process of torchrun
    assert run_folder(cfg()) == first
    monkeypatch.setattr(run_folder_module, "WAIT_SECONDS", 0)
    with pytest.raises(UserError, match="rank 1 waited"):
        run_folder(cfg("seed=5"))


TOY = """
from pathlib import Path
from harmony.cli.command import entry, literal, quote_names
from harmony.cli.run_folder import rank, run_folder

@entry("fit", config_dir=Path(__file__).parent / "configs")
def main(cfg):
    from hydra.utils import instantiate
    from lightning.pytorch.demos.boring_classes import BoringModel

    folder = run_folder(cfg)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate(cfg.trainer, default_root_dir=str(folder), **options)
    trainer.fit(BoringModel())
    (folder / f"rank{rank()}").write_text(str(trainer.world_size))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_share_one_run_folder(house):
    """Lightning starts the same command again for the second rank, with overrides of its own."""
    shutil.copytree(CONFIGS / "trainer", house / "configs" / "trainer", dirs_exist_ok=True)
    (house / "toy.py").write_text(TOY)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{house}"}
    command = [sys.executable, "-m", "toy", "trainer=ddp2", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs/run").iterdir()
    assert {path.name: path.read_text() for path in folder.glob("rank*")} == {"rank0": "2", "rank1": "2"}


def test_provenance_names_what_a_run_depended_on(cfg, tmp_path):
    facts = provenance(cfg("seed=4"), backbone="abc")
    assert facts["seed"] == 4 and facts["backbone"] == "abc" and facts["versions"]["torch"] and facts["device"]
    write_json(tmp_path / "provenance.json", facts)


# What is shipped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "trainer").glob("*.yaml")))
def test_shipped_trainers_hold_parameters_of_lightning(name):
    node = OmegaConf.load(CONFIGS / "trainer" / f"{name}.yaml")
    target = OmegaConf.load(CONFIGS / "trainer" / "default.yaml")._target_
    assert {key for key in node if key not in ("defaults", "_target_")} <= parameters(target)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "logger").glob("*.yaml")))
def test_shipped_loggers_start(name, tmp_path):
    from hydra.utils import instantiate

    node = OmegaConf.load(CONFIGS / "logger" / f"{name}.yaml")
    logger = instantiate(OmegaConf.create({"name": "run", "paths": {"run": str(tmp_path)}, "logger": node}).logger)
    assert logger is not None


def test_missing_keys_are_named_once():
    """Guards the line: a key that others refer to is missing, those that refer to it are not."""
    cfg = OmegaConf.create({"token": "???", "module": {"token": "${token}", "deep": {"dir": "???"}}, "list": ["a"]})
    with pytest.raises(UserError, match=r"^module.deep.dir and token not given; add module.deep.dir=... token=...$"):
        refuse_missing(cfg)
    refuse_missing(OmegaConf.create({"token": "a", "module": {"token": "${token}"}}))


@pytest.mark.parametrize("value", ["a ${color} car", "'${oc.env:HOME}'", "${a", "100 % {x}"])
def test_text_is_no_configuration(command, value):
    """Guards prompts and paths: ``${...}`` in them is text, whoever quoted it."""
    code, (cfg,), _, err = command(literal(f"name={value}", ["name"]))
    assert code == 0 and cfg.name == value.strip("'"), err


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("[0012,12e5, a]", "['0012','12e5','a']"),
        ("['0012']", "['0012']"),
        ("[]", "[]"),
        ("null", "null"),
        ("ids.txt", "ids.txt"),
    ],
)
def test_ids_of_digits_are_text(word, expected):
    """Guards ids of photographs: leading zeros and exponents stay."""
    assert quote_names(f"dataset.select.image_ids={word}") == f"dataset.select.image_ids={expected}"
    assert quote_names("trainer.devices=[0,1]") == "trainer.devices=[0,1]"

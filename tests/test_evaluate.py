"""Studies by their command: what they leave behind, what they refuse, and the same table however it came about."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harmony import evaluate
from harmony.cli.compose import CONFIGS, compose, load_yaml, why
from harmony.cli.explain import check_experiment, experiments
from harmony.core.errors import UserError
from harmony.evaluation import comparison as study
from harmony.models.backbone import Backbone
from harmony.models.controlnet import export_controlnet
from harmony.models.paint_by_example import build_encoder, build_painting_unet, export_painter
from harmony.pixels.images import read_image, write_image

HERE = Path(__file__).resolve().parents[1]
# The random backbone reads too few tokens for these rows; the test of zero_shot runs such ones on the tiny backbone.
WORDLESS = ("study.rows.zero_shot=null", "study.rows.zero_shot_told=null")
STUDIES = {name: path for name, path in experiments("evaluate", CONFIGS).items() if path.parents[1] == HERE}


@pytest.fixture(scope="module")
def controlnets(random_backbone, awake, tmp_path_factory):
    """Overrides that give every study the ControlNets it names, none of which has learned anything."""
    folder, backbone = tmp_path_factory.mktemp("controlnets"), Backbone(str(random_backbone))
    branches = {"color": "color", "color_relight": "raw", "structure": "structure", "raw": "raw"}
    for seed, (name, branch) in enumerate(branches.items()):
        parameters = {"surroundings": True} if name == "color_relight" else {}
        export_controlnet(awake(backbone, seed), folder / name, branch, parameters, backbone)
    encoder = build_encoder(backbone.image_encoder, backbone.unet.config.cross_attention_dim)
    painter = export_painter(build_painting_unet(backbone.unet), encoder, folder, backbone)
    painters = ("paint_by_example", "all_tokens", "no_augmentation", "box")
    return [*(f"controlnets.{n}={folder / n}" for n in branches), *(f"painters.{n}={painter}" for n in painters)]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_composes_and_says_why_it_exists(name):
    """Guards the files: known keys only, a first line for ``--help``, a name of its own."""
    check_experiment("evaluate", {"experiment": name})
    assert len(why(STUDIES[name])) > 20
    assert compose("evaluate", [f"experiment={name}"]).name == name


@pytest.fixture
def ready(random_backbone, controlnets, prepared_work, tmp_path):
    """``ready(name, *more)``: a small study's command line, its dataset prepared; it writes into ``runs``."""

    def make(name: str, *more: str):
        words = [f"experiment={name}", f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}"]
        words += [f"model.path={random_backbone}", "limit=2", "steps=1", "logger=none", *controlnets, *more]
        if not (tmp_path / "work").exists():
            prepared_work(tmp_path / "work", words, "evaluate")
        return words

    return make


def read_page(folder: Path) -> tuple[list[str], dict]:
    """(titles of the pictures of its first row, all content) of a run's page, of which every picture can be decoded."""
    text = (folder / "report.html").read_text()
    content = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    for picture in [picture for row in content["rows"] for picture in row["pictures"]]:
        Image.open(io.BytesIO(base64.b64decode(picture["source"].partition(",")[2]))).load()
    assert content["title"] == f"{folder.parent.name} {folder.name}"
    assert content["config"] == (folder / "config.yaml").read_text() and content["count"] == 2 == len(content["rows"])
    return [picture["title"] for picture in content["rows"][0]["pictures"]], content


def study_of(words: list[str]):
    return compose("evaluate", evaluate.overrides(words))


@pytest.mark.parametrize(
    "name", [name for name in STUDIES if name not in ("editing", "user_study", "judge_bench", "pairs")]
)
def test_a_study_runs(name, ready, tmp_path, capsys):
    """Guards the way of every study: table with all rows, figure, flat metrics; nothing changes outside the hole."""
    tiny = ["model.path=tiny"] if name == "zero_shot" else []
    cfg = study_of(ready(name, *(WORDLESS if name == "relight" else tiny)))
    evaluate.main(cfg)
    (folder,) = (tmp_path / "runs" / name).iterdir()
    head, *rows = (folder / "table.csv").read_text().splitlines()
    listed = [row for row, node in cfg.study.rows.items() if node is not None]
    assert head.split(",")[0] == ("method" if listed else "lambda")
    assert {row.split(",")[0].split(" x")[0] for row in rows} >= set(listed)
    metrics = json.loads((folder / "metrics.json").read_text())
    drifts = [value for key, value in metrics.items() if key.endswith("test/pasted/bg_drift")]
    assert len(drifts) >= 2 and set(drifts) == {0.0}
    assert "n = 2 test pictures" in (folder / "table.md").read_text() and (folder / "figure.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "part 1/" in said and f"{folder}\n{folder / 'report.html'}\n{folder / 'figure.png'}\n" in said
    titles, content = read_page(folder)
    assert titles[0] == "input" and titles[-1] in ("truth", "source")
    outputs = [title for title in titles[1:-1] if not title.startswith(("instance", "exemplar"))]
    assert outputs == [row[0] for row in content["blocks"][0][1:]]
    facts = json.loads((folder / "provenance.json").read_text())
    assert {len(value) for value in facts["methods"].values()} == {64} and len(facts["manifest"]) == 64
    assert set(facts["methods"]) == set(listed) or not listed


def test_the_study_of_pairs_runs(ready, tmp_path, capsys):
    """Guards the way of the study that measures photographs at their own size: methods of all kinds, kept detail."""
    evaluate.main(study_of(ready("pairs", "study.rows.zero_shot=null")))  # its words are too long for this backbone
    (folder,) = (tmp_path / "runs" / "pairs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["copy_paste/unchanged/fmse"] == 0 < metrics["copy_paste/fmse"]
    head, *rows = (folder / "table.csv").read_text().splitlines()
    names = ["copy_paste", "reinhard", "histogram", "poisson", "color", "color_relight", "color_relight_enlarged"]
    assert [row.split(",")[0] for row in rows] == names and head.startswith("method,fmse,")
    assert "zero_shot: not measured yet" in (folder / "table.md").read_text()
    assert {metrics[f"{name}/bg_drift"] for name in names} == {0} == {metrics["copy_paste/raw/bg_drift"]}
    assert metrics["copy_paste/raw/shift"] == 0 < metrics["color_relight_enlarged/raw/bg_drift"]
    assert f"{folder / 'report.html'}\n{folder / 'figure.png'}\n" in capsys.readouterr().out
    assert read_page(folder)[0] == [*names, "truth"]


def test_the_editing_study_runs(ready, tmp_path, capsys):
    """Guards the way of the study without manifest and holes; the small backbone reads too few tokens for its edits."""
    evaluate.main(study_of(ready("editing", "study.parts=[reconstruction]", "study.inner=1")))
    (folder,) = (tmp_path / "runs" / "editing").iterdir()
    head, *rows = (folder / "table.csv").read_text().splitlines()
    assert head == "method,test/psnr,test/mse" and len(rows) == 6 and rows[0].startswith("autoencoder,")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["autoencoder/test/psnr"] > 0 and len(metrics) == 12
    said = capsys.readouterr().out
    assert "n = 2 scenes of editing" in (folder / "table.md").read_text() and str(folder / "figure.png") in said
    titles = ["source", "ddim, w = 1", "ddim, w = 3", "one null text", "null text a step", "fast (null = condition)"]
    assert read_page(folder)[0] == titles
    assert {"backbone/unet", "edits"} <= set(json.loads((folder / "provenance.json").read_text())["made_of"])


def test_the_bench_of_judges_runs(ready, tmp_path):
    """Guards the command: figures of every evaluator that is there, on the test split of the dataset."""
    evaluate.main(study_of(ready("judge_bench")))
    (folder,) = (tmp_path / "runs" / "judge_bench").iterdir()
    assert {"statistic/test/auc", "statistic/test/ece"} <= set(json.loads((folder / "metrics.json").read_text()))
    titles, content = read_page(folder)
    assert titles == ["another light", "as it was taken"]
    assert "pair 1, natural by statistic 0." in content["rows"][0]["name"]


def test_the_user_study_needs_neither_dataset_nor_backbone(tmp_path, monkeypatch, capsys):
    """Guards people's time: finished pictures alone make the page, and a file that is no answers ends in one line."""
    monkeypatch.setattr(evaluate, "ensure", lambda *recipe: 1 / 0)
    for method, value in (("ours", 60), ("paper", 90)):
        for name in ("0000", "0001"):
            (tmp_path / method / name).mkdir(parents=True)
            write_image(tmp_path / method / name / "harmonized.png", np.full((8, 8, 3), value, np.uint8))
    methods = f"study.methods={{ours: {tmp_path / 'ours'}, paper: {tmp_path / 'paper'}}}"
    words = ["experiment=user_study", methods, f"paths.runs={tmp_path / 'runs'}", "model.path=nowhere", "logger=none"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    evaluate.main()
    (folder,) = (tmp_path / "runs" / "user_study").iterdir()
    made = {"study.html", "study.json", "table.csv", "table.md", "report.html", "metrics.json", "provenance.json"}
    assert made <= set(os.listdir(folder))
    said = capsys.readouterr().out.splitlines()
    assert read_page(folder)[0] == ["ours", "paper"]
    assert str(folder / "study.html") in said and said[-2:] == [str(folder), str(folder / "report.html")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words, f"study.answers={folder / 'metrics.json'}"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harmony: error:") and "metrics.json holds no answers of a user study" in line


def test_a_judge_of_the_user_study_is_asked_once(tmp_path, monkeypatch, capsys, chat_model):
    """Guards study.judge= on the command line: its answers are kept below paths.work, and one that cannot be had ends
    in one line, with nothing left.
    """
    for method, value in (("ours", 60), ("paper", 90)):
        (tmp_path / method).mkdir()
        write_image(tmp_path / method / "0000.png", np.full((8, 8, 3), value, np.uint8))
    methods = f"study.methods={{ours: {tmp_path / 'ours'}, paper: {tmp_path / 'paper'}}}"
    words = ["evaluate", "experiment=user_study", methods, "logger=none"]
    words += [f"paths.{name}={tmp_path / name}" for name in ("runs", "work")]
    monkeypatch.setattr(sys, "argv", [*words, "study.judge=someone/vlm"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harmony: error: study.judge=someone/vlm: cannot be fetched")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "work").exists()
    monkeypatch.setattr(sys, "argv", [*words, f"study.judge={chat_model()}"])
    for asked in (True, False):
        evaluate.main()
        said = capsys.readouterr().out
        assert ("judge: 2/2 questions" in said) == asked and "| ours | 0 | " in said
    assert len(list((tmp_path / "work" / "judgments").glob("*/*.json"))) == 2
    assert len(list((tmp_path / "runs" / "user_study").glob("*/judge/answers_?.json"))) == 4


def test_what_is_left_out_and_nothing_left(ready, tmp_path):
    """Guards a clone without a ControlNet: the other rows run and the table says what is missing; a study of which
    nothing is left, or that needs the missing one, ends in one line and does not count as finished.
    """
    evaluate.main(study_of(ready("fig7", "controlnets.raw=null", "study.degrade=[1]")))
    (folder,) = (tmp_path / "runs" / "fig7").iterdir()
    text = (folder / "table.md").read_text()
    assert "| decomposed |" in text and "| raw |" not in text and "raw: left out, give controlnets.raw=RUN" in text
    with pytest.raises(UserError, match="nothing to compare: raw: left out, .*decomposed: left out"):
        evaluate.main(study_of(ready("fig7", "controlnets.raw=null", "controlnets.structure=null")))
    with pytest.raises(UserError, match="controlnets.structure=RUN"):
        evaluate.main(study_of(ready("table2", "controlnets.structure=null")))
    with pytest.raises(UserError, match="study.rows.ours_best chooses among study.lambdas"):
        evaluate.main(study_of(ready("table1", "study.lambdas=[]")))
    assert len(list((tmp_path / "runs").glob("*/*/metrics.json"))) == 1


def test_fewer_lambdas_than_printed(ready, tmp_path):
    """Guards the column of printed figures: it stands beside rows that were measured, and makes none of its own."""
    evaluate.main(study_of(ready("table2", "study.lambdas=[0.5,1]")))
    (folder,) = (tmp_path / "runs" / "table2").iterdir()
    rows = (folder / "table.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["0.5", "1"] and rows[0].endswith("12.35,31.19,54.15")


def test_the_best_lambda_is_chosen_on_validation(ready, tmp_path, monkeypatch):
    """Guards the choice: among validation pictures by their error, before any test picture is painted."""
    seen, truth = [], study.scores

    def spied(bench, outputs):
        seen.append((bench.name, len({path.parent for path in (tmp_path / "runs").rglob("*.npy")})))
        return [row | {"fpsnr": [3.0, 9.0, 5.0][len(seen) - 1]} for row in truth(bench, outputs)]

    monkeypatch.setattr(study, "scores", spied)
    others = [f"~study.rows.{row}" for row in load_yaml(STUDIES["table1"]).study.rows if row != "ours_best"]
    evaluate.main(study_of(ready("table1", "study.lambdas=[0.2,0.4,0.6]", *others)))
    assert seen == [("validation", 3)] * 3, "three choices are made, no test picture"
    (folder,) = (tmp_path / "runs" / "table1").iterdir()
    assert "ours_best: lambda 0.4 of 0.2, 0.4, 0.6, best in fpsnr on validation" in (folder / "table.md").read_text()


def test_one_process_two_and_a_killed_one_make_the_same_table(ready, tmp_path, monkeypatch):
    """Guards the contract, by the command itself: two processes, and one that is killed in the middle and started
    again, write the table of one, byte for byte; only what was missing is painted again.
    """
    dear = ("study.rows.color_relight=null", "study.rows.ours_relight=null", *WORDLESS)
    words = ready("relight", "limit=null", *dear)

    def command(name: str, *python: str):
        more = [f"paths.runs={tmp_path / name}" if w.startswith("paths.runs") else w for w in words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *python, *more], capture_output=True, text=True, env=env)

    def table(name: str) -> bytes:
        (folder,) = (tmp_path / name / "relight").iterdir()
        return (folder / "table.csv").read_bytes()

    plain = ("-m", "harmony.evaluate")
    one = command("one", *plain)
    assert one.returncode == 0, one.stderr
    two = command("two", "-m", "torch.distributed.run", "--nproc-per-node", "2", *plain)
    assert two.returncode == 0, two.stderr
    kills = "import harmony.evaluation.blocks as s, os, sys; w = s.store; k = []\n"
    kills += "s.store = lambda *a: (w(*a), k.append(1), len(k) == 4 and os.kill(os.getpid(), 9))\n"
    kills += "from harmony.evaluate import main; main()"
    killed = command("killed", "-c", kills)
    assert killed.returncode == -9, killed.stderr
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*.npy")}
    assert len(before) == 4 and command("killed", *plain).returncode == 0
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())
    assert table("one") == table("two") == table("killed")


def test_outputs_of_other_weights_are_not_taken(ready, random_backbone, awake, tmp_path, monkeypatch):
    """Guards resumption: with a ControlNet that was trained anew at the same place the same command paints anew, with
    the same one, or when another that no row names has changed, it does not.
    """
    backbone, net, raw = Backbone(str(random_backbone)), tmp_path / "net", tmp_path / "raw"
    export_controlnet(awake(backbone, 7), net, "color", {}, backbone)
    export_controlnet(awake(backbone, 7), raw, "raw", {}, backbone)
    words = ready("table2", f"controlnets.color={net}", f"controlnets.raw={raw}", "study.lambdas=[1]")

    def painted() -> int:
        monkeypatch.setattr(study, "write_table", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.main(study_of(words))
        monkeypatch.undo()
        return len(list((tmp_path / "runs" / "table2").rglob("*.npy")))

    assert painted() == 1
    export_controlnet(awake(backbone, 8), raw, "raw", {}, backbone)
    assert painted() == 1
    export_controlnet(awake(backbone, 8), net, "color", {}, backbone)
    assert painted() == 2
    evaluate.main(study_of(words))
    (folder,) = (tmp_path / "runs" / "table2").iterdir()
    assert len(list(folder.rglob("*.npy"))) == 2 and (folder / "table.csv").exists()


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        ("table1", "controlnets.color=nowhere", "there is no ControlNet nowhere"),
        ("exemplar_bench", "painters.paint_by_example=nowhere", "there is no Paint by Example nowhere"),
        ("table1", "study.rows.copy_paste=stored:nowhere", "nowhere: there is no such folder of results"),
        ("fig6", "controlnets.color=nowhere", "there is no ControlNet nowhere"),
    ],
)
def test_a_path_that_is_missing_is_said_before_anything_is_prepared(name, word, said, ready, monkeypatch):
    monkeypatch.setattr(evaluate, "ensure", lambda *given: pytest.fail("prepared"))
    monkeypatch.setattr(Backbone, "unet", property(lambda self: pytest.fail("loaded")))
    with pytest.raises(UserError, match=said):
        evaluate.main(study_of(ready(name, word)))


def test_a_clip_that_there_is_not(ready):
    """Guards bad input: one line before anything is painted."""
    for name, said in (("ViT-B-32", "give open_clip's NAME/WEIGHTS"), ("no-such/weights", "cannot be loaded")):
        with pytest.raises(UserError, match=said):
            evaluate.main(study_of(ready("table2", f"clip={name}")))


def test_guidance_without_a_painter_draws_no_curve(ready, tmp_path):
    """Guards a clone: no empty panels where there is nothing to draw, pictures of one size side by side."""
    evaluate.main(study_of(ready("exemplar_bench", "painters.paint_by_example=null")))
    (folder,) = (tmp_path / "runs" / "exemplar_bench").iterdir()
    height, width = read_image(folder / "figure.png").shape[:2]
    assert width > height / 2 and not (folder / "pictures.png").exists()
    assert (read_image(folder / "figure.png") == 255).all(2).mean() < 0.3


def test_a_study_on_wandb(ready, tmp_path, wandb_records):
    """Guards the third copy: an offline run in the run folder, with tables, every picture and what it was made of."""
    words = [w for w in ready("table2", "study.lambdas=[0.5,1]") if w != "logger=none"]
    evaluate.main(study_of(words))
    (folder,) = (tmp_path / "runs" / "table2").iterdir()
    (run,) = folder.glob("wandb/offline-run-*")
    (file,) = run.rglob("table_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"][0] == "lambda" and [row[0] for row in table["data"]] == ["0.5", "1"]
    assert all(isinstance(cell, float | int) for row in table["data"] for cell in row[1:])
    assert len(list(run.rglob("*.png"))) == 2
    (file,) = run.rglob("pictures_*.table.json")
    pictures = json.loads(file.read_text())
    names = ["id", "caption", "input", "instance", "0.5", "1", "truth"]
    assert pictures["columns"][:7] == names and len(pictures["data"]) == 2
    rows = [dict(zip(pictures["columns"], row, strict=True)) for row in pictures["data"]]
    means = [dict(zip(table["columns"], row, strict=True))["test/pasted/color_de"] for row in table["data"]]
    assert [np.mean([row[f"{name}/color_de"] for row in rows]) for name in ("0.5", "1")] == pytest.approx(means, 1e-3)
    artifacts = [r.artifact for r in wandb_records(folder) if r.WhichOneof("record_type") == "artifact"]
    inputs = sorted(artifact.name for artifact in artifacts if artifact.use_after_commit)
    assert [name.rpartition("-")[2] for name in inputs] == ["model", "model", "manifest"] and len(set(inputs)) == 3
    (page,) = run.rglob("*.html")
    assert page.read_text() == (folder / "report.html").read_text()

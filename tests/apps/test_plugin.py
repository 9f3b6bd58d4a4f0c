"""The plugin in a real FiftyOne with its database: every operator and the panel, at once, delegated, on bad input."""

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from harmony.apps.plugin.link import NAME, PLUGIN, link_plugin
from harmony.core.errors import UserError
from harmony.data.manifest import manifest_hash, read_manifest
from harmony.data.sources.folder import FOLDER
from harmony.data.sources.open_images.browse import find_dataset, serve
from harmony.data.sources.open_images.preparation import prepare_dataset
from harmony.evaluation.blocks import fill_blocks
from harmony.evaluation.eval_sets import load_reconstruct, paste_outputs
from harmony.evaluation.figures import scores
from harmony.evaluation.run_outputs import list_runs, open_run
from harmony.methods.baselines import Poisson, Reinhard
from harmony.models.backbone import Backbone
from harmony.models.shipped import ASSETS
from harmony.pixels.images import read_image, write_image

OPERATORS = ("harmonize", "score", "decide", "open_run", "embed")
NAMES = ("a0", "a1", "a2", "a3")
COLORS = ((200, 40, 30), (30, 160, 60), (40, 60, 200), (210, 190, 40))


@pytest.fixture(scope="module")
def plugin(fo, tmp_path_factory):
    """The plugin, linked as ``browse`` links it, beside one of the user's own that stays."""
    import fiftyone.operators as foo

    folder = tmp_path_factory.mktemp("plugins")
    (folder / "mine").mkdir()
    (folder / "mine" / "fiftyone.yml").write_text("name: '@me/mine'\n")
    before, fo.config.plugins_dir = fo.config.plugins_dir, str(folder)
    link_plugin()
    yield foo
    assert sorted(path.name for path in folder.iterdir()) == [NAME, "mine"]
    fo.config.plugins_dir = before


@pytest.fixture
def make_photographs(fo, tmp_path, request):
    """``make_photographs()``: prepare a folder of four photographs again; gives (FiftyOne dataset, work folder)."""
    root, name = tmp_path / "photos", f"test-plugin-{request.node.name[:40]}"
    mask = np.zeros((48, 64), bool)
    mask[12:36, 20:44] = True
    for n, id_ in enumerate(NAMES):
        picture = np.random.default_rng(n).integers(90, 130, (48, 64, 3), np.uint8)
        picture[mask] = COLORS[n]
        write_image(root / "test" / "images" / f"{id_}.png", picture)
        write_image(root / "test" / "masks" / f"{id_}.png", mask if n < 3 else mask & (np.arange(64) < 22))
    recipe = {"name": name, "layout": "folder", "dir": str(root), "splits": ["test"], "select": {"min_area": 0.1}}
    recipe["captions"] = {"given": True, "captioner": "backbone"}

    earlier_names = set(fo.list_datasets())

    def prepare():
        prepare_dataset(recipe, tmp_path / "work", FOLDER, ASSETS / "tiny" / "captioner")
        return fo.load_dataset(name), tmp_path / "work" / name

    yield prepare
    for each in set(fo.list_datasets()) - earlier_names:
        fo.delete_dataset(each)


@pytest.fixture
def photographs(make_photographs):
    return make_photographs()


@pytest.fixture
def run_folder(photographs, random_backbone, tmp_path):
    """A finished comparison of two methods on the photographs, as ``evaluate`` leaves one."""
    _, work = photographs
    folder = tmp_path / "runs" / "table1" / "2026-01-02_03-04-05"
    backbone = Backbone(str(random_backbone))
    items = load_reconstruct(work / "manifest.jsonl", "test", 32)
    rows = {"reinhard": Reinhard(backbone), "0.5 1": Poisson(backbone)}
    fill_blocks(items, rows, folder, 0, say=lambda line: None)
    prints = {name: method.fingerprint for name, method in rows.items()}
    facts = {"methods": prints, "manifest": manifest_hash(work / "manifest.jsonl"), "count": len(items)}
    (folder / "provenance.json").write_text(json.dumps(facts))
    study = {"eval_set": "reconstruct", "radius": 16, "degrade": [1]}
    config = {"split": "test", "limit": None, "seed": 0, "study": study, "dataset": {"name": work.name}}
    OmegaConf.save(config | {"paths": {"work": str(work.parent)}}, folder / "config.yaml")
    (folder / "table.csv").write_text("method\n")
    return folder


def execute(foo, name: str, dataset, selected=(), view=None, **params) -> dict:
    """The result of an operator."""
    ctx = {"dataset": dataset, "view": view, "selected": list(selected), "params": params}
    ctx = {key: value for key, value in ctx.items() if value is not None}
    return foo.execute_operator(f"@harmony/compose/{name}", ctx).result


def ids_of(dataset, *names: str) -> list[str]:
    ids = dict(zip(*dataset.values(["harmony_id", "id"]), strict=True))
    return [ids[f"test/{name}"] for name in names]


def test_everything_is_registered(plugin):
    """Guards the import: FiftyOne says nothing of an operator that fails to load."""
    assert all(plugin.operator_exists(f"@harmony/compose/{name}") for name in (*OPERATORS, "compare"))


def test_the_link_leaves_what_it_does_not_own(fo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fo.config, "plugins_dir", str(tmp_path / "new" / "plugins"))
    link_plugin()
    link = tmp_path / "new" / "plugins" / NAME
    assert link.resolve() == PLUGIN and not capsys.readouterr().out
    link.unlink()
    link.symlink_to(tmp_path / "old" / "harmony" / "apps" / "plugin")
    link_plugin()
    assert link.resolve() == PLUGIN, "that of another harmony is replaced"
    link.unlink()
    link.mkdir()
    (link / "own.txt").write_text("mine")
    link_plugin()
    assert (link / "own.txt").read_text() == "mine" and "rename what is there" in capsys.readouterr().out


def test_the_app_listens_on_this_machine_alone(fo, photographs, monkeypatch):
    """Guards operators, which write files, against the network: FiftyOne opens a remote App to all."""
    dataset, _ = photographs
    calls = []

    def launch_app(dataset, **options):
        assert not logging.getLogger("fiftyone.core.session.session").isEnabledFor(logging.INFO)
        calls.append(options)
        return SimpleNamespace(url="", wait=lambda seconds: None)

    monkeypatch.setattr(fo, "launch_app", launch_app)
    for address in (None, "0.0.0.0"):
        serve(find_dataset({"name": dataset.name, "dir": None}), 5151, address)
    assert [options["address"] for options in calls] == ["127.0.0.1", "0.0.0.0"]


def test_harmonize_at_once_and_delegated(fo, plugin, photographs):
    from fiftyone.operators.delegated import DelegatedOperationService

    dataset, work = photographs
    selected = ids_of(dataset, "a0", "a1", "a3")
    result = execute(plugin, "harmonize", dataset, selected, method="reinhard")
    assert result["message"].startswith("2 harmonized in ") and "left out 1: test/a3 (no mask" in result["message"]
    dataset.reload()
    assert dataset.app_config.media_fields == ["filepath", "harmonized_composite", "harmonized"]
    sample = dataset[selected[0]]
    before, after, mask = (read_image(path) for path in (sample.filepath, sample.harmonized, sample.mask.mask_path))
    rim = np.pad(np.zeros((28, 28), bool), ((10, 10), (18, 18)), constant_values=True)
    assert np.array_equal(before[rim], after[rim]) and np.abs(before.astype(int) - after)[mask[..., 0] > 0].mean() > 5
    assert Path(sample.harmonized) == work / "harmonized" / "harmonized" / "test" / "a0" / "harmonized.png"
    assert dataset.exists("harmonized").values("id") == selected[:2]

    ctx = {"dataset": dataset, "selected": selected[:1], "request_delegation": True}
    ctx["params"] = {"method": "controlnet", "steps": 1, "seed": 3, "field": "painted"}
    plugin.execute_operator("@harmony/compose/harmonize", ctx)
    assert not dataset.has_sample_field("painted"), "delegated work waits"
    (done,) = DelegatedOperationService().execute_queued_operations(operator="@harmony/compose/harmonize")
    assert done.result["message"].startswith("1 harmonized in "), done.error
    dataset.reload()
    facts = json.loads((Path(dataset[selected[0]].painted).parent / "facts.json").read_text())
    assert facts["seed"] == 3 and dataset[selected[0]].painted != dataset[selected[0]].harmonized


def test_harmonize_any_dataset_with_masks(fo, plugin, photographs, tmp_path):
    """Guards datasets that harmony did not prepare: masks of segmentations and detections, in the database."""
    prepared, _ = photographs
    paths = prepared.values("filepath")
    mask = np.zeros((48, 64), np.uint8)
    mask[12:36, 20:44] = 1
    dataset = fo.Dataset("s8/../../../x")
    own = {"mask": np.ones((24, 24), bool), "bounding_box": [20 / 64, 12 / 48, 24 / 64, 24 / 48]}
    cat, box = fo.Detection(label="cat", **own), fo.Detection(label="dog", bounding_box=own["bounding_box"])
    pair = fo.Detections(detections=[cat.copy(), fo.Detection(label="dog", **own)])
    dataset.add_sample(fo.Sample(paths[0], here=fo.Segmentation(mask=mask)))
    dataset.add_sample(fo.Sample(paths[1], there=cat.copy()))
    dataset.add_sample(fo.Sample(paths[2], those=fo.Detections(detections=[box, cat.copy()])))
    dataset.add_sample(fo.Sample(paths[3], those=pair))
    dataset.add_sample(fo.Sample(f"{tmp_path}/gone.png", there=cat.copy()))
    result = execute(plugin, "harmonize", dataset, dataset.values("id"), method="reinhard")
    assert result["message"].startswith("3 harmonized") and "left out 2: a3, gone (" in result["message"]
    assert "2 objects with masks (cat, dog), give the label of one" in result["message"]
    assert "gone.png does not exist" in result["message"]
    result = execute(plugin, "harmonize", dataset, dataset.values("id")[3:4], method="reinhard", label="dog")
    assert result["message"].startswith("1 harmonized")
    dataset.reload()
    for sample in dataset.exists("harmonized"):
        assert (read_image(Path(sample.harmonized).parent / "mask.png")[..., 0] > 0).sum() == 24 * 24
        assert Path(fo.config.default_dataset_dir).resolve() in Path(sample.harmonized).resolve().parents
    patches = dataset.to_patches("those")
    result = execute(plugin, "harmonize", dataset, patches.values("id")[:2], patches, method="poisson")
    assert result["message"].startswith("1 harmonized"), "two patches of one sample"
    assert execute(plugin, "embed", dataset, view=patches)["error"].startswith("2 pictures that can be read")
    panel = Panel(plugin, dataset, patches)
    assert panel.call("on_load", patches.first().id)["picture"].startswith("data:image/")
    panel.call("on_load", paths[0])
    assert "has no more sample" in panel.state["notice"] and panel.state["names"] == []
    assert "not prepared by harmony" in execute(plugin, "decide", dataset, dataset.values("id"), choice="keep")["error"]


def test_a_score_sorts_the_dataset(fo, plugin, photographs, run_folder):
    dataset, work = photographs
    result = execute(plugin, "score", dataset, run=str(run_folder), row="reinhard")
    assert result["message"].startswith("3 samples have the figures of reinhard")
    execute(plugin, "score", dataset, run=str(run_folder), row="0.5 1")
    dataset.reload()
    items = load_reconstruct(work / "manifest.jsonl", "test", 32)
    outputs = open_run(run_folder).read_raw(items, "reinhard")
    expected = scores(items, paste_outputs(items, outputs))
    names = [c.name for c in items.composites]
    by_hand = sorted(names, key=lambda name: expected[names.index(name)]["color_de"], reverse=True)
    view = dataset.exists("reinhard").sort_by("reinhard.color_de", reverse=True)
    assert view.values("harmony_id") == [f"test/{name}" for name in by_hand]
    (sample,) = dataset.match(fo.ViewField("harmony_id") == "test/a1")
    assert sample.reinhard.fpsnr == pytest.approx(expected[names.index("a1")]["fpsnr"])
    assert sample["row_0_5_1"].color_de >= 0 and list_runs(run_folder.parents[1]) == [run_folder]


def test_a_run_opens_as_groups(fo, plugin, photographs, run_folder):
    dataset, work = photographs
    for _ in range(2):  # again: the same dataset, made anew
        result = execute(plugin, "open_run", dataset, run=str(run_folder))
        assert "3 composites are in the dataset table1-2026-01-02_03-04-05" in result["message"]
    groups = fo.load_dataset("table1-2026-01-02_03-04-05")
    assert groups.group_slices == ["input", "hint", "reinhard", "row_0_5_1", "truth"] and len(groups) == 3
    items = load_reconstruct(work / "manifest.jsonl", "test", 32)
    group = groups.get_group(groups.first().group.id)
    assert group["reinhard"].composite_id == f"test/{items.composites[0].name}" == group["truth"].composite_id
    raw = open_run(run_folder).read_raw(items, "reinhard")
    assert np.array_equal(read_image(group["reinhard"].filepath), paste_outputs(items, raw)[0])
    assert np.array_equal(read_image(group["truth"].filepath), items.truths[0])
    assert group["reinhard"].fpsnr > 0 and group["truth"].fpsnr is None
    view = groups.select_group_slices("reinhard").sort_by("fpsnr")
    assert view.values("fpsnr") == sorted(view.values("fpsnr"))
    selected = groups.select_group_slices("input").values("id")[:1]
    result = execute(plugin, "harmonize", groups, selected, method="poisson", field="again")
    assert result["message"].startswith("1 harmonized")


def test_decisions_are_respected_by_the_next_preparation(fo, plugin, make_photographs, capsys):
    dataset, work = make_photographs()
    assert {row.id for row in read_manifest(work / "manifest.jsonl")[1]} == {"a0", "a1", "a2"}
    assert "needs a reason" in execute(plugin, "decide", dataset, ids_of(dataset, "a0"), choice="reject")["error"]
    result = execute(plugin, "decide", dataset, ids_of(dataset, "a0"), choice="reject", reason="blurred")
    assert "By hand, 0 are kept and 1 rejected now" in result["message"]
    result = execute(plugin, "decide", dataset, ids_of(dataset, "a3"), choice="keep", reason="small but good")
    assert "By hand, 1 are kept and 1 rejected now" in result["message"]
    dataset.reload()
    assert dataset[ids_of(dataset, "a0")[0]].decision == "reject: blurred", "the App shows it at once"
    capsys.readouterr()
    make_photographs()
    assert "by hand: 1 kept, 1 rejected" in capsys.readouterr().out
    assert {row.id for row in read_manifest(work / "manifest.jsonl")[1]} == {"a1", "a2", "a3"}
    dataset.reload()
    facts = {s.harmony_id: (s.rejected_because, s.decision) for s in dataset}
    assert facts["test/a0"] == ("by hand", "reject: blurred") and facts["test/a3"] == (None, "keep: small but good")
    assert dataset.load_saved_view("rejected: by hand").values("harmony_id") == ["test/a0"]
    with open(work / "selection.csv", newline="") as file:
        assert {row["id"]: row["reason"] for row in csv.DictReader(file)}["a0"] == "by hand"
    execute(plugin, "decide", dataset, ids_of(dataset, "a0", "a3"), choice="as the rules say")
    make_photographs()
    assert {row.id for row in read_manifest(work / "manifest.jsonl")[1]} == {"a0", "a1", "a2"}
    assert set(dataset.reload() or dataset.values("decision")) == {None}


def test_what_has_no_mask_cannot_be_kept(plugin, make_photographs, tmp_path):
    (tmp_path / "photos" / "test" / "masks" / "a1.png").unlink()
    dataset, _ = make_photographs()
    result = execute(plugin, "decide", dataset, ids_of(dataset, "a1"), choice="keep")
    assert result["error"].endswith("reject 1: test/a1 (mask file missing): mend those")
    result = execute(plugin, "decide", dataset, ids_of(dataset, "a1", "a3"), choice="keep")
    assert "keep: 1: test/a3." in result["message"] and "cannot be kept 1: test/a1" in result["message"]


def test_embeddings_map_and_sort(plugin, photographs, monkeypatch):
    dataset, _ = photographs
    monkeypatch.setattr("harmony.apps.plugin.embed.find_spec", lambda name: None)
    assert "pip install umap-learn" in execute(plugin, "embed", dataset, method="umap")["error"]
    result = execute(plugin, "embed", dataset, model="tiny")
    assert result["message"].startswith("4 pictures embedded by backbone-clip of tiny")
    Path(dataset.first().filepath).write_bytes(b"no picture")
    result = execute(plugin, "embed", dataset, method="tsne")
    assert result["message"].startswith("3 pictures") and "cannot be read 1: " in result["message"]
    dataset.reload()
    assert set(dataset.list_brain_runs()) == {"clip_map", "clip_similarity"}
    points = dataset.load_brain_results("clip_map").points
    assert points.shape == (3, 2) and np.isfinite(points).all()
    query = ids_of(dataset, "a2")[0]
    assert dataset.sort_by_similarity(query, brain_key="clip_similarity", k=2).first().id == query
    monkeypatch.setattr("fiftyone.brain.compute_similarity", lambda *args, **options: 1 / 0)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(plugin, "embed", dataset)
    assert set(dataset.reload() or dataset.list_brain_runs()) == {"clip_map", "clip_similarity"}, "the earlier ones"


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("harmonize", {}, "nothing is selected"),
        ("decide", {"choice": "keep"}, "nothing is selected"),
        ("score", {"run": "nowhere"}, "no finished run there"),
        ("open_run", {"run": "nowhere"}, "no finished run there"),
        ("harmonize", {"method": "magic", "selected": True}, "magic is unknown here: choose one of controlnet"),
        ("decide", {"choice": "perhaps", "selected": True}, "perhaps is unknown here"),
        ("embed", {"method": "magic"}, "magic is unknown here"),
        ("harmonize", {"field": "sha256", "selected": True}, "sha256 cannot be the field"),
        ("harmonize", {"field": "../out", "selected": True}, "cannot be a field"),
        ("harmonize", {"field": "_x", "selected": True}, "cannot be a field"),
        ("harmonize", {"model": "small", "method": "reinhard", "selected": True}, "small"),
        ("harmonize", {"selected": ["nonsense"]}, "has no more sample 1: nonsense"),
        ("decide", {"choice": "keep", "selected": ["0" * 24]}, "has no more sample 1: 0000"),
        ("score", {"run": "a\0b"}, "no finished run there"),
        ("open_run", {"run": "a" * 5000}, "no finished run there"),
    ],
)
def test_bad_input_is_one_line(plugin, photographs, name, params, expected):
    dataset, _ = photographs
    selected = params.get("selected", [])
    params = params | {"selected": ids_of(dataset, "a0") if selected is True else selected}
    error = execute(plugin, name, dataset, **params)["error"]
    assert expected in error and "\n" not in error and len(error) < 500


def test_what_users_have_stays(plugin, fo, photographs, run_folder):
    """Guards fields, tables and folders of the user against operators."""
    dataset, work = photographs
    selected = ids_of(dataset, "a0")
    for name in ("harmonized_composite", "own"):
        dataset.add_sample_field(name, fo.StringField)
    dataset.app_config.media_fields.append("own")
    dataset.save()
    for field, clash in (("harmonized", "harmonized_composite"), ("own", "own")):
        result = execute(plugin, "harmonize", dataset, selected, method="reinhard", field=field)
        assert f"another field {clash}" in result["error"] and not (work / "harmonized").exists()
    (work / "harmonized").write_text("mine")
    result = execute(plugin, "harmonize", dataset, selected, method="reinhard", field="other")
    assert f"{work}/harmonized" in result["error"] and (work / "harmonized").read_text() == "mine"
    for field in ("_x", "../x"):
        result = execute(plugin, "score", dataset, run=str(run_folder), field=field)
        assert "cannot be a field" in result["error"]
    table = work.with_name(f"{work.name}.decisions.csv")
    table.write_text("test/a1,keep,fine\n")
    result = execute(plugin, "decide", dataset, selected, choice="keep")
    assert "first line must be" in result["error"] and table.read_text() == "test/a1,keep,fine\n"
    table.unlink()
    table.mkdir()
    assert "is no file" in execute(plugin, "decide", dataset, selected, choice="keep")["error"]


def test_rows_have_names_of_their_own(plugin):
    from harmony.apps.plugin.runs import name_fields  # imports FiftyOne

    rows = ["a b", "a_b", "input", "_x", "x" * 90]
    assert list(name_fields(rows).values()) == ["a_b", "a_b_2", "input_2", "row__x", "x" * 50]


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("provenance.json", {"methods": {"reinhard": "../../.."}}, "fingerprint"),
        ("config.yaml", {"split": ["test"]}, "says split="),
        ("config.yaml", {"study": {"eval_set": "reconstruct", "radius": 1, "degrade": [0]}}, "says study.degrade="),
        ("config.yaml", {"dataset": {"name": "../other"}}, "leads out of"),
        ("config.yaml", {"dataset": "studio"}, "says dataset.name="),
        ("config.yaml", {"seed": "${oc.env:HOME}"}, "says seed="),
    ],
)
def test_foreign_runs_are_checked(tmp_path, file, change, expected):
    study = {"eval_set": "reconstruct", "radius": 16, "degrade": [1]}
    config = {"split": "test", "limit": None, "seed": 0, "study": study, "dataset": {"name": "studio"}}
    config |= {"paths": {"work": "work"}}
    facts = {"methods": {"reinhard": "ab" * 32}, "manifest": "cd" * 32}
    for name, content in (("provenance.json", facts), ("config.yaml", config)):
        (tmp_path / name).write_text(json.dumps(content | (change if name == file else {})))
    with pytest.raises(UserError, match=expected):
        open_run(tmp_path)


def test_runs_that_do_not_fit_are_refused(plugin, make_photographs, run_folder, tmp_path):
    dataset, work = make_photographs()
    assert "other is unknown here" in execute(plugin, "score", dataset, run=str(run_folder), row="other")["error"]
    assert "another field" in execute(plugin, "score", dataset, run=str(run_folder), field="mask")["error"]
    (tmp_path / "photos" / "test" / "images" / "a1.png").unlink()
    dataset, _ = make_photographs()
    assert "is a run of" in execute(plugin, "score", dataset, run=str(run_folder))["error"]
    assert "evaluate again" in execute(plugin, "open_run", dataset, run=str(run_folder))["error"]
    for file in run_folder.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is no block of pictures"):
        open_run(run_folder).find_resolution()
    config = OmegaConf.load(run_folder / "config.yaml")
    config.study.eval_set = "exemplar"
    OmegaConf.save(config, run_folder / "config.yaml")
    with pytest.raises(UserError, match="no truths"):
        open_run(run_folder)
    (run_folder / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match="no comparison"):
        open_run(run_folder)


class Panel:
    """The panel as the App calls it: its state stays from event to event."""

    def __init__(self, plugin, dataset, view=None):
        from fiftyone.operators.registry import OperatorRegistry

        self.panel = OperatorRegistry().get_operator("@harmony/compose/compare")
        self.dataset, self.state = dataset, {}
        self.stages = None if view is None else view._serialize()

    def call(self, method: str, sample: str | None, **params) -> dict:
        """Call a hook; the data that it sends, and the schema that it renders as ``schema``."""
        from fiftyone.operators.executor import ExecutionContext, Executor

        params |= {"panel_id": "p", "panel_state": self.state, "__method__": method}
        executor = Executor()
        request = {"dataset_name": self.dataset.name, "current_sample": sample, "params": params, "view": self.stages}
        ctx = ExecutionContext(request, executor)
        self.panel.execute(ctx)
        sent = {}
        for invocation in executor._requests:
            for kind in ("state", "data"):
                if kind in invocation.params:
                    sent |= invocation.params[kind]
        self.state |= {key: value for key, value in sent.items() if key != "picture"}
        return sent


def test_the_panel_compares_and_lists_figures(fo, plugin, photographs, run_folder):
    dataset, _ = photographs
    (selected,) = ids_of(dataset, "a0")
    panel = Panel(plugin, dataset)
    assert panel.call("on_load", None)["names"] == [], "no sample is open"
    execute(plugin, "harmonize", dataset, [selected], method="reinhard")
    execute(plugin, "score", dataset, run=str(run_folder), row="reinhard")
    dataset.reload()
    sent = panel.call("on_change_current_sample", selected)
    assert (panel.state["before"], panel.state["after"]) == ("harmonized_composite", "harmonized")
    assert sent["picture"].startswith("data:image/") and 45 <= panel.state["split"] <= 55, "in the middle of the object"
    assert "| fpsnr |" in panel.state["figures"] and "reinhard" in panel.state["figures"].splitlines()[0]
    moved = panel.call("move", selected, value=10)
    assert moved["picture"] != sent["picture"] and panel.state["split"] == 10
    assert panel.call("choose_after", selected, value="filepath")["picture"] != moved["picture"]
    Path(dataset[selected].filepath).write_bytes(b"no picture")
    assert "filepath" in panel.state["after"] and panel.call("move", selected, value=20)["picture"] is None
    assert dataset[selected].filepath in panel.state["notice"]


def test_the_panel_shows_the_slices_of_a_group(fo, plugin, photographs, run_folder):
    execute(plugin, "open_run", photographs[0], run=str(run_folder))
    groups = fo.load_dataset("table1-2026-01-02_03-04-05")
    panel = Panel(plugin, groups)
    assert panel.call("on_load", groups.first().id)["picture"].startswith("data:image/")
    assert panel.state["names"] == ["input", "hint", "reinhard", "row_0_5_1", "truth"]
    assert (panel.state["before"], panel.state["after"]) == ("input", "row_0_5_1")
    assert panel.state["figures"].splitlines()[0] == "| figure | reinhard | row_0_5_1 |"

"""Names of weights: what a name means, in which order, and the line for one that means nothing."""

import pytest

from harmony.core.errors import UserError
from harmony.models.shipped import ASSETS, CONTROLNET, JUDGE, WORD, backbone_path, find_asset, find_weights


def touch(file):
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    return file.parent


def test_a_name_is_shipped_or_a_run_or_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "color" / "config.json")
    assert find_weights(CONTROLNET, "color") == ASSETS / "color" / "controlnet", "the shipped one comes first"
    assert find_weights(CONTROLNET, f"{tmp_path}/color") == tmp_path / "color"
    run = touch(tmp_path / "run" / "export" / "controlnet" / "config.json")
    assert find_weights(CONTROLNET, tmp_path / "run") == find_weights(CONTROLNET, tmp_path / "run" / "export") == run
    assert find_weights(CONTROLNET, "owner/name") is None
    assert find_weights(WORD, "words/teal_mug").is_relative_to(ASSETS)
    assert backbone_path("tiny") == str(ASSETS / "tiny") and backbone_path("owner/name") == "owner/name"


def test_no_name_leads_out_of_the_assets(tmp_path):
    """Guards files of others: a name with dots, an absolute one and an empty one are no shipped names."""
    for name in ("..", "../assets/color", "color/../../configs", str(ASSETS / "color"), "", "."):
        assert find_asset(name) is None


def test_a_name_that_means_nothing_is_one_line(tmp_path):
    touch(tmp_path / "running" / "checkpoints" / "last.ckpt")
    for branch in ("color", "structure"):
        touch(tmp_path / "joint" / "export" / branch / "controlnet" / "config.json")
    for kind, name, message in (
        (CONTROLNET, tmp_path / "running", "is a run that has not ended: export it first, python -m harmony.export"),
        (CONTROLNET, tmp_path / "joint", r"trained several: choose one of .*export/color, .*export/structure"),
        (CONTROLNET, tmp_path, r"holds no ControlNet \(config.json\): give a run folder"),
        (CONTROLNET, "nowhere", "there is no ControlNet nowhere: give a run folder"),
        (JUDGE, "owner/name", "there is no judge owner/name: give a run of experiment=judge"),
    ):
        with pytest.raises(UserError, match=message):
            find_weights(kind, name)

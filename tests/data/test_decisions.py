"""Decisions by people: a plain table that comes before the rules, and that bad rows do not end."""

import pytest

from harmony.core.errors import UserError
from harmony.data.sources.decisions import Decision, apply_decisions, change_decisions, decisions_file, read_decisions
from harmony.data.sources.open_images.select import select
from harmony.data.sources.selection import Rules
from harmony.data.stamps import has_changed, write_stamps


def test_a_table_that_people_edit(tmp_path, capsys):
    file = decisions_file(tmp_path / "photos")
    assert file == tmp_path / "photos.decisions.csv" and read_decisions(file) == {}
    change_decisions(file, {"train/a": Decision("reject", 'blurred, "really"'), "train/b": Decision("keep")})
    change_decisions(file, {"train/b": None, "test/c": Decision("keep", "fine")})
    assert file.read_text() == 'sample,decision,reason\ntrain/a,reject,"blurred, ""really"""\ntest/c,keep,fine\n'
    file.write_text(file.read_text() + "train/d,perhaps,\n,keep,\ntrain/e, Keep\n")
    expected = {"test/c": "keep: fine", "train/a": 'reject: blurred, "really"', "train/e": "keep"}
    assert {key: str(decision) for key, decision in read_decisions(file).items()} == expected
    assert "rows without a sample and keep or reject: 2 left out: row 4, row 5" in capsys.readouterr().out


def test_a_change_leaves_the_rows_of_people(tmp_path):
    """Guards their work against one click in the App: spreadsheets write ``;``, and not every row can be read."""
    file = decisions_file(tmp_path / "photos")
    file.write_text("Sample; DECISION ;Reason;who\ntrain/a;Keep;fine;me\ntrain/b;perhaps;look, again;me\n;reject\n")
    decisions = change_decisions(file, {"train/c": Decision("reject", "dark"), "train/a": None})
    assert decisions == {"train/c": Decision("reject", "dark")} == read_decisions(file)
    rows = "Sample; DECISION ;Reason;who\ntrain/b;perhaps;look, again;me\n;reject\ntrain/c;reject;dark;\n"
    assert file.read_text() == rows
    for text in ("train/a,keep,fine\n", "sample,choice,reason\ntrain/a,keep,fine\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="first line must be sample,decision,reason"):
            change_decisions(file, {"train/c": Decision("keep")})
        assert file.read_text() == text
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="is no file"):
        read_decisions(file)


def test_a_hand_overrides_rules_but_not_damage(tmp_path, make_folder, capsys):
    folder = make_folder(tmp_path)
    for id_ in ("a0", "a1"):
        folder.single(id_)
    folder.single("b0", group=1)
    folder.single("b1", truncated=1)
    folder.single("b2", group=1)
    folder.box("c0")
    folder.image("c0")
    folder.write()
    (folder.folder / "data" / "b2.jpg").unlink()
    selection = select(tmp_path, ["train"], Rules())
    choices = {"a1": "reject", "b0": "keep", "b1": "reject", "b2": "keep", "c0": "keep", "zz": "keep"}
    changed = apply_decisions(selection, {f"train/{id_}": Decision(choice) for id_, choice in choices.items()})
    assert dict(changed.table.select("id", "reason").iter_rows()) == {
        "a0": "kept",
        "a1": "by hand",
        "b0": "kept",
        "b1": "by hand",
        "b2": "image file missing",
        "c0": "box without mask",
    }
    out = capsys.readouterr().out
    assert "by hand: 1 kept, 2 rejected" in out
    assert "none that can be kept: 3: train/b2, train/c0, train/zz" in out
    assert changed.table.columns == selection.table.columns and changed.table.schema == selection.table.schema
    assert changed.counts()["train"]["by hand"] == 2
    assert apply_decisions(selection, {}) is selection


def test_a_decision_is_noticed_as_a_changed_file_is(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    write_stamps(folder, [decisions_file(folder)])
    assert not has_changed(folder)
    change_decisions(decisions_file(folder), {"train/a": Decision("keep")})
    assert has_changed(folder)

"""User studies: the scores are Bradley and Terry's, bad answers are named, and the page works in a real browser."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.evaluation import user_study
from harmony.evaluation.answers import (
    Answer,
    Rater,
    answer_files,
    compare_orders,
    compare_people,
    compare_with_people,
    count_wins,
)
from harmony.evaluation.study import StudyRun
from harmony.evaluation.user_study import (
    PRIOR,
    TEMPLATE,
    UserStudy,
    bradley_terry,
    data_uri,
    intervals,
    results_of,
    with_maximum,
)
from harmony.pixels.images import write_image

TRUTH = np.array([0.9, 0.3, -0.2, -1.0])


def simulated(raters: int, each: int, seed: int) -> np.ndarray:
    """Wins (R x K x K) of raters who choose as Bradley and Terry say, by TRUTH."""
    rng, wins = np.random.default_rng(seed), np.zeros((raters, len(TRUTH), len(TRUTH)))
    for rater in range(raters):
        for _ in range(each):
            i, j = rng.choice(len(TRUTH), 2, replace=False)
            first = rng.random() < 1 / (1 + np.exp(TRUTH[j] - TRUTH[i]))
            wins[rater, i if first else j, j if first else i] += 1
    return wins


# --- Bradley-Terry


def test_two_methods_are_a_logit():
    """Golden: 7 of 10 wins are a lead of log(7 / 3), shared out around 0; in a batch as alone."""
    wins = np.array([[0.0, 7.0], [3.0, 0.0]])
    lead = np.log(7 / 3)
    assert bradley_terry(wins) == pytest.approx([lead / 2, -lead / 2], abs=1e-12)
    assert bradley_terry(np.stack([wins, wins.T]))[1] == pytest.approx([-lead / 2, lead / 2], abs=1e-12)


def test_known_strengths_are_found_again():
    """Guards the fit: the truth from many choices, and what logistic regression finds on the same ones."""
    from sklearn.linear_model import LogisticRegression

    wins = simulated(1, 8000, seed=0)[0]
    scores = bradley_terry(wins)
    assert scores == pytest.approx(TRUTH, abs=0.1) and scores.sum() == pytest.approx(0, abs=1e-9)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    met = np.array([np.eye(4)[i] - np.eye(4)[j] for i, j in pairs])[:, :3]  # leads over the last method are fitted
    met = np.concatenate([met, -met])  # scikit-learn wants to see either outcome
    weights = np.tile([wins[i, j] for i, j in pairs], 2)
    won = np.repeat([1, 0], len(pairs))
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(met, won, weights).coef_[0]
    assert scores[:3] - scores[3] == pytest.approx(fitted, abs=1e-5)


def test_intervals_hold_the_truth():
    """Guards the bootstrap: of 95 % intervals over 20 raters nearly all hold it, and more raters make them narrower."""
    found = [intervals(simulated(20, 30, seed), seed, draws=200) for seed in range(12)]
    assert np.mean([(low <= TRUTH) & (TRUTH <= high) for low, high in found]) > 0.85
    (low, high), (few_low, few_high) = found[0], intervals(simulated(5, 30, 0), 0, draws=200)
    assert (high - low).mean() < 0.75 * (few_high - few_low).mean()
    assert (intervals(simulated(20, 30, 0), 0, draws=200) == found[0]).all()


def test_where_no_maximum_exists():
    """Guards the limits: one that never lost, and one that was never met, get finite scores by the stated prior."""
    assert with_maximum(wins := simulated(1, 200, 0)[0]) is wins
    never = np.array([[0.0, 10.0], [0.0, 0.0]])
    high, low = bradley_terry(with_maximum(never))
    assert high - low == pytest.approx(np.log((10 + PRIOR) / PRIOR))
    apart = np.zeros((3, 3))
    apart[0, 1] = apart[1, 0] = 4
    assert bradley_terry(with_maximum(apart)) == pytest.approx([0, 0, 0], abs=1e-6)


# --- folders


@pytest.fixture
def spec(tmp_path) -> dict:
    """The options of the study for two runs of harmonize and one plain folder, two pictures of 64 px each; the plain
    folder has none of the third.
    """
    rng = np.random.default_rng(0)
    for name in ("0000", "0001", "0002"):
        for method in ("ours", "paper"):
            folder = tmp_path / method / name
            folder.mkdir(parents=True)
            write_image(folder / "harmonized.png", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            write_image(folder / "composite.png", np.full((64, 64, 3), 90, np.uint8))
    (tmp_path / "plain").mkdir()
    for name in ("0000.png", "0001.jpg"):
        write_image(tmp_path / "plain" / name, rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    methods = {method: str(tmp_path / method) for method in ("ours", "paper", "plain")}
    asked = {
        "question": "Which looks more real?",
        "reference": "composite",
        "trials": None,
        "pixelated": False,
        "judge": None,
        "judgments": str(tmp_path / "judgments"),
    }
    return {"methods": methods, "answers": None} | asked


@pytest.fixture
def study(spec, tmp_path):
    """``study(**changes)``: the study of ``spec``, writing into ``run``."""
    return lambda **changes: UserStudy(StudyRun("user_study", tmp_path / "run"), **spec | changes)


def test_only_common_pictures_are_shown(study, spec, tmp_path):
    """Guards the comparison: names that all methods have, the others named; as many trials as asked for."""
    first = study()
    assert first.pictures == ["0000", "0001"] and first.trials == 6 and len(first.references) == 2
    assert first.notes == ["left out, missing in some methods: 0002 (plain)"]
    assert study(trials=4).trials == 4 and study(trials=40).trials == 6
    assert UserStudy(StudyRun("user_study", tmp_path, limit=1), **spec).pictures == ["0000"]
    assert study(reference=None).references == {}
    other = study(reference=str(tmp_path / "plain"))
    assert [file.name for file in other.references.values()] == ["0000.png", "0001.jpg"]


def test_a_study_is_what_it_is_made_of(study, tmp_path):
    """Guards answers against other pictures: other question, look or pixels make another study, fewer trials do not."""
    first = study().id
    assert study().id == study(trials=3).id == first
    assert len({first, study(question="Which is nicer?").id, study(pixelated=True).id, study(reference=None).id}) == 4
    write_image(tmp_path / "plain" / "0000.png", np.zeros((64, 64, 3), np.uint8))
    assert study().id != first


def test_the_page_tells_nothing_and_needs_nothing(study):
    """Guards blindness and privacy: one small template, every picture inside, no name of a method, no address; and a
    question cannot break out of its place.
    """
    page = study(question="</script><b>Which & what?").page()
    assert TEMPLATE.stat().st_size < 15_000
    tells = ("ours", "paper", "plain", "http://", "https://", "</script><b>", "import ")
    assert not any(word in page for word in tells)
    assert page.count("data:image/png;base64,") == 2 * 2 + 1 + 2 and page.count("data:image/jpeg;base64,") == 1
    first, second = study(), study()
    assert first.page() == second.page()


def test_folders_that_cannot_be_compared(study, spec, tmp_path):
    """Guards bad input: one line that names folder, picture or key."""

    def refused(said: str, **changes):
        with pytest.raises(UserError, match=said) as caught:
            study(**changes)
        assert "\n" not in str(caught.value)

    methods, plain = spec["methods"], tmp_path / "plain"
    for few in (None, {}, {"ours": methods["ours"]}, {"ours": methods["ours"], "paper": None}):
        refused("give at least two folders", methods=few)
    refused("study.methods.paper=.*nowhere: there is no such folder", methods=methods | {"paper": "nowhere"})
    (tmp_path / "empty").mkdir()
    refused("empty has neither NAME/harmonized.png nor", methods=methods | {"paper": str(tmp_path / "empty")})
    refused("harmonize dir=FOLDER makes many", methods=methods | {"paper": str(tmp_path / "ours" / "0000")})
    refused("study.trials=0: give a whole number", trials=0)
    refused("study.question is empty", question=" ")
    refused("study.reference=True", reference=True)
    refused("study.answers=", answers=[3])
    with pytest.raises(UserError, match="limit=0: give a whole number"):
        UserStudy(StudyRun("user_study", tmp_path, limit=0), **spec)
    write_image(tmp_path / "empty" / "other.png", np.zeros((64, 64, 3), np.uint8))
    others = {"ours": methods["ours"], "other": str(tmp_path / "empty")}
    refused("no picture has the same name in all of ours, other", methods=others)
    shutil.copy(plain / "0000.png", plain / "0001.png")
    refused("both 0001.jpg and 0001.png|both 0001.png and 0001.jpg")
    (plain / "0001.jpg").unlink()
    write_image(plain / "0001.png", np.zeros((32, 64, 3), np.uint8))
    refused("picture 0001 is 64 x 64 in ours, 64 x 64 in paper, 64 x 32 in plain")
    (plain / "0001.png").write_text("no picture")
    refused("0001.png cannot be decoded")


# --- answers


def record_of(study: UserStudy, rater: str, best: str | None = "ours", swapped: float = 0.0) -> dict:
    """Answers as the page hands them out: ``best`` is always chosen, else the first, the other way round by chance."""
    code = {method: code for code, method in study.codes.items()}
    rng, answers = np.random.default_rng(int(rater, 16)), []
    for picture in study.pictures:
        for pair in combinations(study.methods, 2):
            left, right = rng.permutation(pair).tolist()
            chosen = best if best in pair else pair[0]
            if rng.random() < swapped:
                chosen = pair[0] if chosen == pair[1] else pair[1]
            sides = {"left": code[left], "right": code[right], "chosen": code[chosen]}
            answers.append({"picture": picture, **sides, "milliseconds": 900})
    return {"schema": 1, "study": study.id, "rater": rater, "seed": 1, "answers": answers}


@pytest.fixture
def answered(tmp_path):
    """``answered(record, name)``: write a file of answers; returns the folder of all."""

    def write(record, name: str | None = None) -> Path:
        folder = tmp_path / "answers"
        folder.mkdir(exist_ok=True)
        text = record if isinstance(record, str) else json.dumps(record)
        (folder / (name or f"answers_{record['rater']}.json")).write_text(text)
        return folder

    return write


def test_wins_are_counted_by_who_was_chosen():
    answers = [Answer("p", "a", "b", "b", 1), Answer("p", "b", "c", "b", 1), Answer("q", "b", "a", "a", 1)]
    assert count_wins(answers, ["a", "b", "c"]).tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_scores_of_several_raters(study, answered, tmp_path):
    """Guards the table: scores, intervals, shares and numbers of all raters; the notes say who chose, and how sure it
    is.
    """
    for rater in range(12):
        folder = answered(record_of(study(), f"{rater:x}", swapped=0.25))
    report = study(answers=str(folder)).measure()
    flat, facts, text, drawn = report.figures, report.facts, report.text, report.pictures
    head, *rows = (tmp_path / "run" / "table.csv").read_text().splitlines()
    assert head == "method,score,low,high,win_share,comparisons" and len(rows) == 3
    table = {row.split(",")[0]: [float(cell) for cell in row.split(",")[1:]] for row in rows}
    assert all(low <= score <= high and met == 48 for score, low, high, _, met in table.values())
    assert sum(row[0] for row in table.values()) == pytest.approx(0, abs=1e-5)
    assert table["ours"][3] == max(row[3] for row in table.values()) > 0.6
    assert table["ours"][0] == pytest.approx(flat["ours/score"], abs=1e-5) and flat["paper/comparisons"] == 48
    assert "raters: 12, answers: 72" in text and "bootstrap over 12 raters" in text and "strongly" not in text
    assert "too narrow" not in text and "0.9 s each" in text and str(tmp_path / "run" / "study.html") in text
    assert drawn == [tmp_path / "run" / "figure.png"] and drawn[0].stat().st_size > 5000
    assert facts["study"] == study().id and len(facts["raters"]) == 12
    assert json.loads((tmp_path / "run" / "study.json").read_text())["methods"] == study().codes


def test_one_rater_and_no_maximum(study, answered, tmp_path):
    """Guards small studies: one rater's answers are drawn instead, and that a method never lost is said."""
    file = answered(record_of(study(), "ab")) / "answers_ab.json"
    report = study(answers=[str(file)]).measure()
    flat, text = report.figures, report.text
    assert flat["ours/win_share"] == 1 and np.isfinite(flat["ours/score"]) and flat["ours/high"] >= flat["ours/low"]
    assert "not strongly connected" in text and "0.5 wins each way" in text and "the answers of one rater" in text
    answered(record_of(study(), "cd"))
    assert "with fewer than 10 raters" in study(answers=str(file.parent)).measure().text


def test_without_answers_there_is_a_page_alone(study, tmp_path):
    """Guards the first step: no scores, where the page is, and how to go on."""
    report = study().measure()
    flat, text, drawn = report.figures, report.text, report.pictures
    assert flat == {"ours/comparisons": 0, "paper/comparisons": 0, "plain/comparisons": 0} and drawn == []
    assert (tmp_path / "run" / "table.csv").read_text() == "method,comparisons\nours,0\npaper,0\nplain,0\n"
    assert "no scores by people yet" in text and "study.answers=FOLDER" in text
    assert text.splitlines()[-1] == str(tmp_path / "run" / "study.html")


def test_answers_that_are_none(study, answered, tmp_path):
    """Guards the scores: whatever is not an answer to this very page is refused in one line that names the file."""
    good = record_of(study(), "ab")

    def refused(said: str, record, **first):
        """``record`` is the file, or, with ``first``, its first answer is changed so."""
        if first:
            record = good | {"answers": [good["answers"][0] | first, *good["answers"][1:]]}
        folder = answered(record, "answers_x.json")
        with pytest.raises(UserError, match=f"answers_x.json.*{said}") as caught:
            study(answers=str(folder)).measure()
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()

    refused("cannot be read as JSON", "{")
    refused("cannot be read as JSON", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1") + "{")
    refused("holds no answers of a user study", "[]")
    refused("holds no answers of a user study", good | {"schema": 2})
    refused(f"belongs to study beef, this is {study().id}", good | {"study": "beef"})
    refused("names no rater", good | {"rater": None})
    refused("holds no answers", good | {"answers": []})
    refused("answer 0 holds other keys", good | {"answers": [[]]})
    refused("answer 0 is of an unknown picture '0009'", None, picture="0009")
    refused("answer 0 is of an unknown method 'ours'", None, left="ours")
    refused("answer 0 is of an unknown method \\[\\]", None, right=[])
    refused("answer 0 does not choose", None, chosen="ours")
    refused("answer 0 does not choose", None, right=good["answers"][0]["left"])
    refused("answer 0 has no time", None, milliseconds="900")
    refused("answer 6 repeats an earlier one", good | {"answers": [*good["answers"], good["answers"][0]]})
    folder = answered(good, "answers_x.json")
    answered(good, "answers_y.json")
    with pytest.raises(UserError, match="answers_x.json and .*answers_y.json are both of rater ab"):
        study(answers=str(folder)).measure()
    (tmp_path / "none").mkdir()
    for place, said in (("none", "there are no .json files"), ("gone.json", "does not exist")):
        with pytest.raises(UserError, match=said):
            study(answers=str(tmp_path / place)).measure()
    assert answer_files([str(folder), str(folder / "answers_x.json")])[-1].name == "answers_x.json"


# --- a vision-language model as the judge


@pytest.fixture
def judged(spec, study, tmp_path, chat_model):
    """``judged(**changes)``: the study with a judge, of two pictures by three methods: ours is bright, paper gray and
    plain dark.
    """
    for method, value in (("ours", 230), ("paper", 140), ("plain", 50)):
        for n, name in enumerate(("0000", "0001")):
            file = UserStudy(StudyRun("user_study", tmp_path / "run"), **spec).results[method][name]
            write_image(file, np.full((64, 64, 3), value + n, np.uint8))
    folder = chat_model()
    return lambda **changes: study(judge=str(folder), **changes)


def no_model(*arguments) -> None:
    raise AssertionError("the model was loaded")


def test_a_judge_answers_every_trial_in_both_orders(judged, study, sees_brightness, tmp_path):
    """Guards the judge's table: it prefers the brighter one wherever it stands, and the table says who chose."""
    report = judged().measure()
    assert len(sees_brightness) == 2 * 3 * 2
    figures, text = report.figures, report.text
    assert [figures[f"{method}/judge/win_share"] for method in ("ours", "paper", "plain")] == [1, 0.5, 0]
    assert figures["ours/judge/score"] > figures["paper/judge/score"] > figures["plain/judge/score"]
    assert figures["ours/judge/comparisons"] == 8 and "ours/score" not in figures
    same = {"judge/consistency": 1, "judge/consistency_se": 0, "judge/consistency_n": 6}
    assert {name: value for name, value in figures.items() if name.count("/") == 1} == same
    assert f"by {tmp_path / 'vlm'}, not by people; answers: 12 (50% the first one)" in text
    assert "bootstrap over 2 pictures" in text and "no scores by people yet" in text and "majority" not in text
    assert report.pictures[0].stat().st_size > 5000
    head, *rows = (tmp_path / "run" / "table.csv").read_text().splitlines()
    columns = "judge/score,judge/low,judge/high,judge/win_share,judge/comparisons"
    assert head == f"method,{columns}" and len(rows) == 3


def test_a_judge_that_sees_nothing_is_inconsistent(judged):
    """Guards position bias: a real model to which both words are equally likely says first, in either order; nobody
    wins, and that is said.
    """
    report = judged().measure()
    figures, text = report.figures, report.text
    assert figures["judge/consistency"] == 0 and "(100% the first one)" in text
    assert [figures[f"{method}/judge/win_share"] for method in ("ours", "paper", "plain")] == [0.5] * 3
    assert [figures[f"{method}/judge/score"] for method in ("ours", "paper", "plain")] == pytest.approx([0] * 3)
    assert "in 0% ±0.0% (n = 6) of the trials the same choice in both orders" in text and "position bias" in text


def test_a_judge_is_compared_with_people(judged, answered, sees_brightness):
    """Guards the agreement: people and judge side by side, never in one score; the trials without a majority, here all
    that are not of ours, count for nothing.
    """
    for rater in ("a", "b"):
        record = record_of(judged(), rater)
        for answer in record["answers"]:
            if judged().codes[answer["chosen"]] != "ours":
                answer["chosen"] = answer["left" if (rater == "a") == (answer["left"] < answer["right"]) else "right"]
        folder = answered(record)
    report = judged(answers=str(folder)).measure()
    figures, text = report.figures, report.text
    assert figures["ours/win_share"] == 1 and figures["ours/comparisons"] == 8
    assert figures["paper/win_share"] == figures["plain/win_share"] == 0.25
    assert figures["paper/judge/win_share"] == 0.5 and figures["paper/judge/comparisons"] == 8
    assert figures["judge/agreement"] == 1 and figures["judge/agreement_n"] == 4
    assert figures["people/agreement"] == pytest.approx(2 / 3) and figures["people/agreement_n"] == 12
    assert figures["people/agreement_se"] == pytest.approx((2 / 3 / 3 / 12) ** 0.5)
    assert "raters: 2, answers: 12" in text and "100% ±0.0% (n = 4) of the trials that have a majority" in text
    assert "for comparison: one person chooses as most of the others do in 67% ±13.6% (n = 12)" in text
    assert "no scores by people" not in text


def test_an_error_of_one_question_ends_the_run(judged, answered, sees_brightness, monkeypatch):
    """Guards several processes: the one that fails says why, instead of leaving the others to wait for its answers."""
    folder = answered(record_of(judged(), "a0"))
    monkeypatch.setattr(user_study.VisionLanguageJudge, "choose", Mock(side_effect=UserError("out of memory")))
    with pytest.raises(UserError, match="out of memory"):
        judged(answers=str(folder)).measure()
    monkeypatch.setattr(user_study, "identify_model", Mock(side_effect=UserError("no such model")))
    assert "judge: left out, no such model" in judged(answers=str(folder)).measure().text


def test_kept_answers_are_not_asked_for_again(judged, sees_brightness, spec, monkeypatch):
    """Guards hours of a GPU: the same command, other orders of the methods and fewer of them load no model; a question
    in other words, other pictures and another model do.
    """
    first = judged().measure()
    assert len(sees_brightness) == 12
    with monkeypatch.context() as patch:
        patch.setattr(user_study, "VisionLanguageJudge", no_model)
        second = judged().measure()
        assert (second.text, second.figures) == (first.text, first.figures)
        methods = spec["methods"]
        reverse = judged(methods=dict(reversed(methods.items()))).measure().figures
        assert reverse["ours/judge/win_share"] == 1 and reverse["plain/judge/win_share"] == 0
        judged(methods={name: methods[name] for name in ("plain", "ours")}).measure()
        with pytest.raises(AssertionError, match="was loaded"):
            judged(question="Which is brighter?").measure()
    judged(reference=None).measure()
    assert len(sees_brightness) == 24
    write_image(judged().results["plain"]["0000"], np.zeros((64, 64, 3), np.uint8))
    judged().measure()
    assert len(sees_brightness) == 24 + 4  # of one picture, with two others in both orders
    weights = Path(judged().judge) / "chat_template.jinja"
    weights.write_text(weights.read_text() + " ")
    judged().measure()
    assert len(sees_brightness) == 28 + 12


def test_an_interrupted_judge_goes_on(judged, sees_brightness, monkeypatch, tmp_path, capsys):
    """Guards Ctrl-C: what was answered is kept, and nothing half-written."""
    usual = user_study.VisionLanguageJudge.choose
    with monkeypatch.context() as patch:
        patch.setattr(
            user_study.VisionLanguageJudge, "choose",
            lambda *args: 1 / 0 if len(sees_brightness) == 5 else usual(*args),
        )  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            judged().measure()
    assert len(list((tmp_path / "judgments").rglob("*.*"))) == 5 and not (tmp_path / "run").exists()
    assert judged().measure().figures["judge/consistency"] == 1 and len(sees_brightness) == 12
    assert "judge: 7/7 questions" in capsys.readouterr().out


def test_processes_share_the_questions(judged, sees_brightness, spec, tmp_path):
    """Guards torchrun: two processes ask each question once; the first one reports."""
    studies = [
        UserStudy(StudyRun("user_study", tmp_path / "run", rank=rank, world=2), **spec | {"judge": judged().judge})
        for rank in (0, 1)
    ]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(UserStudy.measure, studies)
    assert len(sees_brightness) == 12 and first.figures["judge/consistency_n"] == 6 and second.figures == {}


def test_answers_of_a_judge_are_read_again(judged, study, answered, sees_brightness, tmp_path):
    """Guards the format: a judge's files, made where the GPU is, stand in for the model elsewhere, alone and beside
    people's; they are never taken for people, nor two judges for one.
    """
    asked = judged().measure()
    (tmp_path / "run" / "judge").rename(tmp_path / "kept")
    names = [json.loads(file.read_text())["rater"] for file in sorted((tmp_path / "kept").iterdir())]
    assert names == [f"{tmp_path / 'vlm'} in order {n}" for n in (1, 2)]
    again = study(answers=str(tmp_path / "kept")).measure()
    assert again.figures == asked.figures and again.text == asked.text
    people = answered(record_of(study(), "ab"))
    both = study(answers=[str(tmp_path / "kept"), str(people)]).measure()
    assert both.figures["ours/comparisons"] == 4 and both.figures["ours/judge/comparisons"] == 8
    assert both.figures["judge/agreement_n"] == 6
    with pytest.raises(UserError, match="answers_..json holds answers of .*vlm, and there is another judge"):
        judged(answers=str(tmp_path / "kept")).measure()
    other = json.loads((tmp_path / "kept" / "answers_1.json").read_text()) | {"model": "other", "rater": "other"}
    (tmp_path / "kept" / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="answers_..json holds answers of .*there is another judge"):
        study(answers=str(tmp_path / "kept")).measure()
    (tmp_path / "kept" / "other.json").write_text(json.dumps(other | {"model": 3}))
    with pytest.raises(UserError, match="other.json names no rater"):
        study(answers=str(tmp_path / "kept")).measure()


def test_a_judge_that_cannot_be_had(study, judged, answered, tmp_path, sees_brightness):
    """Guards what is left without a network: one line where the judge alone was asked for, before anything is written;
    where there are people's answers, their table with that line.
    """
    folder = answered(record_of(study(), "ab"))
    (tmp_path / "empty").mkdir()
    reasons = {"someone/vlm": "cannot be fetched", str(tmp_path / "empty"): "no vision-language model"}
    for judge, said in reasons.items():
        with pytest.raises(UserError, match=f"study.judge={judge}: {said}") as error:
            study(judge=judge).measure()
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    for judge, said in reasons.items():
        report = study(judge=judge, answers=str(folder)).measure()
        assert f"judge: left out, study.judge={judge}: {said}" in report.text
        assert report.figures == study(answers=str(folder)).measure().figures


def test_a_damaged_kept_answer_is_named(judged, sees_brightness, tmp_path):
    """Guards the table: a file that was changed by hand is no answer, and the line says what to do."""
    judged().measure()
    file = next((tmp_path / "judgments").rglob("*.json"))
    for content in ("[]", '{"chosen": 2, "milliseconds": 1}', '{"chosen": 1}'):
        file.write_text(content)
        with pytest.raises(UserError, match=f"{file} holds no answer of a judge: delete it"):
            judged().measure()
    file.unlink()
    assert judged().measure().figures["judge/consistency"] == 1


def test_who_agrees_with_whom():
    """Golden: by hand, three people and a judge on four pictures of two methods."""

    def rater(chosen: str, swapped: bool = False) -> Rater:
        sides = ("b", "a") if swapped else ("a", "b")
        return Rater("", [Answer(str(n), *sides, method, 1) for n, method in enumerate(chosen) if method != "-"])

    people = [rater("aaab"), rater("aab-"), rater("abb-")]  # the majority: a, a, b, b
    judge = [*rater("abba").answers, *rater("abab", swapped=True).answers]  # the same in both orders: a, b
    assert compare_orders(judge) == pytest.approx((0.5, 0.25, 4))
    assert compare_with_people(judge, people) == pytest.approx((0.5, 0.5 / 2**0.5, 2))
    # the others have a majority for all three on picture 0 (a), the third on 1 (a, not b), the first on 2 (b, not a)
    assert compare_people(people) == pytest.approx((3 / 5, (3 / 5 * 2 / 5 / 5) ** 0.5, 5))
    assert compare_people(people[:1]) is None and compare_with_people(judge, []) is None
    assert compare_orders(rater("ab").answers) is None


# --- the page in a browser


@pytest.fixture
def shown(study, tmp_path):
    """``shown(browser)``: what is to be seen; methods are told by their pixels, as no name is on the page."""
    names = {}
    for method, files in study().results.items():
        names |= {data_uri(file): (method, name) for name, file in files.items()}

    def look(browser) -> dict:
        left, right = (names[browser.read(f"at('{side}').firstChild.src")] for side in ("left", "right"))
        assert left[1] == right[1] and left[0] != right[0]
        count = browser.read("at('count').textContent")
        return {"left": left[0], "right": right[0], "picture": left[1], "count": count}

    return look


def test_a_rater_goes_through_the_page(browser, study, shown, tmp_path, capsys):
    """Guards the whole way: keys through all trials, a reload in the middle, an answer taken back, a held key that
    answers once, the file, and the table of it; nothing is fetched and nothing fails on the way.
    """
    from harmony import evaluate
    from harmony.cli.compose import compose

    study().measure()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
    browser.open(tmp_path / "run" / "study.html", "typeof trials == 'object' && began !== null")
    assert browser.read("at('question').textContent") == "Which looks more real?"
    wide = [browser.read(f"at('{side}').firstChild.getBoundingClientRect().width") for side in ("left", "right")]
    assert wide[0] == wide[1] > 250 and browser.read("document.documentElement.scrollHeight <= innerHeight")
    told = []

    def answer(keys=("ArrowLeft", "ArrowRight")) -> None:
        """Choose ours where it is, else paper."""
        seen = shown(browser)
        best = "ours" if "ours" in (seen["left"], seen["right"]) else "paper"
        told.append(seen | {"chosen": best})
        browser.press(keys[best == seen["right"]])
        browser.until("began !== null || !at('end').hidden")

    answer()
    answer(("a", "l"))
    browser.press("ArrowLeft", autoRepeat=True)
    answer()
    before = shown(browser)
    assert before["count"] == "3 of 6"
    browser.open(tmp_path / "run" / "study.html", "typeof trials == 'object' && began !== null")
    assert shown(browser) == before
    browser.press("Backspace")
    browser.until("began !== null")
    taken = told.pop()
    assert taken == shown(browser) | {"chosen": taken["chosen"]} and taken["count"] == "2 of 6"
    for _ in range(4):
        answer()
    assert browser.read("at('count').textContent") == "6 of 6" and browser.read("at('trial').hidden")
    browser.press("ArrowLeft")
    browser.press("Enter")
    browser.until("!at('anew').disabled")
    end = time.monotonic() + 60
    while not (files := list((tmp_path / "saved").glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.05)
    record = json.loads(files[0].read_text())
    assert files[0].name == f"answers_{record['rater']}.json" and record["study"] == study().id
    assert record["schema"] == 1 and isinstance(record["seed"], int)
    code = {method: code for code, method in study().codes.items()}
    sides = ("left", "right", "chosen")
    assert [[a["picture"], *(a[s] for s in sides)] for a in record["answers"]] == [
        [t["picture"], *(code[t[s]] for s in sides)] for t in told
    ]
    assert all(0 <= a["milliseconds"] < 60_000 for a in record["answers"])

    methods = ", ".join(f"{method}: {tmp_path / method}" for method in study().methods)
    words = ["experiment=user_study", f"study.methods={{{methods}}}", f"study.answers={tmp_path / 'saved'}"]
    words += ["study.question='Which looks more real?'", f"paths.runs={tmp_path / 'runs'}", "logger=none"]
    evaluate.main(compose("evaluate", words))
    (folder,) = (tmp_path / "runs" / "user_study").iterdir()
    rows = [row.split(",") for row in (folder / "table.csv").read_text().splitlines()]
    assert {row[0]: row[4:] for row in rows[1:]} == {"ours": ["1", "4"], "paper": ["0.5", "4"], "plain": ["0", "4"]}
    assert "not strongly connected" in capsys.readouterr().out

    events = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    addresses = {event["request"]["url"].split(":")[0] for event in events}
    assert addresses <= {"file", "data", "blob"} and "file" in addresses
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]


def test_order_and_sides_follow_from_the_seed(browser, study, tmp_path):
    """Guards the design: every picture with every pair once, one order for a seed, others for others, sides balanced; a
    shorter session is the beginning of the longer one; and another person begins anew.
    """
    study(trials=4).measure()
    browser.open(tmp_path / "run" / "study.html", "typeof trials == 'object' && began !== null")
    assert browser.read("at('count').textContent") == "0 of 4"
    brief = "study.trials = {}; trialsOf({}).map(t => [t.picture.name, t.left, t.right])"
    orders = [browser.read(brief.format(6, seed)) for seed in range(200)]
    every = {(name, pair) for name in ("0000", "0001") for pair in combinations(range(3), 2)}
    assert all({(name, tuple(sorted(pair))) for name, *pair in order} == every for order in orders)
    assert browser.read(brief.format(6, 7)) == orders[7] and browser.read(brief.format(4, 7)) == orders[7][:4]
    assert len({str(order) for order in orders}) > 190
    assert np.mean([left < right for order in orders for _, left, right in order]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([order[0][0] == "0000" for order in orders]) == pytest.approx(0.5, abs=0.12)
    first = browser.read("[state.rater, state.seed]")
    browser.press("ArrowLeft")
    browser.read("anew()")
    assert browser.read("state.answers.length") == 0
    assert all(a != b for a, b in zip(first, browser.read("[state.rater, state.seed]"), strict=True))


def test_results_are_found_in_both_forms(tmp_path):
    """Guards a run's own sheet.png, which is no result."""
    folder = tmp_path / "run" / "0007"
    folder.mkdir(parents=True)
    picture = np.zeros((4, 4, 3), np.uint8)
    write_image(folder / "harmonized.png", picture)
    write_image(folder.parent / "sheet.png", picture)
    assert results_of(folder.parent, "key") == {"0007": folder / "harmonized.png"}

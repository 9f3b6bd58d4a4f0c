"""Judges that are vision-language models: what they are shown and asked, and how their answer is read."""

import numpy as np
import pytest
import torch

from harmony.core.errors import UserError
from harmony.models.vision_language import (
    FORM,
    LABELS,
    REFERENCE,
    SIDE,
    VisionLanguageJudge,
    identify_model,
    load_vision_language_model,
    to_part,
)

WORDS = " ".join(["first second Which?", REFERENCE, *LABELS, FORM])
DARK, GRAY, BRIGHT = (np.full((12, 8, 3), value, np.uint8) for value in (40, 128, 220))


def judge_of(folder) -> VisionLanguageJudge:
    return VisionLanguageJudge(str(folder), "study.judge")


def test_a_judge_chooses_the_likelier_word(chat_model, sees_brightness):
    """Guards the answer: that of the word with the larger logit, whichever place the picture has."""
    judge = judge_of(chat_model(words=WORDS))
    assert judge.choose("Which?", (BRIGHT, DARK)) == 0 and judge.choose("Which?", (DARK, BRIGHT)) == 1
    assert judge.choose("Which?", (GRAY, DARK), BRIGHT) == 0 and judge.choose("Which?", (GRAY, BRIGHT), DARK) == 1


def test_what_a_judge_is_shown(chat_model, sees_brightness):
    """Guards the prompt of a real processor: the reference first, each picture behind its label, the question last."""
    judge = judge_of(chat_model(words=WORDS))
    judge.choose("Which?", (DARK, BRIGHT), GRAY)
    (inputs,) = sees_brightness
    patches = inputs["image_grid_thw"].prod(1).tolist()
    means = [picture.mean() for picture in inputs["pixel_values"].split(patches)]
    assert len(means) == 3 and means[1] < means[0] < means[2]
    text = judge.processor.tokenizer.decode(inputs["input_ids"][0]).replace("<|image_pad|>", "").split()
    picture = ["<|vision_start|>", "<|vision_end|>"]
    shown = [word for label in (REFERENCE, *LABELS) for word in (*label.split(), *picture)]
    assert " ".join(text).replace("><", "> <").split() == [*shown, "Which?", *FORM.split()]
    assert inputs["max_new_tokens"] == 1 and not inputs["do_sample"]


def test_a_judge_that_does_not_know_says_first(chat_model):
    """Guards a tie: always an answer, the same in each order, which the study then finds inconsistent."""
    judge = judge_of(chat_model())
    assert judge.choose("Which?", (BRIGHT, DARK)) == judge.choose("Which?", (DARK, BRIGHT)) == 0


def test_every_spelling_of_a_word_counts(chat_model):
    """Guards tokenizers that know a word in several forms: their probabilities add up."""
    judge = judge_of(chat_model(words="first First second"))
    ids = judge.processor.tokenizer.convert_tokens_to_ids(["first", "First", "second"])
    assert judge.tokens == [ids[:2], ids[2:]]
    logits = torch.zeros(16)
    logits[ids[2]] = 0.6  # less than ln 2, by which two forms of the other word are likelier than one
    judge.read_logits = lambda messages: logits
    assert judge.choose("Which?", (DARK, BRIGHT)) == 0
    logits[ids[2]] = 0.8
    assert judge.choose("Which?", (DARK, BRIGHT)) == 1


def test_large_pictures_are_shrunk():
    """Guards memory: a photograph of a camera would be ten thousands of tokens; small ones stay as they are."""
    assert to_part(np.zeros((3000, 2000, 3), np.uint8))["image"].size == (SIDE * 2 // 3, SIDE)
    assert to_part(np.zeros((12, 8, 3), np.uint8))["image"].size == (8, 12)


def test_models_that_cannot_judge(chat_model, tmp_path):
    """Guards study.judge=: another kind of model is one line that names the option and the reason."""

    def refused(said: str, folder):
        with pytest.raises(UserError, match=f"study.judge={folder}: {said}") as error:
            judge_of(folder).choose("Which?", (DARK, BRIGHT))
        assert "\n" not in str(error.value)

    refused("no vision-language model of transformers there", tmp_path / "nothing")
    refused("its processor has no chat template", chat_model(template=None))
    (tmp_path / "vlm" / "chat_template.jinja").unlink(missing_ok=True)
    refused("its tokenizer does not know first and second", chat_model(words="one two"))
    refused(
        "cannot take 2 pictures in one message .*concatenate", chat_model(template="{{ messages[0].content + '' }}")
    )
    refused("cannot take 2 pictures in one message", chat_model(template="Which?"))


def test_an_answer_of_nan_is_none(chat_model):
    """Guards weights that overflow: NaN is no choice."""
    judge = judge_of(chat_model())
    judge.read_logits = lambda messages: torch.full((16,), torch.nan)
    with pytest.raises(UserError, match="its answer holds NaN"):
        judge.choose("Which?", (DARK, BRIGHT))


def test_code_of_a_model_is_never_run(chat_model, bring_code):
    """Guards against foreign code: a model that brings its own is refused, without asking whoever sits there."""
    folder = chat_model()
    ran = bring_code(folder)
    with pytest.raises(UserError, match="no vision-language model of transformers there .*contains custom code"):
        load_vision_language_model(str(folder), "study.judge")
    assert not ran.exists()


def test_a_model_is_known_by_its_files(chat_model, tmp_path):
    """Guards kept answers: other weights or another chat template are another model, a README is not; a hub that cannot
    be reached is one line.
    """
    folder = chat_model()
    names = [identify_model(str(folder), "study.judge")]
    (folder / "README.md").write_text("words")
    assert identify_model(str(folder), "study.judge") == names[0]
    for file in ("model.safetensors", "chat_template.jinja"):
        (folder / file).write_bytes((folder / file).read_bytes() + b" ")
        names.append(identify_model(str(folder), "study.judge"))
    assert len(set(names)) == 3
    with pytest.raises(UserError, match="study.judge=someone/vlm: cannot be fetched") as error:
        identify_model("someone/vlm", "study.judge")  # tests are offline
    assert "\n" not in str(error.value)


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """Guards kept answers: the commit that the hub's cache holds, without reading the weights."""
    file = tmp_path / "snapshots" / "c0ffee" / "config.json"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, part: str(file))
    assert identify_model("someone/vlm", "study.judge") == "someone/vlm@c0ffee"

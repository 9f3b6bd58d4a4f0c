"""Captions: BLIP's prompt, batching and names on a tiny random BLIP; captions that people wrote."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GenerationConfig,
)

from harmony.core.errors import UserError
from harmony.data.captions import (
    caption_images,
    captioner_name,
    knows_photographs,
    label_caption,
    load_captioner,
    strip_prefix,
)
from harmony.data.sources.open_images.layout import Split
from harmony.models.shipped import ASSETS
from harmony.pixels.images import write_image

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "cat", "on", "grass", "snow", "the"]


@pytest.fixture
def captioner_folder(tmp_path):
    """A random BLIP of a few thousand parameters with a 14-word vocabulary, saved as a backbone saves it."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        text_config=small | ids | {"vocab_size": len(WORDS), "encoder_hidden_size": 16},
        vision_config=small | {"image_size": 16, "patch_size": 8},
    )
    folder = tmp_path / "backbone" / "captioner"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [(f"i{n}", tmp_path / f"i{n}.png") for n in range(5)]
    for _, path in paths:
        write_image(path, rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    return paths


def test_blip_captions_every_image_within_its_lengths_and_whatever_the_batch(captioner_folder, images):
    model, processor = load_captioner(captioner_folder)
    alone = dict(caption_images(images, model, processor, 1, "cpu"))
    together = dict(caption_images(images, model, processor, 2, "cpu"))
    assert list(alone) == [id_ for id_, _ in images]
    assert alone == together
    assert all(0 < len(text.split()) <= 16 and not text.startswith("a picture of") for text in alone.values())


def test_generation_settings_come_from_the_captioner_and_default_to_blips(captioner_folder, images, monkeypatch):
    model, processor = load_captioner(captioner_folder)
    asked = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: asked.append(kwargs) or generate(**kwargs))
    list(caption_images(images[:1], model, processor, 1, "cpu"))
    model.generation_config = GenerationConfig(prefix="", num_beams=1, max_length=7)
    model.save_pretrained(captioner_folder)
    model.generation_config = load_captioner(captioner_folder)[0].generation_config  # it survives the way to the disk
    list(caption_images(images[:1], model, processor, 1, "cpu"))
    settings = [(a["num_beams"], a["min_length"], a["max_length"], a["input_ids"].shape[1]) for a in asked]
    assert settings == [(3, 5, 20, 5), (3, 5, 7, 2)]  # prompt: [CLS] a picture of [SEP], or [CLS] [SEP]


def test_blips_published_configuration_does_not_turn_beam_search_off(captioner_folder, images, monkeypatch):
    """Guards the three beams where config.json says one, as that of the published BLIP does in its text part."""
    config = json.loads((captioner_folder / "config.json").read_text())
    config["text_config"]["num_beams"] = 1
    (captioner_folder / "config.json").write_text(json.dumps(config))
    (captioner_folder / "generation_config.json").unlink()
    model, processor = load_captioner(captioner_folder)
    beams, decoder = [], type(model.text_decoder)
    search = decoder._beam_search

    def note_beams(self, *given, generation_config, **options):
        beams.append(generation_config.num_beams)
        return search(self, *given, generation_config=generation_config, **options)

    monkeypatch.setattr(decoder, "_beam_search", note_beams)
    list(caption_images(images[:1], model, processor, 1, "cpu"))
    assert beams == [3]


def test_captions_stream_batch_by_batch(captioner_folder, images):
    model, processor = load_captioner(captioner_folder)
    images[2:] = [("lost", images[0][1].with_name("lost.png"))]
    stream = caption_images(images, model, processor, 2, "cpu")
    assert [next(stream)[0], next(stream)[0]] == ["i0", "i1"]  # reached before the missing file is
    with pytest.raises(UserError, match="lost.png"):
        next(stream)


def test_captioner_name_changes_with_the_weights(captioner_folder):
    before = captioner_name(captioner_folder)
    model, _ = load_captioner(captioner_folder)
    torch.nn.init.zeros_(next(model.parameters()))
    model.save_pretrained(captioner_folder)
    assert before.startswith("backbone@") and captioner_name(captioner_folder) != before
    assert captioner_name("someone/blip-large") == "someone/blip-large"


def test_missing_captioner_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no BLIP captioner") as error:
        load_captioner(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_prefix_is_stripped_once():
    assert strip_prefix("a picture of a picture of a cat", "a picture of") == "a picture of a cat"
    assert strip_prefix("a red cat", "") == "a red cat"


def test_what_a_label_says():
    labels = {"Cow": "a photo of a cow", "Animal": "a photo of an animal", "object": "", "/m/01": "", "": "", None: ""}
    assert {label: label_caption(label) for label in labels} == labels


def test_whether_a_captioner_knows_photographs(tmp_path):
    assert not knows_photographs(ASSETS / "tiny" / "captioner")
    assert knows_photographs(tmp_path) and knows_photographs("Salesforce/blip-image-captioning-large")
    for content, is_known in (("{}", True), ('{"photographs": true}', True), ('{"photographs": false}', False)):
        (tmp_path / "config.json").write_text(content)
        assert knows_photographs(tmp_path) == is_known


def test_captions_by_people(tmp_path, capsys):
    assert Split(tmp_path).captions() == {}
    path = tmp_path / "metadata" / "human_captions.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"a": ["first", "second"]}))
    assert Split(tmp_path).captions() == {"a": ["first", "second"]}
    path.write_text('{"a.jpg": "text", "b": [], "c": 5, "d": ["x", 5], "e.v2": ["y"]}')
    assert Split(tmp_path).captions() == {"a": ["text"], "e.v2": ["y"]}
    assert "human_captions.json: captions without a text or a picture: 3 left out: b, c, d\n" in capsys.readouterr().out
    for broken in ("{", "[1]"):
        path.write_text(broken)
        with pytest.raises(UserError, match="human_captions.json"):
            Split(tmp_path).captions()

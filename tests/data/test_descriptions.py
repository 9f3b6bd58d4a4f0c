"""Words for both lights: what people write, what files hold, what colors and CLIP say, what a model answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from harmony.core.errors import UserError
from harmony.data.descriptions import (
    LIGHTS,
    PLAIN_LIGHT,
    BrightnessMeter,
    Description,
    VisionLanguageModel,
    WordScorer,
    color_words,
    cut_object,
    light_phrase,
    parse_descriptions,
    read_descriptions,
    remove_object,
)
from harmony.models.backbone import Backbone
from harmony.models.clip import clip_of
from harmony.pixels.images import read_image
from harmony.pixels.masks import read_mask

ROOT = Path(__file__).resolve().parents[2]
MUG = Description("a mug", "warm light", "blue moonlight")


# --- words that were given


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a mug: warm light -> blue moonlight", [MUG]),
        ("  a  mug :warm   light->blue moonlight ; ", [MUG]),
        ("a mug: red: warm -> blue", [Description("a mug: red", "warm", "blue")]),
        ("a mug: warm light -> blue moonlight; a car: dim -> red", [MUG, Description("a car", "dim", "red")]),
    ],
)
def test_descriptions_are_read_as_people_write_them(text, found):
    """Guards prompts=: one or several, whatever the spaces, a last semicolon, a colon in the object."""
    assert parse_descriptions(text) == found


@pytest.mark.parametrize(
    "text",
    ["", " ; ", "a mug", "a mug: warm", "warm -> blue", ": warm -> blue", "a mug: -> blue", "a mug: warm ->"],
)
def test_other_forms_are_refused(text):
    """Guards prompts=: nothing, or a missing object, light or arrow, and the form is shown in one line."""
    with pytest.raises(UserError, match="OBJECT: its own light -> the light around it") as error:
        parse_descriptions(text)
    assert "\n" not in str(error.value)


def test_one_bad_description_among_good_ones_is_named():
    """Guards prompts= with several: the part that is wrong is said, not the whole."""
    with pytest.raises(UserError, match="prompts='a car': write"):
        parse_descriptions("a mug: warm -> blue; a car")


def write(folder: Path, data) -> Path:
    (folder / "words.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / "words.json"


def test_a_file_describes_each_picture_or_all(tmp_path):
    """Guards JSON files: by name, in the order of the file, or one list for every picture; outer spaces go."""
    mug, car = ({"object": f"a {what} ", "foreground": " warm light", "background": "dim"} for what in ("mug", "car"))
    file = write(tmp_path, {"one": [mug, car], "two": [car]})
    assert [d.object for d in read_descriptions(file, "one")] == ["a mug", "a car"]
    assert read_descriptions(file, "two") == [Description("a car", "warm light", "dim")]
    assert read_descriptions(write(tmp_path, {"one.jpg": [mug]}), "one")[0].object == "a mug"
    file = write(tmp_path, [mug])
    assert (
        read_descriptions(file, "one") == read_descriptions(file, "two") == [Description("a mug", "warm light", "dim")]
    )


def test_a_picture_that_a_file_leaves_out(tmp_path):
    """Guards the user who renamed a picture: the names that there are are said, and the one that is not."""
    file = write(tmp_path, {"one": [vars(MUG)], "two": [vars(MUG)]})
    with pytest.raises(UserError, match="describes one, two, but not three"):
        read_descriptions(file, "three")


@pytest.mark.parametrize(
    "data",
    [
        "null",
        "42",
        [],
        ["a mug"],
        {"one": "a mug: warm -> blue"},
        {"one": vars(MUG)},
        {"one": [{"object": "a mug", "foreground": "warm"}]},
        {"one": [vars(MUG) | {"background": " "}]},
        {"one": [vars(MUG) | {"object": None}]},
    ],
    ids=json.dumps,
)
def test_files_of_another_form_are_refused(tmp_path, data):
    """Guards the file: whatever JSON it holds, and a field that is missing, blank or null, ends in one clear line."""
    file = write(tmp_path, data)
    with pytest.raises(UserError, match="words.json"):
        read_descriptions(file, "one")


@pytest.mark.parametrize("data", [None, b"{", b"\xff\xfe\x00"], ids=["missing", "cut short", "not text"])
def test_files_that_cannot_be_read(tmp_path, data):
    """Guards the path: no file, no JSON, no text."""
    file = tmp_path / "words.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError, match="words.json cannot be read") as error:
        read_descriptions(file, "one")
    assert "\n" not in str(error.value)


# --- what can be seen


def test_both_prompts_begin_with_the_object():
    """Guards the order of words: the phrase of the object, then those for either light."""
    assert MUG.prompts == ("a mug warm light", "a mug blue moonlight")


def test_a_light_is_called_light_once():
    """Guards the phrases: moonlight and candlelight are lights already."""
    assert (
        light_phrase("warm", "sunset") == "warm sunset light" and light_phrase("blue", "moonlight") == "blue moonlight"
    )


@pytest.fixture
def scene():
    """(noise, an object in it)."""
    mask = np.zeros((24, 30), bool)
    mask[6:14, 8:20], mask[6, 8] = True, False
    return np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8), mask


def test_the_object_alone(scene):
    """Guards the view of the object: its box, its own pixels, and its mean where the photograph was."""
    image, mask = scene
    view = cut_object(image, mask)
    assert view.shape == (8, 12, 3) and np.array_equal(view[mask[6:14, 8:20]], image[mask])
    assert np.abs(view[0, 0] - image[mask].mean(0)).max() <= 0.5


def test_the_surroundings_alone(scene):
    """Guards the view of the photograph: bit for bit outside the object, and nothing of the object inside."""
    image, mask = scene
    other = np.where(mask[..., None], 255 - image, image)
    view = remove_object(image, mask)
    assert np.array_equal(view[~mask], image[~mask]) and np.array_equal(view, remove_object(other, mask))
    assert (view[mask] != image[mask]).any()


COLOURS = {
    "white": ((255, 255, 255), {"bright", "grey", "neutral"}),
    "grey": ((128, 128, 128), {"grey", "neutral"}),
    "black": ((0, 0, 0), {"dark", "dim", "grey", "neutral"}),
    "red": ((255, 0, 0), {"red", "warm", "golden"}),
    "orange": ((255, 165, 0), {"orange", "bright", "warm", "golden"}),
    "yellow": ((255, 255, 0), {"yellow", "bright", "warm", "golden"}),
    "sky blue": ((135, 206, 235), {"blue", "bright", "cold"}),
    "royal blue": ((65, 105, 225), {"blue", "cold"}),
    "dusk": ((40, 60, 120), {"blue", "cold", "dark", "dim"}),
    "violet": ((140, 60, 220), {"purple", "cold"}),
    "pink": ((255, 192, 203), {"pink", "bright"}),
}


@pytest.mark.parametrize("name", COLOURS)
def test_golden_words_of_plain_colours(name):
    """Guards the measurement: brightness, temperature and tone of colors that everybody calls the same."""
    colour, words = COLOURS[name]
    assert color_words(np.tile(np.uint8(colour), (5, 1))) == words


def test_grass_is_green():
    """Guards the tone of green, whatever its temperature is said to be."""
    assert {"green"} == color_words(np.full((1, 3), (0, 128, 0), np.uint8)) & {"green", "yellow", "blue", "grey"}


def test_the_mean_is_measured():
    """Guards a mixture: black and white are grey together, one bright pixel among dark ones does not make it bright."""
    black, white = np.zeros((4, 3), np.uint8), np.full((4, 3), 255, np.uint8)
    assert color_words(np.concatenate([black, white])) == {"grey", "neutral"}
    assert "dark" in color_words(np.concatenate([black, white[:1]]))


# --- words of measured brightness


def scene_of(inside: int, outside: int) -> tuple[np.ndarray, np.ndarray]:
    """(composite, mask) of one gray on another."""
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    return np.where(mask[..., None], np.uint8(inside), np.full((16, 16, 3), outside, np.uint8)), mask


@pytest.mark.parametrize(
    "inside, outside, lights",
    [
        (20, 200, ("grey overcast light", "bright noon light")),
        (200, 60, ("bright noon light", "grey overcast light")),
        (128, 128, None),
        (90, 128, None),  # objects are a little darker than what is around them
        (60, 128, None),
        (0, 255, ("grey overcast light", "bright noon light")),
    ],
)
def test_brightness_is_named_where_it_is_unusual(inside, outside, lights):
    """Guards what statistics allow: nothing is said of a usual difference, the right direction of an unusual one."""
    descriptions = BrightnessMeter(lambda image, caption: caption)(*scene_of(inside, outside), "a cow,")
    assert [(d.object, d.foreground, d.background) for d in descriptions] == ([("a cow,", *lights)] if lights else [])
    assert all(d.strength == 0.5 for d in descriptions)


def test_the_color_of_an_object_is_no_light():
    """Guards colored objects: as bright as what is around them, they say nothing."""
    image, mask = scene_of(128, 128)
    image[mask] = 150, 110, 60
    assert BrightnessMeter(lambda image, caption: caption)(image, mask, "a cow,") == []


def test_brightness_is_compared_in_radiance():
    """Guards the measure: ln of the ratio of mean radiance, as it was measured over photographs."""
    radiance = [(value / 255) ** 2.2 + 1e-3 for value in (60, 120)]
    compare = BrightnessMeter(lambda image, caption: caption).compare
    assert compare(*scene_of(60, 120)) == pytest.approx(np.log(radiance[0] / radiance[1]), abs=1e-4)


def test_photographs_are_left_to_their_own_describer(backbone, picture):
    """Guards the choice of the describer: a photograph has a caption, empty or not, a render has none."""
    describe = scorer(backbone, photographs=lambda image, mask, caption: [caption])
    assert [describe(*picture, caption) for caption in ("a cow", "")] == [["a cow"], [""]]
    assert describe(*picture) == scorer(backbone)(*picture)


# --- words that CLIP scores


@pytest.fixture(scope="module")
def backbone():
    return Backbone("tiny")


@pytest.fixture(scope="module")
def picture(studio_rows):
    """(a bundled render, its object)."""
    row = next(row for row in studio_rows if row.split == "test")
    image = read_image(ROOT / row.image)
    return image, read_mask(ROOT / row.mask, (image.shape[1], image.shape[0]), resize=True)


def scorer(backbone, **options) -> WordScorer:
    return WordScorer(clip_of(backbone), lambda image, caption: "a mug", **options)


def test_scored_words_are_words_of_the_lists(backbone, picture):
    """Guards the words of a real CLIP on a real picture: those of the lists that the backbone knows, the likeliest
    first, the object's own for the object and all others for what is around it; the same again, and no more than asked
    for.
    """
    known = lambda word: len(backbone.encode(word)) == 1  # noqa: E731
    phrases = {light_phrase(look, s) for s, looks in LIGHTS.items() for look in looks if known(look) and known(s)}
    assert 3 < len(phrases) < sum(map(len, LIGHTS.values())), "the tiny backbone knows some of the words"
    describe = scorer(backbone, is_known=known, count=len(phrases), min_probability=0.0)
    found = describe(*picture)
    image, mask = picture
    own = describe.rank_phrases("a mug", cut_object(image, mask), image[mask])[0][0]
    around = [light for light, _ in describe.rank_phrases("a mug", remove_object(image, mask), image[~mask])]
    assert set(around) == phrases and found == [Description("a mug", own, light) for light in around if light != own]
    assert scorer(backbone, is_known=known, count=3, min_probability=0.0)(*picture) == found[:3]


def test_the_light_around_does_not_depend_on_the_object(backbone, picture):
    """Guards both views: another object in the same photograph is led to the same lights."""
    image, mask = picture
    describe = scorer(backbone, min_probability=2.0)
    other = np.where(mask[..., None], np.uint8([230, 40, 60]), image)
    assert [d.background for d in describe(image, mask)] == [d.background for d in describe(other, mask)]


def test_an_unsure_light_is_called_plain(backbone, picture):
    """Guards the color of the object itself: below ``sure`` nothing is said of its light."""
    assert {d.foreground for d in scorer(backbone, min_probability=2.0)(*picture)} == {PLAIN_LIGHT}
    assert {d.foreground for d in scorer(backbone, min_probability=0.0)(*picture)} != {PLAIN_LIGHT}


def test_measured_colours_speak_for_their_words(backbone, picture):
    """Guards the mixture of CLIP and measurement: for one view, golden pixels make golden lights likelier and others
    less likely than grey pixels do; probabilities, the highest first.
    """
    describe = scorer(backbone)
    colours = {"grey": (128, 128, 128), "golden": (230, 170, 60)}
    shares = {}
    for name, colour in colours.items():
        ranked = describe.rank_phrases("a mug", picture[0], np.tile(np.uint8(colour), (4, 1)))
        assert [share for _, share in ranked] == sorted((share for _, share in ranked), reverse=True)
        shares[name] = dict(ranked)
        assert sum(shares[name].values()) == pytest.approx(1, abs=1e-4) and len(ranked) == len(describe.lights)
    for light, share in shares["golden"].items():
        if "golden" in light:
            assert share > shares["grey"][light]
        if "grey" in light:
            assert share < shares["grey"][light]


def test_a_backbone_that_knows_none_of_the_words(backbone):
    """Guards a tokenizer of another trade: said before any picture is looked at."""
    with pytest.raises(UserError, match="knows none of the words for light"):
        scorer(backbone, is_known=lambda word: False)


def test_an_object_that_leaves_no_surroundings(backbone, picture):
    """Guards a mask that is white everywhere: there is no light around the object, which is said in one line."""
    image, mask = picture
    with pytest.raises(UserError):
        scorer(backbone)(image, np.ones_like(mask))


# --- words that a vision-language model finds

ASKED = sorted({word for text in VisionLanguageModel.QUESTIONS.values() for word in text.split()})
WORDS = ["<pad>", "</s>", "<unk>", "<image>", "Question:", "Answer:", "USER", *ASKED]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
OPT = OPTConfig(
    vocab_size=len(WORDS) + 1,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=16,
    max_position_embeddings=128,
    word_embed_proj_dim=16,
    **IDS,
)


def tokenizer(says: str) -> PreTrainedTokenizerFast:
    """One token a word; token 0, ``says``, is what a head full of zeros says for ever."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([says, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **names)


def llava(says: str):
    """(model, processor) with a chat template."""
    text = LlamaConfig(vocab_size=len(WORDS) + 1, num_key_value_heads=2, max_position_embeddings=128, **SMALL, **IDS)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **SMALL | {"num_hidden_layers": 2})
    shape = {"image_token_index": 4, "vision_feature_layer": -2, "tie_word_embeddings": False}
    template = (
        "USER {% for turn in messages %}{% for part in turn.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    )
    see = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **shape))
    return model, LlavaProcessor(see, tokenizer(says), chat_template=template, **how)


def blip2(says: str):
    """(model, processor) without a chat template."""
    vision, former = SMALL | {"image_size": 16, "patch_size": 8}, SMALL | {"encoder_hidden_size": 16}
    config = Blip2Config(
        vision_config=vision, qformer_config=former, text_config=OPT, num_query_tokens=4, image_token_index=4
    )
    see = BlipImageProcessor(size={"height": 16, "width": 16})
    return Blip2ForConditionalGeneration(config), Blip2Processor(see, tokenizer(says), num_query_tokens=4)


@pytest.fixture
def model_folder(tmp_path):
    """``model_folder(make)``: a random model that says one word and nothing else, with its processor."""

    def save(make, says: str = "Golden,", dtype: torch.dtype = torch.float32) -> Path:
        torch.manual_seed(0)
        model, processor = make(says)
        torch.nn.init.zeros_(model.get_output_embeddings().weight)
        for part in (model.to(dtype), processor):
            part.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(("make", "dtype"), [(llava, torch.bfloat16), (blip2, torch.float32)])
def test_a_model_is_asked_in_its_own_form(model_folder, scene, make, dtype):
    """Guards real models of two families: the question reaches them with the picture, in the form that they were taught
    where they bring one; the answer comes without the question, in lower case, without punctuation, and not too long.
    """
    found = VisionLanguageModel(str(model_folder(make, dtype=dtype)))
    given, usual = [], found.model.generate
    found.model.generate = lambda **inputs: (given.append(inputs), usual(**inputs))[1]
    answer = found.ask(scene[0], found.QUESTIONS["light"])
    assert answer == " ".join(["golden"] * found.LENGTH)
    (prompt,) = found.processor.batch_decode(given[0]["input_ids"], skip_special_tokens=True)
    lead = "USER" if make is llava else "Question:"
    assert prompt.split() == [lead, *found.QUESTIONS["light"].split(), "Answer:"]
    assert given[0]["pixel_values"].shape == (1, 3, 16, 16) and not given[0]["do_sample"]


def test_a_captioner_does_not_answer_with_the_question(tmp_path, scene):
    """Guards BLIP, which transformers counts among these models: what it says is not the question once more."""
    names = ["golden", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "question", "answer", "what", "light", "is", "in"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    ids = {"pad_token_id": 1, "bos_token_id": 3, "eos_token_id": 4, "sep_token_id": 4}
    text = SMALL | ids | {"vocab_size": len(names), "encoder_hidden_size": 16, "max_position_embeddings": 128}
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=SMALL | {"image_size": 16, "patch_size": 8})
    )
    torch.nn.init.zeros_(model.text_decoder.get_output_embeddings().weight)
    see = BlipImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained(tmp_path)
    BlipProcessor(see, BertTokenizer(str(tmp_path / "vocab.txt"))).save_pretrained(tmp_path)
    found = VisionLanguageModel(str(tmp_path))
    assert set(found.ask(scene[0], "What light is in it?").split()) == {"golden"}


def test_a_model_sees_the_object_and_its_surroundings(model_folder, scene):
    """Guards what is asked of which view: the object and its light cut out, the other light without the object."""
    found = VisionLanguageModel(str(model_folder(llava)))
    asked, usual = [], found.ask
    found.ask = lambda image, question: (asked.append((image, question)), usual(image, question))[1]
    (words,) = found(*scene)
    assert words == Description(*[" ".join(["golden"] * found.LENGTH)] * 3)
    views = [cut_object(*scene), cut_object(*scene), remove_object(*scene)]
    assert all(np.array_equal(image, view) for (image, _), view in zip(asked, views, strict=True))
    assert [question for _, question in asked] == [found.QUESTIONS[name] for name in ("object", "light", "light")]


def test_a_model_that_says_nothing(model_folder, scene):
    """Guards an empty answer: no prompt without words, but a line that names what is missing and the way out."""
    found = VisionLanguageModel(str(model_folder(llava, says=".")))
    with pytest.raises(UserError, match="no words for the object: give prompts="):
        found(*scene)


@pytest.fixture(params=["missing", "empty", "hub", "text", "torn"])
def no_model(request, tmp_path, model_folder):
    """A path where there is no vision-language model that can be read."""
    if request.param == "empty":
        return tmp_path
    if request.param == "hub":
        return "someone/blip-large"  # tests are offline
    if request.param == "text":
        OPTForCausalLM(OPT).save_pretrained(tmp_path)
        tokenizer("a").save_pretrained(tmp_path)
        return tmp_path
    if request.param == "torn":
        folder = model_folder(llava)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return folder
    return tmp_path / "nothing"


def test_a_folder_without_a_model(no_model):
    """Guards describer=: nothing there, another kind of model, or a download that was cut short is one clear line."""
    reasons = "no vision-language model of transformers there|model.safetensors cannot be read"
    with pytest.raises(UserError, match=reasons) as error:
        VisionLanguageModel(str(no_model))
    assert "\n" not in str(error.value)

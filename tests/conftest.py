"""Fixtures of all tests: the environment is offline and single-threaded, and nothing is written into the checkout."""

import atexit
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import ImageCms

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
DATABASE = tempfile.mkdtemp(prefix="harmony-tests-")  # FiftyOne's: a test never touches the user's own
atexit.register(shutil.rmtree, DATABASE, ignore_errors=True)
# set before torch or a library of Hugging Face is imported, for these tests and the processes they start
os.environ.update(
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_MODULES_CACHE=f"{DATABASE}/modules",
    FIFTYONE_DO_NOT_TRACK="1",
    FIFTYONE_CONFIG_PATH=f"{DATABASE}/config.json",
    FIFTYONE_DATABASE_DIR=f"{DATABASE}/db",
    FIFTYONE_DATASET_ZOO_DIR=f"{DATABASE}/zoo",
    FIFTYONE_DEFAULT_DATASET_DIR=f"{DATABASE}/datasets",
    FIFTYONE_PLUGINS_DIR=f"{DATABASE}/plugins",
    OMP_NUM_THREADS="1",
)
for name in ("FIFTYONE_DATABASE_URI", "FIFTYONE_PRIVATE_DATABASE_PORT"):  # they would win over the folder above
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))  # so that the tests see this checkout whatever is installed

from tests.browser import CHROMIUM, Browser  # noqa: E402


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """One thread where torch is in use already: a test never waits for the threads of another. What a command sets for
    the whole process goes back.
    """
    if "torch" not in sys.modules:
        yield
        return
    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def hears_of_ctrl_c() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which hands down that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries write by themselves goes to a folder of the test; what a run left in the environment goes away."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path_factory.getbasetemp()))
    for name in ("HARMONY_RUN_DIR", "HARMONY_EXPERIMENTS", "HARMONY_DATASETS"):
        monkeypatch.setenv(name, "")  # registers the variable, so that what a test sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Overrides that keep caches and runs of an entry point inside ``tmp_path``."""
    return [f"paths.work={tmp_path / 'work'}", f"paths.runs={tmp_path / 'runs'}"]


@pytest.fixture(scope="session")
def fo():
    """FiftyOne on the tests' own database; skips where it would join the server of another program of this user."""
    from harmony.core.errors import UserError
    from harmony.data.sources.open_images.database import load_fiftyone

    try:
        return load_fiftyone()
    except UserError as error:
        if "would join the database" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def wandb_records():
    """``wandb_records(run folder)``: all records of its only offline run of W&B, as they are sent later.

    The file is a log of LevelDB's form: in blocks of 32 KiB, parts with checksum, length and kind. A process of W&B's
    own writes it; its last record says that the run has ended.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    def parse(data: bytes) -> list:
        position, part, records = 7, b"", []
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            part += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4) and position <= len(data):  # whole, or the last part
                records.append(Record.FromString(part))
                part = b""
        return records

    def read(folder: Path) -> list:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
            records = parse(path.read_bytes())
            if any(record.WhichOneof("record_type") == "exit" for record in records):
                return records
            time.sleep(0.2)
        raise TimeoutError(f"W&B has not ended its run in {folder}")

    return read


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the photographs that lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not here")
    return SHARED_DATA


def build_random_backbone(folder: Path) -> Path:
    """A complete backbone in diffusers layout with fresh small networks: 32 px, factor 4, made in a second, trained on
    nothing.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from harmony.training.backbone import SCHEDULE, train_tokenizer, write_part

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(["a red mushroom on snow, warm sunset light", "a blue car on grass"] * 4, 600, 16)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, projection_dim=32, **size, **ids)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=32, **size | {"num_hidden_layers": 4})
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(
        **blocks, block_out_channels=[8, 16, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False, sample_size=32, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9, out_channels=4, block_out_channels=[16, 32], layers_per_block=1,
        norm_num_groups=8, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D",
        "CrossAttnUpBlock2D"], cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip
    write_part(folder, "tokenizer", tokenizer)
    write_part(folder, "text_encoder", CLIPTextModelWithProjection(text))
    write_part(folder, "image_encoder", CLIPVisionModelWithProjection(vision))
    write_part(folder, "scheduler", DDIMScheduler(**SCHEDULE))
    write_part(folder, "vae", vae)
    write_part(folder, "unet", unet)
    return folder


@pytest.fixture(scope="session")
def random_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``build_random_backbone``; read it, do not change it."""
    return build_random_backbone(tmp_path_factory.mktemp("backbone") / "random")


@pytest.fixture
def channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen networks are laid out on the CPU as they are on a GPU."""
    import torch

    monkeypatch.setattr("harmony.models.backbone.memory_format", lambda device: torch.channels_last)


@pytest.fixture(scope="session")
def awake():
    """``awake(backbone, seed)``: a frozen ControlNet that acts as if trained, what begins at zero being filled with
    noise.
    """
    import torch

    from harmony.models.controlnet import from_unet, zero_convolutions

    def make(backbone, seed: int = 0):
        torch.manual_seed(seed)
        net = from_unet(backbone.unet, backbone.factor).requires_grad_(False).eval()
        for parameter in (*zero_convolutions(net), *net.controlnet_cond_embedding.conv_out.parameters()):
            parameter.normal_(0, 0.1)
        return net

    return make


@pytest.fixture(scope="session")
def studio_rows() -> list:
    """Rows of the bundled renders, paths relative to the checkout: 12 train, 4 validation, 5 test (two of one kind)."""
    from harmony.data.sources.pixels import read_rows

    counts = {"train": 12, "validation": 4, "test": 4}
    listed = {split: read_rows(ROOT / "datasets" / "studio" / split, split, ROOT) for split in counts}
    rows = [rows[i * len(rows) // n] for (split, n) in counts.items() for rows in [listed[split]] for i in range(n)]
    return [*rows, next(row for row in listed["test"] if row.label == rows[-1].label and row.id != rows[-1].id)]


@pytest.fixture(scope="session")
def small_manifest(studio_rows):
    """``small_manifest(folder, dataset="studio")``: write a manifest of ``studio_rows`` there; returns its path."""
    from dataclasses import replace

    from harmony.data.manifest import write_manifest
    from harmony.data.sources.open_images.layout import Split

    def write(folder: Path, dataset: str = "studio") -> Path:
        def here(path: str) -> str:
            return os.path.relpath(ROOT / path, folder)

        def extras(row) -> dict:
            known = row.extras | {"relit": here(row.extras["relit"])}
            if Path(row.image).parent.name == "data":  # light A, under which the plate was rendered
                split, name = Path(row.image).parents[1], Path(row.image).stem
                known |= {
                    "plate": here(split / "plates" / f"{name}.jpg"),
                    "shadow": here(split / "shadows" / f"{name}.png"),
                    "relit_caption": Split(ROOT / split).captions()[name][1],
                }
            return known

        rows = [replace(row, image=here(row.image), mask=here(row.mask), extras=extras(row)) for row in studio_rows]
        write_manifest(folder / "manifest.jsonl", rows, dataset)
        return folder / "manifest.jsonl"

    return write


@pytest.fixture(scope="session")
def prepared_work(small_manifest):
    """``prepared_work(work, overrides)``: lay down what ``harmony.prepare`` leaves for the dataset that is chosen.

    ``overrides`` are those of the later ``command`` (``fit`` or ``evaluate``); its own call of ``prepare`` then finds
    everything done, and no database starts.
    """
    from omegaconf import OmegaConf

    from harmony.cli.compose import compose
    from harmony.core.files import write_json
    from harmony.data.preparation import locate_recipe
    from harmony.data.stamps import write_stamps

    def lay(work: Path, overrides: list[str], command: str = "fit") -> Path:
        recipe = OmegaConf.to_container(compose(command, overrides).dataset, resolve=True)
        manifest = small_manifest(work / recipe["name"], recipe["name"])
        write_stamps(manifest.parent, [])
        write_json(manifest.parent / "recipe.json", locate_recipe(recipe))
        return manifest

    return lay


@pytest.fixture(scope="session")
def latent_data(random_backbone, small_manifest, tmp_path_factory):
    """``latent_data(**options)``: a prepared ``LatentData`` on the random backbone; equal recipes share one cache."""
    from harmony.data.latent_data import LatentData
    from harmony.models.backbone import Backbone

    folder = tmp_path_factory.mktemp("latents")
    manifest = small_manifest(folder)
    hints = {"color": {"blur": 1.25, "normalize": True}, "structure": {"low": 100, "high": 200}}

    def make(**options):
        options = {"batch_size": 2, "hints": hints} | options
        data = LatentData(str(manifest), Backbone(str(random_backbone)), str(folder / "cache"), **options)
        data.prepare(say=lambda line: None)
        return data

    return make


@pytest.fixture(scope="session")
def swapped_profile() -> bytes:
    """sRGB with the primaries of red and blue exchanged: its (200, 100, 50) looks like (50, 100, 200)."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    places = {}
    for n in range(struct.unpack(">I", profile[128:132])[0]):
        tag, start, _ = struct.unpack(">4sII", profile[132 + 12 * n : 144 + 12 * n])
        places[tag] = slice(start, start + 20)
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    profile[red], profile[blue] = profile[blue], profile[red]
    return bytes(profile)


MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")  # around and in place of a picture
CHAT = (
    "{% for turn in messages %}{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


def build_chat_model(folder: Path, words: str = "first second", template: str | None = CHAT) -> Path:
    """A random Qwen2.5-VL that knows some words, with its processor: a real one of transformers, of 10,000 numbers. Its
    head is zero, so that to it all words are equally likely.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    names = ["<unk>", "</s>", *MARKS, *dict.fromkeys(words.split())]
    table = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "</s>", "eos_token": "</s>", "additional_special_tokens": MARKS}
    see = {"patch_size": 4, "merge_size": 1, "min_pixels": 16, "max_pixels": 256}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**see), PreTrainedTokenizerFast(tokenizer_object=table, **special),
        Qwen2VLVideoProcessor(**see), chat_template=template,
    )  # fmt: skip
    size = {"hidden_size": 16, "intermediate_size": 16}
    text = size | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"vocab_size": len(names), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = size | {"depth": 1, "out_hidden_size": 16, "num_heads": 2, "fullatt_block_indexes": [0]}
    vision |= {"patch_size": 4, "spatial_merge_size": 1, "window_size": 16}
    ids = {name: names.index(mark) for name, mark in zip(("vision_start", "image", "vision_end", "video"), MARKS)}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **{f"{name}_token_id": i for name, i in ids.items()})
    )
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_model(tmp_path: Path):
    """``chat_model(words=, template=)``: the folder of ``build_chat_model``."""
    return lambda **options: build_chat_model(tmp_path / "vlm", **options)


@pytest.fixture
def sees_brightness(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Lets judges prefer the brighter picture: the logits of "first" and "second" are the brightness of the last two
    pictures that reach the loaded model. Gives the inputs of each question.
    """
    from harmony.models import vision_language

    load, questions = vision_language.load_vision_language_model, []

    def load_seeing(*options):
        processor, model = load(*options)
        usual, words = model.generate, processor.tokenizer.convert_tokens_to_ids(["first", "second"])

        def generate(**inputs):
            questions.append(inputs)
            answer = usual(**inputs)
            pictures = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
            for word, picture in zip(words, pictures[-2:], strict=True):
                answer.logits[0][0, word] = picture.mean()
            return answer

        model.generate = generate
        return processor, model

    monkeypatch.setattr(vision_language, "load_vision_language_model", load_seeing)
    return questions


@pytest.fixture
def bring_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``bring_code(folder)``: a model there brings code of its own, and whoever sits at the machine lets it run. Gives
    the file that the code writes when it is run.
    """

    def write(folder: Path) -> Path:
        names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")
        code = {"auto_map": dict.fromkeys(names, "own.Own"), "model_type": "own", "processor_class": "Own"}
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "processor_config.json"):
            (folder / name).write_text(json.dumps(code))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
        monkeypatch.setattr("builtins.input", lambda *prompt: "y")
        return tmp_path / "ran"

    return write


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (apt-get install chromium)")
    browser = Browser(tmp_path)
    yield browser
    browser.close()

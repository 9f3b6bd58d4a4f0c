"""Vision-language models of transformers (LLaVA, Qwen2.5-VL and similar): how one is loaded and asked to choose."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harmony.core.errors import UserError
from harmony.models.weights import load_network
from harmony.pixels.images import limit_size, resize, sha256

SIDE = 768  # px: longer side of a picture that a judge is shown; a browser's page shows people no more
REFERENCE, LABELS = "For reference:", ("First picture:", "Second picture:")
WORDS = ("first", "second")
FORM = "Answer with one word, first or second."
CONTENT = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")  # suffixes of what a model is made of


def load_vision_language_model(
    path: str, option: str, device: torch.device | str = "cpu"
) -> tuple[Any, torch.nn.Module]:
    """Load (processor, model) from a hub id or folder; code that comes with a model is never run.

    UserError, which names ``option``, where there is none.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        model = load_network(AutoModelForImageTextToText, path, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise UserError(f"{option}={path}: no vision-language model of transformers there ({reason})") from None
    return processor, model.eval().to(device)


def identify_model(path: str, option: str) -> str:
    """What tells a model from any other: the hashes of a folder's files by name, or the hub id with its commit.

    UserError, which names ``option``, where the hub cannot be reached or has no such id.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if (folder := Path(path)).is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in CONTENT)
        return " ".join(f"{file.name}:{sha256(file)}" for file in files)
    try:
        return f"{path}@{Path(hf_hub_download(path, 'config.json')).parent.name}"
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option}={path}: cannot be fetched ({reason}); give a folder or another hub id") from None


class VisionLanguageJudge:
    """Chooses between two pictures: the likelier of the words "first" and "second" as the answer to a question.

    The answer is read from the logits of the next token, so that there always is one, the same each time; the first
    where both are as likely.
    """

    def __init__(self, path: str, option: str, device: torch.device | str = "cpu"):
        self.name = f"{option}={path}"
        self.processor, self.model = load_vision_language_model(path, option, device)
        if not getattr(self.processor, "chat_template", None):
            raise UserError(
                f"{self.name}: its processor has no chat template, so that it cannot be shown several pictures; "
                "choose a model that chats, such as Qwen2.5-VL or LLaVA"
            )
        self.tokens = self.find_tokens()

    def find_tokens(self) -> list[list[int]]:
        """The tokens with which "first" and "second" may begin. UserError where the two cannot be told apart."""
        tokenizer = self.processor.tokenizer
        tokens = []
        for word in WORDS:
            forms = [space + form for form in (word, word.capitalize()) for space in ("", " ")]
            tokens.append({tokenizer.encode(form, add_special_tokens=False)[0] for form in forms})
        common = (tokens[0] & tokens[1]) | {tokenizer.unk_token_id}
        own = [sorted(group - common) for group in tokens]
        if not all(own):
            raise UserError(f"{self.name}: its tokenizer does not know {' and '.join(WORDS)}; choose another model")
        return own

    @torch.inference_mode()
    def choose(self, question: str, pictures: Iterable[np.ndarray], reference: np.ndarray | None = None) -> int:
        """Which of two ``pictures`` answers the question, 0 or 1; all are uint8 H x W x 3.

        UserError for a model that cannot take several pictures in one message.
        """
        from jinja2 import TemplateError

        views = [] if reference is None else [(REFERENCE, reference)]
        views += zip(LABELS, pictures, strict=True)
        content = [part for label, picture in views for part in (to_text(label), to_part(picture))]
        messages = [{"role": "user", "content": [*content, to_text(f"{question} {FORM}")]}]
        try:
            logits = self.read_logits(messages)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, TemplateError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.name}: cannot take {len(views)} pictures in one message ({reason})") from None
        scores = [float(logits[group].logsumexp(0)) for group in self.tokens]
        if not all(map(math.isfinite, scores)):
            raise UserError(f"{self.name}: its answer holds NaN or infinite numbers; choose another model")
        return int(scores[1] > scores[0])

    def read_logits(self, messages: list[dict]) -> torch.Tensor:
        """The logits of the first token of the answer, V."""
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        how = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
        answer = self.model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        return answer.logits[0][0].float()


def to_text(text: str) -> dict:
    """A text as a part of a chat's message."""
    return {"type": "text", "text": text}


def to_part(picture: np.ndarray) -> dict:
    """A picture as a part of a chat's message, not larger than SIDE."""
    height, width = picture.shape[:2]
    return {"type": "image", "image": Image.fromarray(resize(picture, *limit_size(width, height, SIDE)))}

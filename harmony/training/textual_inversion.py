"""Textual inversion: learns one word from a few pictures, with everything else frozen.

Gal 2022 (An Image is Worth One Word, arXiv 2208.01618), eq. 2.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.data.picture_data import PicturesData
from harmony.methods.method import make_seeds
from harmony.metrics.similarity import cosines, embeddings
from harmony.models.backbone import DIFFUSION, Backbone, scaled_latent
from harmony.models.clip import clip_of
from harmony.models.textual_inversion import Word, add_tokens, initial_vectors, save_word, text_states
from harmony.pixels.images import grid, write_image
from harmony.sampling.guidance import Settings, predict
from harmony.sampling.text_to_image import full_hole_condition, text_to_image
from harmony.training.objective import compute_target
from harmony.training.task import Task

TEMPLATES = {
    "object": (
        "a {}", "the {}", "one {}", "my {}", "this is a {}", "a photo of a {}", "a photo of the {}",
        "a photo of one {}", "a photo of my {}", "a picture of a {}",
        "a snapshot of the {}", "a good photo of a {}", "a close-up of a {}",
        "a close-up photo of the {}", "a cropped photo of a {}", "a bright photo of the {}", "a dark photo of a {}",
        "a clean photo of a {}", "a photo of a nice {}", "a photo of a small {}", "a photo of a large {}",
        "a photo of the cool {}", "a photo of a clean {}", "a photo of a used {}", "a rendering of a {}",
        "a rendering of the {}", "an illustration of a {}",
    ),
    "style": (
        "a painting in the style of {}", "a picture in the style of {}", "a rendering in the style of {}",
        "the painting in the style of {}", "a photo in the style of {}", "a drawing in the style of {}",
        "a bright painting in the style of {}", "a dark painting in the style of {}",
        "a close-up painting in the style of {}", "a cropped painting in the style of {}",
        "a small painting in the style of {}", "a large painting in the style of {}",
        "a calm painting in the style of {}", "a lively painting in the style of {}",
        "a clean painting in the style of {}", "a rich painting in the style of {}",
        "a good painting in the style of {}", "a nice painting in the style of {}", "one painting in the style of {}",
    ),
}  # fmt: skip


class TextualInversionTask(Task):
    """Trains the vectors of the word ``token``, which start as the embedding of ``init``, and nothing else.

    ``property``: ``object`` or ``style``, the prompt templates for pictures without a caption. ``vectors``: how many
    the word has. ``lr`` is multiplied by batch, accumulation and processes. The loss is the squared error of the
    network's output over the whole latent. Previews are sampled by ``steps`` and ``guidance``, with the word and, from
    the same noise, with ``init`` in its place.
    """

    def __init__(
        self,
        backbone: Backbone,
        token: str,
        init: str,
        property: str = "object",
        vectors: int = 1,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        steps: int = 50,
        guidance: float = 7.5,
        seed: int = 0,
    ):
        super().__init__()
        if property not in TEMPLATES:
            raise UserError(f"property={property}: choose one of {', '.join(TEMPLATES)}")
        if vectors < 1:
            raise UserError(f"vectors={vectors}: give at least 1")
        self.backbone, self.token, self.init, self.lr, self.weight_decay = backbone, token, init, lr, weight_decay
        self.templates, self.settings, self.seed = TEMPLATES[property], Settings(steps, guidance), seed
        self.vectors = torch.nn.Parameter(initial_vectors(backbone, init, vectors))
        self.first_token = add_tokens(backbone, token, vectors)
        self.clip = clip_of(backbone)

    def check(self, data: PicturesData) -> None:
        """UserError unless there are pictures, and their captions hold the word where the model reads it."""
        if long_captions := [text for text in data.captions if text and not self.is_read(text)]:
            raise UserError(f"captions.json: {long_captions[0]!r} is cut off before the word: shorten it")

    def on_fit_start(self) -> None:
        self.backbone.to(self.device)
        data, self.condition = self.trainer.datamodule, full_hole_condition(self.backbone)
        templates = [template for template in self.templates if self.is_read(template)]
        self.prompts = [[text] if text else templates for text in data.captions]
        if self.clip is not None:
            self.concept_features = embeddings(data.pictures, self.clip)

    on_validation_start = on_fit_start

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainer = self.trainer
        samples = trainer.datamodule.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        return torch.optim.AdamW([self.vectors], lr=self.lr * samples, weight_decay=self.weight_decay)

    def insert_word(self, prompt: str) -> str:
        """The prompt with the new word in place of {}."""
        return prompt.replace("{}", self.token)

    def is_read(self, prompt: str) -> bool:
        """Whether the whole word is within the tokens that the model reads."""
        return self.first_token + len(self.vectors) - 1 in self.backbone.tokens([self.insert_word(prompt)])

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Text states B x T x D of B prompts with {} for the word, by its current vectors."""
        tokens = self.backbone.tokens([self.insert_word(prompt) for prompt in prompts]).to(self.device)
        return text_states(self.backbone.text_encoder, tokens, self.first_token, self.vectors)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        backbone, abar = self.backbone, self.backbone.alphas_cumprod
        t = (batch["time"] * len(abar)).long()
        a = abar[t].view(-1, 1, 1, 1)
        z = scaled_latent(batch["moments"], backbone.vae.config.scaling_factor, batch["encode"])
        z = a.sqrt() * z + (1 - a).sqrt() * batch["noise"]
        pairs = zip((self.prompts[i] for i in batch["picture"].tolist()), batch["template"].tolist(), strict=True)
        text = self.encode_prompts([prompts[int(share * len(prompts))] for prompts, share in pairs])
        output = predict(backbone.unet, z, self.condition.expand(len(z), -1, -1, -1), t, text)
        loss = F.mse_loss(output.float(), compute_target(backbone.prediction_type, z, batch["noise"], abar[t]))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(z))
        return loss

    def validation_step(self, indices: torch.Tensor, index: int) -> None:
        """Draw previews and, with CLIP, measure their similarity to the concept (all pairs) and to their prompts."""
        all_prompts = list(dict.fromkeys(prompt for prompts in self.prompts for prompt in prompts))
        prompts = [all_prompts[i % len(all_prompts)] for i in indices.tolist()]
        init_prompts = [prompt.replace("{}", self.init) for prompt in prompts]
        texts = {"baseline/": self.backbone.prompt(init_prompts), "": self.encode_prompts(prompts)}
        seeds = make_seeds(self.seed, indices.tolist())
        previews = {name: text_to_image(self.backbone, text, self.settings, seeds) for name, text in texts.items()}
        figures = {}
        if self.clip is not None:
            words = torch.nn.functional.normalize(self.clip.texts(init_prompts).float().cpu(), dim=1)
            for name, pictures in previews.items():
                features = embeddings(pictures, self.clip)
                figures[f"{name}concept/clip_i"] = 100 * float((features @ self.concept_features.T).mean())
                figures[f"{name}concept/clip_t"] = 100 * float(np.mean(cosines(features, words)))
        self.log_dict(figures, sync_dist=True, batch_size=len(indices))
        if self.trainer.is_global_zero:
            self.draw(previews)
            names = [name for name in figures if not name.startswith("baseline/")]
            summary = ", ".join(f"{n} {figures[n]:.1f} ({self.init}: {figures[f'baseline/{n}']:.1f})" for n in names)
            print(f"step {self.global_step}: {summary or 'previews drawn'}", flush=True)

    def draw(self, previews: dict[str, list[np.ndarray]]) -> None:
        """Write a grid: the concept above, the previews of ``init`` below it, and those of the word at the bottom."""
        rows = [self.trainer.datamodule.pictures, previews["baseline/"], previews[""]]
        path, picture = self.grid_file("samples"), grid(rows)
        write_image(path, picture)
        for logger in self.trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [picture], caption=[path.name])

    def hash_sources(self) -> dict[str, str]:
        """sha256 of the pictures, their captions, and the networks of the backbone."""
        return self.trainer.datamodule.hashes() | {part: self.backbone.hash(part) for part in DIFFUSION}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["learnt_on"] = self.hash_sources()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["learnt_on"] != self.hash_sources():
            raise UserError(
                "this run began with other pictures or another state of the backbone: start again with resume=false"
            )

    @property
    def home(self) -> torch.device:
        return self.backbone.device

    def export(self, folder: Path) -> None:
        """Write ``folder/learned_embeds.safetensors``, which diffusers' ``load_textual_inversion`` reads too."""
        save_word(Word(self.token, self.vectors), folder)

"""Trains the four parts of a backbone: CLIP, the VAE, the captioner and the inpainting UNet.

Each task is a LightningModule that trains one part, keeps an exponential moving average (EMA) of its weights, measures
itself on held-out pictures, draws a grid, and at the end writes its part into the backbone folder in the layout of
diffusers and transformers.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from harmony.core.files import replace_folder, write_text
from harmony.data.latent_data import LatentData
from harmony.data.pixel_data import PixelData
from harmony.models.backbone import Backbone, write_model_index
from harmony.models.shipped import backbone_path
from harmony.models.steady_norms import steady_norms
from harmony.pixels.images import CLIP_MEAN, CLIP_STD, from_model, grid, to_clip, write_image
from harmony.training.muon import Muon
from harmony.training.objective import add_noise, compute_target
from harmony.training.schedule import decay_to_end
from harmony.training.task import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertTokenizer, BlipForConditionalGeneration, CLIPModel, CLIPTokenizer

logging.getLogger("transformers").setLevel(logging.ERROR)

SCHEDULE = {  # Stable Diffusion's, with the flags whose defaults in diffusers are wrong for latents
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",  # for random weights; InpaintTask sets its own
}


def write_part(folder: Path, name: str, *parts) -> None:
    """Save ``parts`` (objects with save_pretrained) into ``folder / name``, atomically."""
    with replace_folder(folder / name) as partial:
        for part in parts:
            part.save_pretrained(partial)
    write_model_index(folder)


class BackboneTask(Task):
    """What the four tasks have in common: a linearly decaying learning rate, an EMA of the network, a grid, and saving.

    ``backbone``: the folder to which the part is written and from which earlier parts are read.
    """

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW

    def __init__(self, backbone: str, lr: float, warmup: int = 100, weight_decay: float = 0.01, ema: float = 0.999):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.folder = Path(backbone_path(backbone))
        self.net: nn.Module | None = None
        self.average: EMAModel | None = None

    def configure_optimizers(self) -> dict[str, Any]:
        h, parameters = self.hparams, [p for p in self.net.parameters() if p.requires_grad]
        optimizer = self.optimizer_class(parameters, lr=h.lr, weight_decay=h.weight_decay)
        factor = decay_to_end(self.trainer, h.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def setup(self, stage: str | None = None) -> None:
        if self.net is None:
            self.net = self.build().to(memory_format=torch.channels_last)  # faster convolutions on CPU and GPU
            self.average = EMAModel(self.net.parameters(), decay=self.hparams.ema, use_ema_warmup=True, power=0.75)

    def on_fit_start(self) -> None:
        self.average.to(self.device)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        self.average.step(self.net.parameters())  # before the callbacks, of which one writes checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["averaged"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average.load_state_dict(checkpoint["averaged"])

    def on_validation_epoch_start(self) -> None:
        self.average.store(self.net.parameters())
        self.average.copy_to(self.net.parameters())

    def on_validation_epoch_end(self) -> None:
        self.measure(self.trainer.datamodule)
        self.average.restore(self.net.parameters())

    def export(self, folder: Path) -> None:
        """Write the part into the backbone folder instead of ``folder``, with the averaged weights."""
        self.average.copy_to(self.net.parameters())
        self.net.eval()
        self.save()

    def validation_step(self, batch: Any, index: int) -> None:
        """Nothing: ``measure`` runs at the end of the validation epoch."""

    def build(self) -> nn.Module:
        """Build the network to train."""
        raise NotImplementedError

    def measure(self, data: lightning.LightningDataModule) -> None:
        """Log metrics on held-out data and draw the grid, with the averaged weights."""
        raise NotImplementedError

    def save(self) -> None:
        """Write the part into the backbone folder."""
        raise NotImplementedError


def compute_chroma(x: torch.Tensor) -> torch.Tensor:
    """Opponent colors, B x 3 x H x W -> B x 2 x H x W: red - green and blue - (red + green) / 2."""
    red, green, blue = x.unbind(1)
    return torch.stack([red - green, blue - (red + green) / 2], 1)


def draw_noise(seeds: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Unit normal noise of the shape of ``like``, B x ..., of which sample i depends on ``seeds[i]`` alone."""
    draws = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(draws).to(like)


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Per-image PSNR in dB of two batches in [-1, 1], on rounded 0..255 values. B."""
    a, b = (((v.clamp(-1, 1) + 1) * 127.5).round() for v in (x, y))
    return 10 * torch.log10(255**2 / (a - b).square().flatten(1).mean(1).clamp_min(1e-8))


# ---------------------------------------------------------------------------------------------------- VAE


class VAETask(BackboneTask):
    """Trains AutoencoderKL by the squared error, that of its colors, the L1 error of image gradients, and a KL term.

    loss = |d|^2 + chroma |compute_chroma(d)|^2 + gradient |grad d|_1 + kl KL(q(z|x) || N(0, 1)),
    all means, with d = x' - x. By the plain error brightness is learned first and color very late. A training of
    minutes is enough because norms start as the identity and steps are orthogonalized: see ``steady_norms`` and
    ``Muon``.
    """

    optimizer_class = Muon

    def __init__(
        self,
        backbone: str,
        config: dict,
        lr: float = 1e-3,
        chroma: float = 0.5,
        gradient: float = 0.1,
        kl: float = 1e-6,
        **options,
    ):
        super().__init__(backbone, lr, **options)
        self.save_hyperparameters("config", "chroma", "gradient", "kl", logger=False)

    def build(self) -> AutoencoderKL:
        return steady_norms(AutoencoderKL(**self.hparams.config))

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        x = batch["image"]
        q = self.net.encode(x).latent_dist
        y = self.net.decode(q.mean + q.std * draw_noise(batch["noise_seed"], q.mean)).sample
        mse = F.mse_loss(y, x)
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (q.mean.square() + q.var - 1 - q.logvar).mean()
        self.log_dict({"train/mse": mse, "train/kl": kl}, prog_bar=True)
        return (
            mse
            + self.hparams.chroma * compute_chroma(y - x).square().mean()
            + self.hparams.gradient * edges
            + self.hparams.kl * kl
        )

    @torch.no_grad()
    def measure(self, data: PixelData) -> None:
        pictures = {}
        for kind, images in data.test_pictures().items():
            x = images.to(self.device)
            y = torch.cat([self.net.decode(self.net.encode(b).latent_dist.mean).sample for b in x.split(64)])
            self.log(f"validation/psnr_{kind}", psnr(x, y).mean(), prog_bar=True)
            pictures[kind] = [[from_model(a), from_model(b)] for a, b in zip(x[:6], y[:6], strict=True)]
        rows = [sum(pair, []) for pair in zip(*pictures.values(), strict=False)]
        write_image(self.grid_file("vae"), grid(rows, ["truth", "decoded"] * len(pictures), scale=2))

    @torch.no_grad()
    def save(self) -> None:
        batches = self.trainer.datamodule.sample(512).split(64)
        latents = [self.net.encode(b.to(self.device)).latent_dist.mean for b in batches]
        self.net.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
        write_part(self.folder, "vae", self.net)


# ---------------------------------------------------------------------------------------------------- CLIP


def list_words(backend: "Tokenizer", texts: Iterable[str]) -> set[str]:
    """The words of texts as a tokenizer cuts them."""
    texts = map(backend.normalizer.normalize_str, texts)
    return {word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}


def train_tokenizer(texts: Iterable[str], vocabulary: int, length: int) -> "CLIPTokenizer":
    """Train CLIP's byte-pair encoding on texts; ``length``: the tokens of a padded prompt."""
    from transformers import CLIPTokenizer

    texts, tokenizer = list(texts), CLIPTokenizer(model_max_length=length)
    # The trainer numbers the letters at the end of words by chance, which decides between equally frequent pairs, so
    # that each run would have other tokens. Special tokens have their numbers before.
    ends = sorted({f"{word[-1]}</w>" for word in list_words(tokenizer.backend_tokenizer, texts)})
    tokenizer = tokenizer.train_new_from_iterator(texts, vocabulary, new_special_tokens=ends, show_progress=False)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=length)


class CLIPTask(BackboneTask):
    """Trains CLIP from scratch by symmetric cross-entropy over a batch of (picture, caption) pairs.

    Pairs of a batch with the same caption are positives of each other. Writes tokenizer, text encoder and image
    encoder.
    """

    def __init__(
        self, backbone: str, config: dict, vocabulary: int = 2048, length: int = 32, lr: float = 1e-3, **options
    ):
        super().__init__(backbone, lr, **options)
        self.save_hyperparameters("config", "vocabulary", "length", logger=False)

    def build(self) -> "CLIPModel":
        from transformers import CLIPConfig, CLIPModel

        h = self.hparams
        self.tokenizer = train_tokenizer(sorted(self.trainer.datamodule.captions()), h.vocabulary, h.length)
        config = CLIPConfig(**h.config)
        config.text_config.vocab_size = len(self.tokenizer)
        config.text_config.max_position_embeddings = h.length
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config.text_config, name, getattr(self.tokenizer, name))
        return CLIPModel(config)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(captions, **options).input_ids.to(self.device)

    def compute_features(self, images: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of both towers, B x P each; ``images`` in [-1, 1]."""
        out = self.net(input_ids=self.tokenize(captions), pixel_values=to_clip((images + 1) / 2))
        return F.normalize(out.image_embeds, dim=-1), F.normalize(out.text_embeds, dim=-1)

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        image, text = self.compute_features(batch["image"], batch["caption"])
        logits = self.net.logit_scale.exp().clamp(max=100) * image @ text.T
        captions = np.array(batch["caption"])
        target = torch.from_numpy((captions[:, None] == captions[None]).astype(np.float32)).to(logits)
        target = target / target.sum(1, keepdim=True)
        loss = (
            F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
        ) / 2
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def measure(self, data: PixelData) -> None:
        images, captions = data.retrieval()
        image, text = self.compute_features(images.to(self.device), captions)
        matches = (image @ text.T).argmax(1)
        is_right = matches == torch.arange(len(captions), device=self.device)
        self.log("validation/retrieval", is_right.float().mean(), prog_bar=True)
        pairs = [[from_model(images[i]), from_model(images[j])] for i, j in enumerate(matches[:8].tolist())]
        write_image(self.grid_file("clip"), grid(pairs, ["picture", "of the caption chosen"], scale=2))

    def save(self) -> None:
        from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

        for part, cls, config in (
            ("text_encoder", CLIPTextModelWithProjection, self.net.config.text_config),
            ("image_encoder", CLIPVisionModelWithProjection, self.net.config.vision_config),
        ):
            tower = cls(config)
            tower.load_state_dict({k: v for k, v in self.net.state_dict().items() if k in tower.state_dict()})
            write_part(self.folder, part, tower)
        write_part(self.folder, "tokenizer", self.tokenizer)


# ---------------------------------------------------------------------------------------------------- captioner


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> "BertTokenizer":
    """Train a BERT tokenizer on texts, without BLIP's two extra tokens, which are for retrieval."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    texts, tokenizer = list(texts), BertWordPieceTokenizer()
    marks = sorted({f"##{letter}" for word in list_words(tokenizer, texts) for letter in word[1:]})  # as above
    options = {"vocab_size": vocabulary, "min_frequency": 2, "special_tokens": [*SPECIAL_TOKENS, *marks]}
    tokenizer.train_from_iterator(texts, show_progress=False, **options)
    return BertTokenizer(vocab=tokenizer.get_vocab())


class CaptionerTask(BackboneTask):
    """Trains BLIP from scratch by the language-modeling loss of captions, given the whole picture."""

    optimizer_class = Muon

    def __init__(
        self, backbone: str, config: dict, vocabulary: int = 1500, length: int = 24, lr: float = 1e-3, **options
    ):
        super().__init__(backbone, lr, **options)
        self.save_hyperparameters("config", "vocabulary", "length", logger=False)

    def build(self) -> "BlipForConditionalGeneration":
        from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

        h = self.hparams
        tokenizer = train_wordpiece(sorted(self.trainer.datamodule.captions()), h.vocabulary)
        tokenizer.model_max_length = h.length
        side = h.config["vision_config"]["image_size"]
        images = BlipImageProcessor(size={"height": side, "width": side}, image_mean=CLIP_MEAN, image_std=CLIP_STD)
        self.processor = BlipProcessor(images, tokenizer)
        config = BlipConfig(**h.config)
        text = config.text_config
        text.vocab_size, text.max_position_embeddings = len(tokenizer), h.length
        text.bos_token_id, text.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        text.sep_token_id, text.pad_token_id = tokenizer.sep_token_id, tokenizer.pad_token_id
        net = BlipForConditionalGeneration(config)
        net.generation_config.update(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )
        return net

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        tokens = self.processor.tokenizer(
            list(batch["caption"]), padding=True, truncation=True, max_length=self.hparams.length, return_tensors="pt"
        ).to(self.device)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        out = self.net(
            pixel_values=to_clip((batch["image"] + 1) / 2),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            labels=labels,
        )
        self.log("train/loss", out.loss, prog_bar=True)
        return out.loss

    @torch.no_grad()
    def caption(self, images: torch.Tensor) -> list[str]:
        """B x 3 x H x W in [-1, 1] -> B captions, by beam search of width 3."""
        net = self.net.eval()
        tokens = net.generate(to_clip((images + 1) / 2), num_beams=3, max_length=self.hparams.length, min_length=5)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def measure(self, data: PixelData) -> None:
        images, captions = data.retrieval()
        outputs = self.caption(images.to(self.device))
        checks = [parse_kind_and_color(a) == parse_kind_and_color(b) for a, b in zip(outputs, captions, strict=True)]
        self.log("validation/kind_and_colour", float(np.mean(checks)), prog_bar=True)
        self.net.train()
        triples = zip(outputs, captions, checks, strict=True)
        lines = [f"{'ok ' if is_right else '-- '}{b!r} said {a!r}" for a, b, is_right in triples]
        write_text(self.grid_file("captions", ".txt"), "\n".join(lines) + "\n")

    def save(self) -> None:
        write_part(self.folder, "captioner", self.net, self.processor)


def parse_kind_and_color(caption: str) -> tuple[str, ...]:
    """The color and the kind of object in a studio caption: its second and third words."""
    return tuple(caption.split()[1:3])


# ---------------------------------------------------------------------------------------------------- UNet


class InpaintTask(BackboneTask):
    """Trains the nine-channel inpainting UNet by the plain loss over the whole latent, with 10 % empty prompts.

    The text encoder is frozen. The UNet predicts v by default: at high noise the error of eps depends little on the
    picture, so that a short training by it learns neither color nor layout nor to copy the pixels outside the hole.

    Holes come from the cache (rule ``backbone``): instances, dilations, boxes, strokes elsewhere, and full holes, for
    which the network is a text-to-image model.
    """

    def __init__(
        self,
        backbone: str,
        config: dict,
        lr: float = 5e-4,
        prompt_dropout: float = 0.1,
        prediction_type: str = "v_prediction",
        **options,
    ):
        super().__init__(backbone, lr, **options)
        self.save_hyperparameters("config", "prompt_dropout", "prediction_type", logger=False)
        self.backbone = Backbone(backbone)

    def build(self) -> UNet2DConditionModel:
        backbone = self.backbone
        DDIMScheduler(**SCHEDULE | {"prediction_type": self.hparams.prediction_type}).save_pretrained(
            self.folder / "scheduler"
        )
        width = backbone.text_encoder.config.hidden_size
        self.register_buffer("abar", DDIMScheduler(**SCHEDULE).alphas_cumprod, persistent=False)
        self.register_buffer("empty_text", backbone.prompt([""]), persistent=False)
        return UNet2DConditionModel(cross_attention_dim=width, **self.hparams.config)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.backbone.to(self.device)

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        text = self.backbone.text(batch["tokens"])
        text = torch.where((batch["drop"] < self.hparams.prompt_dropout)[:, None, None], self.empty_text, text)
        z, condition, t = add_noise(batch, self.backbone.vae.config.scaling_factor, self.abar)
        output = self.net(torch.cat([z, condition], 1), t, text).sample
        target = compute_target(self.backbone.prediction_type, z, batch["noise"], self.abar[t])
        loss = F.mse_loss(output, target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def measure(self, data: LatentData) -> None:
        """Draw a grid with fixed noise: pictures from prompts alone, and holes filled by prompts."""
        from harmony.sampling.guidance import Schedule, inpaint

        backbone = self.backbone
        vars(backbone)["unet"] = self.net.eval()
        batch = {name: value.to(self.device) for name, value in data.examples(12).items()}
        count = len(batch["image"])
        full_hole = torch.ones_like(batch["hole"])
        gray = backbone.latent(backbone.moments(torch.zeros_like(batch["image"][:1])))
        rows = [[from_model(x)] for x in batch["image"]]
        noise = torch.randn(count, *gray.shape[1:], generator=torch.Generator().manual_seed(0)).to(self.device)
        text = backbone.text(batch["tokens"])
        masked_images = batch["image"] * (1 - batch["pixel_hole"])
        for guidance in (1.0, 2.0, 3.0):
            masked = gray.expand_as(noise)
            latents = inpaint(backbone, noise, full_hole, masked, text, self.empty_text, Schedule(25, guidance))
            for row, x in zip(rows, backbone.decode(latents), strict=True):
                row.append(from_model(x))
        for row, x in zip(rows, masked_images, strict=True):
            row.append(from_model(x))
        for guidance in (1.0, 2.0, 3.0):
            masked = backbone.latent(backbone.moments(masked_images))
            latents = inpaint(backbone, noise, batch["hole"], masked, text, self.empty_text, Schedule(25, guidance))
            for row, x in zip(rows, backbone.decode(latents), strict=True):
                row.append(from_model(x))
        titles = ["truth", "text w=1", "w=2", "w=3", "hole", "fill w=1", "w=2", "w=3"]
        write_image(self.grid_file("inpaint"), grid(rows, titles, scale=2))
        self.net.train()

    def save(self) -> None:
        write_part(self.folder, "unet", self.net)

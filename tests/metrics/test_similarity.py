"""CLIP-I and CLIP-T: cosines, and both wrappers on tiny random models."""

import json

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from harmony.metrics import similarity
from harmony.models.clip import BackboneClip, OpenClip


def pictures(n=3, side=40):
    return list(np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def test_cosines():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    assert similarity.cosines(a, a) == [1, 1, 1, 1]
    assert similarity.cosines(a, b) == pytest.approx([1, 0, -1, 0.5**0.5])
    with pytest.raises(ValueError, match="pairs"):
        similarity.cosines(a, b[:2])


class Tokens:
    """The least of a tokenizer: one id a letter, end token last, padded."""

    def __call__(self, texts, max_length, **_):
        rows = [[ord(c) % 50 for c in text][: max_length - 1] + [63] for text in texts]
        padded = torch.tensor([row + [63] * (max_length - len(row)) for row in rows])
        return type("Encoding", (), {"input_ids": padded})


def test_backbone_clip_projects_both_into_one_space():
    torch.manual_seed(0)
    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**common, image_size=32, patch_size=8)).eval()
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(**common, vocab_size=64, max_position_embeddings=12, eos_token_id=63)
    ).eval()
    clip = BackboneClip(vision, text.text_model, text.text_projection, Tokens())
    seen, read = clip.images(pictures()), clip.texts(["a red cup", "snow", "a caption far longer than twelve"])
    assert seen.shape == read.shape == (3, 8) and not seen.requires_grad
    ids = Tokens()(["snow"], 12).input_ids
    assert torch.allclose(read[1], text(input_ids=ids).text_embeds[0], atol=1e-6)
    assert all(-1 <= cosine <= 1 for cosine in similarity.cosines(seen, read)) and not torch.allclose(read[0], read[1])


def test_open_clip_by_name(tmp_path):
    """A model of open_clip, made tiny and random: the same shape of wrapper."""
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("tiny").state_dict(), weights)
    clip = OpenClip(f"tiny/{weights}")
    assert clip.name == f"tiny/{weights}"
    assert clip.images(pictures()).shape == clip.texts(["a", "b", "c"]).shape == (3, 8)

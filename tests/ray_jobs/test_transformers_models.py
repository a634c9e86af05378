"""Image classifiers of transformers, made from small configurations and saved to a folder."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from patterns import Explainer, UserError
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.data.image_decoding import decode
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from ray_jobs.models.class_names import load_class_names
from ray_jobs.models.transformers_models import convert_image_processor

SIDE = 32
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 5}
CONFIGS: dict[str, Any] = {
    "vit": lambda: transformers.ViTConfig(image_size=SIDE, patch_size=8, **SMALL),
    "deit": lambda: transformers.DeiTConfig(
        image_size=SIDE, patch_size=8, architectures=["DeiTForImageClassification"], **SMALL
    ),
    "beit": lambda: transformers.BeitConfig(image_size=SIDE, patch_size=8, **SMALL),
    "dinov2": lambda: transformers.Dinov2Config(image_size=SIDE, patch_size=8, **SMALL),
    "swin": lambda: transformers.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=5
    ),
    "convnext": lambda: transformers.ConvNextConfig(
        image_size=SIDE, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=5
    ),
    "segformer": lambda: transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16, num_labels=5,
    ),
}  # fmt: skip


SEGFORMER = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2], "num_labels": 5}
VISION = {key: value for key, value in SMALL.items() if key != "num_labels"} | {"image_size": SIDE, "patch_size": 8}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 20,
        "projection_dim": 6}  # fmt: skip
# Models that are no classifiers: the saved model, the class of the loaded one, the explained output, and its shape.
OTHERS: dict[str, tuple[Any, str, str, tuple[int, ...]]] = {
    "segformer": (
        lambda: transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(decoder_hidden_size=16, **SEGFORMER)
        ),
        "SegformerForSemanticSegmentation", "logits", (5, 8, 8),
    ),
    "clip encoder": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=6, **VISION)),
        "CLIPVisionModelWithProjection", "image_embeds", (6,),
    ),
    "clip": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=VISION | {"projection_dim": 6}, text_config=TEXT, projection_dim=6)
        ),
        "CLIPVisionModelWithProjection", "image_embeds", (6,),
    ),
    "siglip": (
        lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)),
        "SiglipVisionModel", "pooler_output", (16,),
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_segmentation_models_are_loaded_as_they_were_saved(name: str, tmp_path: Path) -> None:
    make, kind, output, shape = OTHERS[name]
    torch.manual_seed(0)
    saved = make()
    for parameter in saved.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.2)
    saved.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    loaded = loading.load(ModelConfig(spec=f"transformers:{tmp_path}", precision="float64"))
    assert type(loaded.model).__name__ == kind
    assert loaded.network.output_shape == shape
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    model = getattr(transformers, kind).from_pretrained(tmp_path).double().eval()
    expected = getattr(model(x), output)
    torch.testing.assert_close(loaded.network.module(x.detach()), expected.detach(), rtol=1e-8, atol=1e-8)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    found = Explainer(loaded.network, None, ["gradient"])(x.detach(), weights).maps["gradient"]
    assert float((found - gradient).norm()) <= 1e-8 * float(gradient.norm())


@pytest.mark.full
def test_classifier_without_saved_weights_is_an_error(tmp_path: Path) -> None:
    model = transformers.ViTModel(CONFIGS["vit"]())
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="which would be random: classifier"):
        loading.load(ModelConfig(spec=f"transformers:{tmp_path}"))


def save_model(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.id2label = dict(enumerate(["tench", "goldfish", "shark", "ray", "cock"]))
    model = transformers.AutoModelForImageClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.2)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_the_models_own(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, name)
    loaded = loading.load(ModelConfig(spec=f"transformers:{folder}", precision="float64"))
    network = loaded.network
    assert loaded.traced.output == "logits (of logits)"
    x = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).double().eval()
    logits = model(x).logits
    torch.testing.assert_close(network.module(x.detach()), logits.detach(), rtol=1e-8, atol=1e-8)
    classes = logits.argmax(1)
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), x)
    found = Explainer(network, None, ["gradient"])(x.detach(), classes).maps["gradient"]
    assert float((found - gradient).norm()) <= 1e-8 * float(gradient.norm())


@pytest.mark.full
def test_fit_of_a_transformer_needs_no_option(tmp_path: Path, shards: list[str]) -> None:
    folder = save_model(tmp_path / "model", "vit")
    model = ModelConfig(spec=f"transformers:{folder}")
    run = fit(FitConfig(model=model, shards=tuple(shards[:1]), out=str(tmp_path / "run")), Resources(workers=0))
    manifest = run.manifest()
    assert manifest["fit"]["samples"] == 6
    assert manifest["constant_factors"]["norms"] == 5
    assert {op["gate"]["name"] for op in manifest["operators"] if op["gate"]} == {"gelu"}


@pytest.mark.full
def test_preprocessing_and_names_are_the_models(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "vit")
    assert load_class_names(f"transformers:{folder}", None)[1] == ("goldfish", 1)
    loaded = loading.load(ModelConfig(spec=f"transformers:{folder}"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).resize((70, 50))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    buffer = io.BytesIO()
    image.save(buffer, "png")
    found = decode({"png": buffer.getvalue()}, loaded.preprocessing)
    assert found.shape == expected.shape == (3, SIDE, SIDE)
    assert float((found - expected).abs().max()) < 2.1 * 2 / 255  # two steps of a pixel, whose deviation is 0.5


PROCESSORS = {
    "vit": ({"size": {"height": 224, "width": 224}, "resample": 2}, (224, 224, "bilinear", "squash")),
    "number": ({"size": 384, "resample": 3}, (384, 384, "bicubic", "squash")),
    "crop": (
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
        (224, 256, "bilinear", "center"),
    ),
    "convnext": ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}, (224, 256, "bicubic", "center")),
    "large convnext": ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384, "bilinear", "squash")),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processors_are_converted(name: str) -> None:
    config, (size, resize, interpolation, mode) = PROCESSORS[name]
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    found = convert_image_processor(config | statistics, "transformers:x")
    assert (found.image_size, found.resize, found.interpolation, found.crop_mode) == (size, resize, interpolation, mode)
    assert found.std == (0.25,) * 3


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 224, "width": 192}},
        {"size": {"height": 224, "width": 224}, "do_resize": False},
        {"size": {"height": 224, "width": 224}, "rescale_factor": 1.0},
        {"size": {"longest_edge": 224}},
    ],
)
def test_processor_that_is_not_supported_is_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        convert_image_processor(config, "transformers:x")
    assert "transformers:x" in caught.value.where


def test_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers cannot load"):
        loading.load(ModelConfig(spec=f"transformers:{tmp_path}"))

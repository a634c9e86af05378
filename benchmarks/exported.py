"""Explainers as models: `python -m benchmarks.exported [--only NAME …] [--write docs]`.

Networks of torchvision with random weights, and patterns fitted on a few random images. Each explainer is written as a
`.pt2` and an `.onnx` file, whose maps are compared with its own. Times are ratios of the same rounds: CPU time of one
thread, which other work on the machine changes less than the clock. Rows of other networks stay in the table.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer, vgg11

from benchmarks.explaining import plain_gradient
from benchmarks.pages import Cell, Table, load_table, make_parser, save_results
from benchmarks.timing import median_and_quartiles
from patterns import Explainer, Network, UserError, accumulate, choose, export_program, solve, trace
from ray_jobs.jobs.onnx_export import write_onnx

SIZE = 96
IMAGES = 6
METHOD = "patternattribution"
ESTIMATORS = "two-component,two-component-own-mean"
COLUMNS = {
    "network": "",
    "size ÷ model": "{:.2f}",
    "time ÷ forward and backward": "{:.2f} ({:.2f} to {:.2f})",
    "`.pt2` − Explainer": "{:.0e}",
    "`.onnx` − Explainer": "{:.0e}",
    "Explainer − float64": "{:.0e}",
}


def vgg11_convolutions() -> nn.Module:
    """Return VGG-11's convolutions, followed by one linear layer of their mean."""
    return nn.Sequential(vgg11().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def vision_transformer() -> nn.Module:
    """Return a small vision transformer with random weights of its last layer, which torchvision sets to 0."""
    model = VisionTransformer(SIZE, 16, 6, 6, 192, 768)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    """Return a function that makes a network of torchvision with random weights."""
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return lambda: torchvision.models.get_model(name, weights=None, **options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "AlexNet": of_torchvision("alexnet"),
    "VGG-11, convolutions": vgg11_convolutions,
    "ResNet-18": of_torchvision("resnet18"),
    "SqueezeNet 1.1": of_torchvision("squeezenet1_1"),
    "DenseNet-121": of_torchvision("densenet121"),
    "GoogLeNet": of_torchvision("googlenet"),
    "ShuffleNet V2 ×0.5": of_torchvision("shufflenet_v2_x0_5"),
    "MobileNetV3-Small": of_torchvision("mobilenet_v3_small"),
    "MNASNet 0.5": of_torchvision("mnasnet0_5"),
    "EfficientNet-B0": of_torchvision("efficientnet_b0"),
    "RegNetY-400MF": of_torchvision("regnet_y_400mf"),
    "ConvNeXt-Tiny": of_torchvision("convnext_tiny"),
    "Vision transformer": vision_transformer,
    "Swin-T": of_torchvision("swin_t"),
}


@dataclass(frozen=True)
class Measured:
    """What was measured of a network.

    Attributes:
        size: Bytes of the `.pt2` file by bytes of the model's weights.
        onnx_size: Likewise for the `.onnx` file; NaN if ONNX lacks an operation.
        time: CPU time of the program by that of the model's forward and backward pass, as `median_and_quartiles`.
        error: The largest ‖difference‖ / ‖map‖ of the `.pt2` file's maps over the images.
        onnx_error: Likewise for the `.onnx` file.
        onnx_median: The median of these errors over the images.
        rounding: Likewise for the explainer itself, compared with float64.
        lacks: Why there is no `.onnx` file; "" if there is one.
    """

    size: float
    onnx_size: float
    time: Cell
    error: float
    onnx_error: float
    onnx_median: float
    rounding: float
    lacks: str

    def row(self, name: str) -> list[Cell]:
        """Return the row of the table."""
        return [name, self.size, self.time, self.error, self.lacks or self.onnx_error, self.rounding]


def measure(name: str, folder: Path, rounds: int = 5) -> Measured:
    """Export the explainer of a network to a folder and measure it.

    Args:
        name: A name from `NETWORKS`.
        folder: A folder for the files.
        rounds: The number of rounds in which times are compared; 0: they are not.
    """
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    network = trace(model, images[:2], name=name)
    patterns = fit(network, images)
    explainer = Explainer(network, patterns, [METHOD])
    expected = explainer(images).maps[METHOD]
    program = export_program(explainer, [METHOD])
    torch.export.save(program, folder / "explainer.pt2")
    loaded = torch.export.load(folder / "explainer.pt2").module()
    weights = sum(t.nbytes for t in model.state_dict().values())
    ratio = compare_cpu_times(lambda: loaded(images), plain_gradient(model, images), rounds) if rounds else ""
    error, size = largest_error(loaded(images)[1], expected), (folder / "explainer.pt2").stat().st_size / weights
    onnx = folder / "explainer.onnx"
    try:
        write_onnx(program, onnx, ["images"], ["scores", METHOD], {})
    except UserError as lacking:
        return Measured(size, math.nan, ratio, error, math.nan, math.nan, math.nan, lacking.what)
    maps, onnx_size = run_onnx(onnx, images), onnx.stat().st_size / weights
    exact = Explainer(trace(model.double(), images[:2].double(), name=name), widen(patterns), [METHOD])
    rounding = largest_error(expected.double(), exact(images.double()).maps[METHOD])
    errors = list_errors(maps, expected)
    return Measured(size, onnx_size, ratio, error, float(errors.max()), float(errors.median()), rounding, "")


def compare_cpu_times(program: Callable[[], object], plain: Callable[[], object], rounds: int) -> Cell:
    """Return the ratio of the CPU times of two functions as `median_and_quartiles`, after a warm-up round."""
    ratios = []
    for number in range(rounds + 1):
        begun = time.process_time()
        program()
        between = time.process_time()
        plain()
        if number:
            ratios.append((between - begun) / (time.process_time() - between))
    return median_and_quartiles(ratios)


def widen(patterns: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return patterns in float64."""
    return {name: None if pattern is None else pattern.double() for name, pattern in patterns.items()}


def fit(network: Network, images: Tensor) -> dict[str, Tensor | None]:
    """Return the paper's patterns of a network, which do not divide by outputs that may be close to 0."""
    moments = accumulate(network, [images])
    solved = {name: solve(op, moments[name], ESTIMATORS).patterns for name, op in network.operators.items()}
    return choose(network, solved, "paper")


def run_onnx(file: Path, images: Tensor) -> Tensor:
    """Return the maps that ONNX Runtime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (maps,) = session.run([METHOD], {"images": images.numpy()})
    return torch.from_numpy(np.asarray(maps))


def list_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return ‖found - expected‖ / ‖expected‖ of each sample, (N,)."""
    found, expected = found.double(), expected.double()  # squares of large maps exceed float32
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest of `list_errors`."""
    return float(list_errors(found, expected).max())


def main() -> None:
    """Measure each network, and write the table of `export-model`."""
    parser = make_parser("benchmarks.exported", __doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = load_table(options.write, "export-model") if options.write else None
    rows = {str(row[0]): row for row in known.rows} if known else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(name, Path(folder), options.rounds)
        rows[name] = measured.row(name)
        print(name, measured, flush=True)
        table = Table(COLUMNS, [rows[each] for each in NETWORKS if each in rows])
        if options.write:
            save_results(options.write, "export-model", table)
    print(table.render())


if __name__ == "__main__":
    main()

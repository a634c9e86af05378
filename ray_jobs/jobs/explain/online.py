"""Explanations of images that do not come from shards: for Ray Data and Ray Serve."""

import io
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from patterns import UserError
from ray_jobs.config import ExplainConfig, ModelConfig
from ray_jobs.data.image_decoding import apply_orientation, decode, decode_with_pillow, validate_size
from ray_jobs.data.samples import SampleError
from ray_jobs.data.shard_reader import Batch
from ray_jobs.engine.shard_worker import WorkerResources
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.explain.explain import ExplainWorker, validate
from ray_jobs.jobs.explain.target_files import load_target
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.models.loading import open_model
from ray_jobs.runs.map_files import ExplainedBatch
from ray_jobs.runs.run_folder import Run


class OnlineExplainer:
    """Explainer of images with the patterns of a run, on the GPU that Ray gave this process, or else on the CPU.

    Args:
        run: The folder or URL of a finished fit.
        methods: The methods.
        estimator: The estimator of the methods that name none.
        target: The target; see `ray_jobs.jobs.explain.targets`.
        settings: Settings of the methods by `{method}.{setting}`.
        classes: A file of the classes' names; None: the names that the model's library knows.
        reduction: The reduction of a map's channels.
        size: The height and width of the maps; None: those of the model's input.
        weights: The path or URL of the weights; None: as in the fit.

    Raises:
        UserError: If the arguments do not fit the run.
    """

    def __init__(
        self,
        run: str,
        methods: Sequence[str] = ("patternattribution",),
        estimator: Sequence[str] = ("default",),
        target: str = "predicted",
        settings: Mapping[str, float] | None = None,
        classes: str | None = None,
        reduction: str = "none",
        size: int | None = None,
        weights: str | None = None,
    ) -> None:
        fitted = Run(run)
        model = fitted.read_fitted_model()
        self.names = map_numbers_to_names(load_class_names(model["spec"], classes))
        config = ExplainConfig(
            model=ModelConfig(**{**model, "weights": weights or model["weights"]}),
            patterns=str(locate(run)),
            shards=(),
            out=str(locate(run)),
            methods=tuple(methods),
            estimator=tuple(estimator),
            settings=tuple((settings or {}).items()),
            **load_target(target, run, model["spec"], classes),
            reduction=reduction,
            size=size,
        )
        validate(config)
        scales = fitted.manifest().get("explain", {}).get("scales", {})
        about = fitted.manifest()["model"]
        traced = open_model(config.model, fitted.folder).traced
        traced.require(about["digest"], about.get("constants"), socket.gethostname(), f"the fit in {fitted.folder}")
        self.worker = ExplainWorker(config, traced, scales, find_resources())
        self.worker.prepare()
        needed = self.worker.target.needed_region or ("label" if self.worker.target.needs_label else None)
        if needed is not None:
            raise UserError("", f"the images have no {needed}", "Explain `predicted` or a class.", "target")

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, in order."""
        return self.worker.config.methods

    def decode_images(self, images: Sequence[Any]) -> tuple[torch.Tensor, list[str]]:
        """Decode images.

        Args:
            images: Images in any form that `as_files` accepts.

        Returns:
            The model's input (N, C, H, W) for the images that can be used, and for each image the reason why it cannot
            be used, which is "" if it can.
        """
        tensors, reasons = [], []
        for image in images:
            try:
                tensors.append(decode(as_files(image), self.worker.model.preprocessing))
                reasons.append("")
            except SampleError as error:
                reasons.append(str(error))
        shape = (0, *self.worker.model.preprocessing.input_shape)
        stacked = torch.stack(tensors) if tensors else torch.zeros(shape)
        return stacked.to(self.worker.model.dtype), reasons

    def explain(self, images: torch.Tensor, keys: Sequence[str] | None = None) -> ExplainedBatch:
        """Return the maps of images.

        Args:
            images: The model's input (N, C, H, W), N > 0.
            keys: The keys of the images, from which random methods are seeded; None: their numbers.
        """
        names = [str(number) for number in range(len(images))] if keys is None else list(keys)
        none = [None] * len(images)
        return self.worker.explain(Batch(images, names, list(none), list(none), list(none)))


def find_resources() -> WorkerResources:
    """Return the CPUs and GPUs that Ray gave this process, or all of the machine if the process is no actor."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return WorkerResources(torch.get_num_threads(), torch.cuda.device_count())
    given = ray.get_runtime_context().get_assigned_resources()
    return WorkerResources(given.get("CPU", 1.0), given.get("GPU", 0.0))


def as_files(image: Any) -> dict[str, bytes]:
    """Return an image as the files of a shard's sample.

    Args:
        image: The bytes of a JPEG, PNG or WebP file, in any type of bytes; Hugging Face's `{"bytes": …}`; one of
            Pillow's images; pixels as uint8 (H, W) or (H, W, channels), with 1 to 4 channels as gray, gray and alpha,
            RGB, RGB and alpha; or a ready tensor as floats (C, H, W).

    Raises:
        SampleError: If the image has another form.
    """
    try:
        return encode_image(image)
    except SampleError:
        raise
    except Exception as error:  # Pillow's lazy images and objects of any type raise anything
        raise SampleError(f"{type(error).__name__}: {error}") from error


def encode_image(image: Any) -> dict[str, bytes]:
    """Return an image as the files of a sample; see `as_files`."""
    if isinstance(image, Mapping) and "bytes" in image:
        if image["bytes"] is None and image.get("path"):
            raise SampleError(f"a path without its bytes: {str(image['path'])[:80]!r}; read the file first")
        image = image["bytes"]
    if image is None:
        raise SampleError("no image (null)")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return {"jpg": bytes(image)}
    if isinstance(image, str):
        raise SampleError(f"text instead of an image: {image[:80]!r}; read the file first")
    if isinstance(image, Image.Image):
        validate_size(image)
        upright_ = apply_orientation(
            image, decode_with_pillow(image, "L" if image.mode in ("1", "L", "LA", "La") else "RGB")
        )
        return encode_png(upright_.image())
    array = np.asarray(image)
    if array.size == 0:
        raise SampleError(f"an image without pixels, of shape {array.shape}")
    if array.dtype == np.uint8:
        return {"jpg": array.tobytes()} if array.ndim == 1 else encode_png(Image.fromarray(drop_alpha(array)))
    if array.dtype.kind != "f":
        raise SampleError(f"values of type {array.dtype}; pixels are uint8, and a ready tensor is of floats")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"npy": buffer.getvalue()}


def drop_alpha(pixels: np.ndarray) -> np.ndarray:
    """Return the gray or RGB channels of pixels (H, W) or (H, W, 1 to 4)."""
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim != 3 or not 1 <= pixels.shape[-1] <= 4:
        raise SampleError(f"pixels of shape {pixels.shape}; (H, W) and (H, W, 1 to 4) are accepted")
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] <= 2 else pixels[..., :3])


def encode_png(image: Image.Image) -> dict[str, bytes]:
    """Return an image as the PNG file of a sample."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=0)
    return {"png": buffer.getvalue()}


class ExplainBatch(OnlineExplainer):
    """Explains batches of Ray Data, with the arguments of OnlineExplainer.

    It reads the column `image`, or else `bytes`, in any form that `as_files` accepts. For each method it adds a float32
    column (C, H, W) and `{method}_exponent`; the map is column · 2^exponent. It also adds `prediction`, `probability`,
    `target`, `score`, and `refused`: the reason why an image cannot be used, or else "". The maps of such an image are
    0, and its prediction and target are -1.

    For example::

        images = ray.data.read_images(folder, include_paths=True)
        images.map_batches(ExplainBatch, fn_constructor_kwargs={"run": RUN}, batch_size=32, concurrency=4, num_gpus=1)
    """

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a batch of Ray Data with the columns of its explanations."""
        column = next((name for name in ("image", "bytes") if name in batch), None)
        if column is None:
            found = ", ".join(batch)
            raise UserError("ExplainBatch", f"no column `image` or `bytes` among {found}", "Rename the images' column.")
        inputs, reasons = self.decode_images(list(batch[column]))
        used = np.array([not reason for reason in reasons], dtype=bool)
        columns: dict[str, np.ndarray] = {"refused": np.array(reasons, dtype=object)}
        if not used.any():  # only a map shows the shape of the maps
            blank = torch.zeros((1, *self.worker.model.preprocessing.input_shape), dtype=inputs.dtype)
            explained, kept = self.explain(blank), 0
        else:
            explained, kept = self.explain(inputs), len(inputs)
        for method, arrays in explained.arrays.items():
            columns[method] = scatter(arrays.astype(np.float32)[:kept], used, 0)
            columns[f"{method}_exponent"] = scatter(explained.exponents[method][:kept], used, 0)
        for name, nothing in (("prediction", -1), ("probability", 0), ("target", -1), ("score", 0)):
            values = [nothing if row[name] is None else row[name] for row in explained.rows]
            columns[name] = scatter(np.array(values)[:kept], used, nothing)
        return {**batch, **columns}


def scatter(values: np.ndarray, used: np.ndarray, nothing: float) -> np.ndarray:
    """Return the values of all samples: `values` for those that were used, and `nothing` for the others."""
    found = np.full((len(used), *values.shape[1:]), nothing, values.dtype)
    found[used] = values
    return found

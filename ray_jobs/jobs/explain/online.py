"""Explanations of images that come one by one or in batches, from elsewhere than shards: Ray Data, Ray Serve."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from patterns import UserError
from ray_jobs.config import ExplainConfig, ModelConfig
from ray_jobs.data.image_decoding import by_pillow, check_size, decode, turned
from ray_jobs.data.samples import SampleError
from ray_jobs.data.shard_reader import Batch
from ray_jobs.engine.shard_worker import WorkerResources
from ray_jobs.io.object_store import located
from ray_jobs.jobs.explain.explain import ExplainWorker, checked
from ray_jobs.jobs.explain.targets import names_for
from ray_jobs.models.class_names import captions, class_names
from ray_jobs.models.loading import ModelDigests
from ray_jobs.runs.map_files import Explained
from ray_jobs.runs.run_folder import Run


class OnlineExplainer:
    """Explains images by the patterns of a run, where Ray put this process: on its GPU, if it was given one.

    run: the folder or URL of a finished fit.  The other arguments are those of `patternnet explain`.
    Raises UserError where they do not fit together.
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
        model = fitted.fitted_model()
        self.names = captions(class_names(model["spec"], classes))
        config = ExplainConfig(
            model=ModelConfig(**{**model, "weights": weights or model["weights"]}),
            patterns=str(located(run)),
            shards=(),
            out=str(located(run)),
            methods=tuple(methods),
            estimator=tuple(estimator),
            settings=tuple((settings or {}).items()),
            target=target,
            classes=names_for(target, model["spec"], classes),
            reduction=reduction,
            size=size,
        )
        checked(config)
        scales = fitted.manifest().get("explain", {}).get("scales", {})
        about = fitted.manifest()["model"]
        self.worker = ExplainWorker(config, ModelDigests(about["digest"], about.get("constants")), scales, own_share())
        self.worker.ready()
        if self.worker.target.needs_label:
            raise UserError("target", "images from elsewhere have no label", "Explain `predicted` or a class.")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in order."""
        return self.worker.config.methods

    def inputs(self, images: Sequence[Any]) -> tuple[torch.Tensor, list[str]]:
        """What the model takes (N, C, H, W) of the images that can be used, and why each cannot; "" where it can.

        images: of any form that `as_sample` takes.
        """
        tensors, reasons = [], []
        for image in images:
            try:
                tensors.append(decode(as_sample(image), self.worker.loaded.preprocessing))
                reasons.append("")
            except SampleError as error:
                reasons.append(str(error))
        shape = (0, *self.worker.loaded.preprocessing.input_shape)
        stacked = torch.stack(tensors) if tensors else torch.zeros(shape)
        return stacked.to(self.worker.loaded.dtype), reasons

    def explain(self, images: torch.Tensor, keys: Sequence[str] | None = None) -> Explained:
        """The maps and what is said of model inputs (N, C, H, W), N > 0. keys: of what is random."""
        named_ = [str(number) for number in range(len(images))] if keys is None else list(keys)
        none = [None] * len(images)
        return self.worker.explain(Batch(images, named_, list(none), list(none)))


def own_share() -> WorkerResources:
    """What of the machine Ray gave this process; all of it, where it is none of Ray's actors."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return WorkerResources(torch.get_num_threads(), torch.cuda.device_count())
    given = ray.get_runtime_context().get_assigned_resources()
    return WorkerResources(given.get("CPU", 1.0), given.get("GPU", 0.0))


def as_sample(image: Any) -> dict[str, Any]:
    """Return an image in the form of a shard's sample.

    Args:
        image: The bytes of a JPEG, PNG or WebP file, in any type of bytes; Hugging Face's `{"bytes": …}`; one of
            Pillow's images; pixels as uint8 (H, W) or (H, W, channels), with 1 to 4 channels as grey, grey and alpha,
            RGB, RGB and alpha; or a ready tensor as floats (C, H, W).

    Raises:
        SampleError: If it is none of these.
    """
    try:
        return sample_of(image)
    except SampleError:
        raise
    except Exception as error:  # Pillow's lazy images and objects of any type raise anything
        raise SampleError(f"{type(error).__name__}: {error}") from error


def sample_of(image: Any) -> dict[str, Any]:
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
        check_size(image)
        upright_ = turned(image, by_pillow(image, "L" if image.mode in ("1", "L", "LA", "La") else "RGB"))
        return png(upright_.image())
    array = np.asarray(image)
    if array.size == 0:
        raise SampleError(f"an image without pixels, of shape {array.shape}")
    if array.dtype == np.uint8:
        return {"jpg": array.tobytes()} if array.ndim == 1 else png(Image.fromarray(visible(array)))
    if array.dtype.kind != "f":
        raise SampleError(f"values of type {array.dtype}; pixels are uint8, and a ready tensor is of floats")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"npy": buffer.getvalue()}


def visible(pixels: np.ndarray) -> np.ndarray:
    """The grey or RGB channels of pixels (H, W) or (H, W, 1 to 4); transparency is dropped."""
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim != 3 or not 1 <= pixels.shape[-1] <= 4:
        raise SampleError(f"pixels of shape {pixels.shape}; (H, W) and (H, W, 1 to 4) are read")
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] <= 2 else pixels[..., :3])


def png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=0)
    return {"png": buffer.getvalue()}


class ExplainBatch(OnlineExplainer):
    """For Ray Data, with the arguments of OnlineExplainer:

        images = ray.data.read_images(folder, include_paths=True)
        images.map_batches(ExplainBatch, fn_constructor_kwargs={"run": RUN}, batch_size=32, concurrency=4, num_gpus=1)

    It takes the column `image` (see `inputs`), else `bytes`, and adds for each method a float32 column (C, H, W) and
    `{method}_exponent`, the map being column · 2^exponent; `prediction`, `probability`, `target`, `score`; and
    `refused`: why an image cannot be used, else "". Its maps are 0 then, and prediction and target -1.
    """

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Explain a batch of Ray Data's."""
        column = next((name for name in ("image", "bytes") if name in batch), None)
        if column is None:
            found = ", ".join(batch)
            raise UserError("ExplainBatch", f"no column image or bytes among {found}", "Rename the images' column.")
        inputs, reasons = self.inputs(list(batch[column]))
        used = np.array([not reason for reason in reasons], dtype=bool)
        columns: dict[str, np.ndarray] = {"refused": np.array(reasons, dtype=object)}
        if not used.any():  # whose maps' shape only a map can tell
            blank = torch.zeros((1, *self.worker.loaded.preprocessing.input_shape), dtype=inputs.dtype)
            explained, kept = self.explain(blank), 0
        else:
            explained, kept = self.explain(inputs), len(inputs)
        for method, arrays in explained.arrays.items():
            columns[method] = spread(arrays.astype(np.float32)[:kept], used, 0)
            columns[f"{method}_exponent"] = spread(explained.exponents[method][:kept], used, 0)
        for name, nothing in (("prediction", -1), ("probability", 0), ("target", -1), ("score", 0)):
            values = [nothing if row[name] is None else row[name] for row in explained.rows]
            columns[name] = spread(np.array(values)[:kept], used, nothing)
        return {**batch, **columns}


def spread(values: np.ndarray, used: np.ndarray, nothing: float) -> np.ndarray:
    """The values of the samples that were used, in their places among all."""
    everywhere = np.full((len(used), *values.shape[1:]), nothing, values.dtype)
    everywhere[used] = values
    return everywhere

"""The part of a worker that chooses the targets of each sample and describes its predictions."""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.attribution import Explanation
from ray_jobs.config import TargetConfig
from ray_jobs.data.shard_reader import Batch
from ray_jobs.jobs.explain.map_statistics import find_region
from ray_jobs.jobs.explain.targets import Regions, parse_target
from ray_jobs.jobs.method_job import MethodWorker

C = TypeVar("C", bound=TargetConfig)


class TargetWorker(MethodWorker[C]):
    """A worker with a target."""

    def prepare_target(self) -> None:
        """Place the model on the device, and parse the target."""
        self.place_model()
        self.target = parse_target(self.config.target, self.model.network, self.config.classes, self.config.vector)
        self.reader_config = replace(
            self.reader_config,
            classes=self.model.network.output_shape[0] if self.target.needs_label else None,
            with_regions=True,
            needed_region=self.target.needed_region,
        )

    def find_regions(self, batch: Batch, scores: Tensor) -> Regions:
        """Return the function that gives the share of each position of the output in the samples' masks or boxes."""
        size = batch.images.shape[2:]

        def shares(classes: Tensor) -> Tensor:
            masks = batch.masks if self.target.region == "mask" else [None] * len(batch.keys)
            regions = [
                find_region(mask, boxes, number, *size)
                for mask, boxes, number in zip(masks, batch.boxes, classes.tolist())
            ]
            stacked = torch.stack([torch.zeros(size, dtype=torch.bool) if r is None else r for r in regions])
            return F.adaptive_avg_pool2d(stacked.float(), (scores.shape[2], scores.shape[3])).to(scores)

        return shares

    def describe_samples(self, batch: Batch, images: Tensor, explanation: Explanation) -> list[dict[str, Any]]:
        """Return label, prediction, probability, target and score of each sample of a batch."""
        target, values = self.target, explanation.scores.float()
        scores = values
        if target.operator is not None:
            with torch.inference_mode():
                scores = self.model.network.module(images).float()
        prediction: list[int | None] = [None] * len(scores)
        probability: list[float | None] = [None] * len(scores)
        if scores.dim() == 2 and scores.shape[1] > 1 and not target.embeds:  # other outputs predict no class
            probability, prediction = (values.tolist() for values in scores.softmax(1).max(1))
        classes = target.pick_classes(values, batch.labels)
        score = target.score(values, classes, self.find_regions(batch, values))
        columns = {
            "label": batch.labels,
            "prediction": prediction,
            "probability": probability,
            "target": classes.tolist() if len(target.picks) > 1 else classes[:, 0].tolist(),
            "score": score.tolist() if target.maps > 1 else score[:, 0].tolist(),
        }
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

"""The result of an explainer."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from patterns.attribution.channels import Channels
from patterns.attribution.rendering import RenderedExplanation, render_map


@dataclass(frozen=True)
class Explanation:
    """The maps of a batch. The map of a method, in full, is maps[method] · 2^exponents[method].

    Attributes:
        maps: The maps by method, shape of the inputs (N, …); (N, T, …) if T targets per sample were explained.
        exponents: The exponents by method; 0 unless the magnitude of the map exceeds the range of its dtype.
        scores: The network's output, shape (N, K, …).
        targets: The explained targets: classes, int64 (N,) or (N, T), or weights in the shape of the scores.
        channels: Relevance and activation of the channels of the explainer's `channels`; None if it has none.

    Example:
        >>> import torch
        >>> from patterns import Explainer, trace
        >>> network = trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))
        >>> explanation = Explainer(network, None, ["gradient"])(torch.randn(3, 4), targets=[0, 1, 1])
        >>> explanation
        Explanation of 3 samples by gradient; targets [0, 1, 1]
        >>> explanation.maps["gradient"].shape, explanation.exponents["gradient"]
        (torch.Size([3, 4]), 0)
    """

    maps: dict[str, Tensor]
    exponents: dict[str, int]
    scores: Tensor
    targets: Tensor
    channels: Channels | None = None

    def __repr__(self) -> str:
        methods = ", ".join(self.maps)
        return f"Explanation of {len(self.scores)} samples by {methods}; targets {self.targets.tolist()}"

    def render(self, index: int, photograph: Image.Image) -> RenderedExplanation:
        """Render the maps of one sample as pictures. If there are several targets, render the maps of the first target.

        Args:
            index: The sample's index in the batch.
            photograph: The sample's input as a picture.
        """
        several = not self.targets.is_floating_point() and self.targets.dim() == 2
        maps = {name: m[index, 0] if several else m[index] for name, m in self.maps.items()}
        target = self.targets.view(len(self.targets), -1)[index, 0]
        caption = "" if self.targets.is_floating_point() else f"{int(target)}"
        if caption and self.scores.dim() == 2:
            caption += f": {float(self.scores[index].softmax(0)[target]):.0%}"
        pictures = {name: render_map(name, m.float().cpu().numpy()) for name, m in maps.items()}
        return RenderedExplanation(photograph, caption, pictures)

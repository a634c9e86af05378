"""Checks of a model's forward pass: one output row per sample, which depends on that sample alone.

The model runs on a few random samples in different batches. The outputs show what the graph does not: randomness,
numbers that change from call to call, and operations across the batch.
"""

import torch
from torch import Tensor, nn
from torch.fx import Node

from patterns.errors import UserError
from patterns.tracing.aten_graph import AtenGraph, arguments, first_line, opname, source

INPUT_REMEDY = "Set `image_size`, `mean` and `std` to the model's input (one mean for each input channel)."
ROWS_REMEDY = (
    "Return one row of scores for each sample: write x.flatten(1) instead of x.view(-1, …) in the model, keep the "
    "batch in dimension 0, and check the image size."
)
RANDOM_REMEDY = "Remove it from evaluation: pass training=self.training to F.dropout, or use nn.Dropout."


def draw_samples_like(example: Tensor, count: int = 3) -> Tensor:
    """Draw random samples in [0, 1) in an example's shape, dtype and device, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand((count, *example.shape[1:]), generator=generator, dtype=torch.float64)
    return values.to(example)


def compute_independent_outputs(model: nn.Module, samples: Tensor, name: str) -> Tensor:
    """Return a model's output for three samples, after checking that each row depends on its own sample alone.

    Args:
        model: The model, in evaluation mode.
        samples: Shape (3, …).
        name: What to call the model in messages.

    Returns:
        The output, shape (3, …).

    Raises:
        UserError: If the model does not accept the samples or does not return one tensor, if a batch of n samples does
            not give n rows, if the output is random, or if a row depends on the other samples of the batch.
    """
    with torch.random.fork_rng():
        whole = run_model(model, samples, name)
        reordered = run_model(model, samples[[1, 0]], name)
        if agree(reordered, whole[[1, 0]]) and gives_same_alone(model, samples[2:], whole[2:]):
            return whole
        again = run_model(model, samples, name)
    if not agree(again, whole):
        what = "the forward pass is random or changes from call to call: the same input gives different outputs"
        raise UserError(name, what, RANDOM_REMEDY)
    across = [n for n, m in model.named_modules() if normalizes_batches(m)]
    cause = f" (batch norm without running statistics: {', '.join(across[:3])})" if across else ""
    raise UserError(
        name,
        f"the output for a sample depends on the other samples in its batch{cause}",
        "Use running statistics in batch norms (track_running_stats=True), and no operation over dimension 0.",
    )


def gives_same_alone(model: nn.Module, sample: Tensor, expected: Tensor) -> bool:
    """Return whether a model gives the same output for one sample alone, perhaps without the batch dimension.

    Also True if the model does not accept one sample: the network is traced with several samples and accepts it.
    """
    try:
        output = model(sample)
    except Exception:  # the model's own code may fail, for example after a squeeze() that removed the batch
        return True
    return (
        isinstance(output, Tensor) and output.numel() == expected.numel() and agree(output.view_as(expected), expected)
    )


def normalizes_batches(module: nn.Module) -> bool:
    """Return whether a module is a batch norm without running statistics, which uses those of each batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats


def run_model(model: nn.Module, samples: Tensor, name: str) -> Tensor:
    """Return the model's output for a batch.

    Raises:
        UserError: If the output is not one tensor with a row for each sample.
    """
    try:
        output = model(samples)
    except Exception as error:  # the model's own code may raise any error
        what = f"the model does not take an input of shape {tuple(samples.shape[1:])} ({first_line(error)})"
        raise UserError(name, what, INPUT_REMEDY) from error
    if not isinstance(output, Tensor):
        raise UserError(name, f"the model returns {type(output).__name__}", "Wrap it to return one tensor of scores.")
    if output.dim() == 0 or len(output) != len(samples):
        what = f"the model returns an output of shape {tuple(output.shape)} for {len(samples)} samples"
        raise UserError(name, what, ROWS_REMEDY)
    return output


def agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether two outputs of the same samples are equal up to rounding."""
    if found.shape != expected.shape or found.is_meta:  # the meta device holds no numbers
        return found.shape == expected.shape
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=rounding_tolerance(expected) * largest, equal_nan=True)


def rounding_tolerance(output: Tensor) -> float:
    """Return the tolerated difference relative to the largest output, eps^0.4.

    This is 2e-3 for float32, 6e-2 with TF32, 6e-2 for float16, 0.14 for bfloat16, and 5e-7 for float64.
    """
    tf32 = output.is_cuda and output.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return (2.0**-10 if tf32 else torch.finfo(output.dtype).eps) ** 0.4


def require_deterministic(graph: AtenGraph, name: str) -> None:
    """Raise UserError if the exported graph draws random numbers."""
    for node in graph.fx.nodes:
        if draws_random_numbers(node):
            what = f"the forward pass draws random numbers in evaluation mode: {opname(node)} in {source(node)}"
            raise UserError(name, what, RANDOM_REMEDY)


def draws_random_numbers(node: Node) -> bool:
    """Return whether a call draws random numbers; it does not if it is not training or has a rate of 0."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    a = arguments(node)
    switches = [a[key] for key in ("train", "training") if key in a]
    rates = [a[key] for key in ("p", "dropout_p") if key in a and isinstance(a[key], float | int)]
    return all(switch is not False for switch in switches) and all(rate > 0 for rate in rates)

"""Tracing: from an `nn.Module` to a network of linear operators.

The passes run in the order of `network.build_network`: export (`aten_graph`), constant folding (`folding`),
linearization of accepted operations (`linearize`), canonical forms (`canonicalize`, `rectifiers`, `average_pools`,
`constant_products`), lowering to operators (`lower`), and splitting of fused layers (`fused_layers`).
"""

from patterns.tracing.digests import digest
from patterns.tracing.inputs import Targets
from patterns.tracing.network import Network, trace

__all__ = ["Network", "Targets", "digest", "trace"]

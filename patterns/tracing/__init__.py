"""Tracing: from an `nn.Module` to a network of linear operators.

`network.build_network` calls the passes; docs/architecture.md describes each of them.
"""

from patterns.tracing.digests import digest
from patterns.tracing.inputs import Targets
from patterns.tracing.network import Network, trace

__all__ = ["Network", "Targets", "digest", "trace"]

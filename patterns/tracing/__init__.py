"""From an `nn.Module` to a network of linear operators."""

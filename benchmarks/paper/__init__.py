"""The paper's experiments on its own network: VGG-16, as far as its convolutions go."""

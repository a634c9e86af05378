"""From a specification to a model with its weights."""

"""Models: load a model, its weights, its preprocessing and its class names from a specification."""

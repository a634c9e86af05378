"""From a run's files to what people look at."""

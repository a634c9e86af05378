"""The job that describes a dataset by its explanations: classes, clusters, channels and unusual samples."""

"""The names of the tables of an atlas in the folder of its run."""

CLASSES = "classes.parquet"
CLUSTERS = "clusters.parquet"
CHANNELS = "channels.parquet"
CONFUSIONS = "confusions.parquet"
SAMPLES_FILE = "samples.parquet"
ANOMALIES = "anomalies.parquet"
TABLES = (CLASSES, CLUSTERS, CHANNELS, CONFUSIONS, SAMPLES_FILE, ANOMALIES)

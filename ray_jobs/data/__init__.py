"""Data: shard specifications are resolved to shards, and shards are read as batches of decoded samples."""

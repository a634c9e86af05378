"""From shard specifications to batches."""

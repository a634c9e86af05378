"""The jobs over shards."""

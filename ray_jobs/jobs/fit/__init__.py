"""The job that fits patterns."""

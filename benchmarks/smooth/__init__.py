"""The study of docs/smooth.md: PatternAttribution on networks with smooth gates, norms and attention."""

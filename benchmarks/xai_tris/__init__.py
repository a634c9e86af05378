"""The XAI-TRIS benchmark of attribution maps (Clark et al. 2024, arXiv 2306.12816)."""

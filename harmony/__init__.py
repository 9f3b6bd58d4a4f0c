"""Compose one instance into one photograph with diffusion models. See README.md."""

"""Training a small Stable-Diffusion-shaped teacher from nothing, for data that no public checkpoint knows."""

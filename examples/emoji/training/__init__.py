"""Training a small Stable-Diffusion-shaped teacher from scratch, for data that no public checkpoint was trained on."""

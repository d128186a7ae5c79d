"""How an expert replica makes images: denoising steps, batching, batch size, the replica."""

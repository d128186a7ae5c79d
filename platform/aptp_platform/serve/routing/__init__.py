"""Which expert makes a prompt's images: prompt cache, selection, overflow, drift, decision log, the router replica."""

"""What an expert replica needs on a CPU alone: packed weights, and turns of replicas that share cores."""

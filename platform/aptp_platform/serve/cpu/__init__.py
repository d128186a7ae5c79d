"""What replicas on CPUs use in addition: packed weights, where a replica measures that they are faster."""

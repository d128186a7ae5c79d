"""What expert replicas on a shared CPU use in addition."""

"""What several test files use: tiny models, runs and releases, an S3 server, a local Ray, faults."""

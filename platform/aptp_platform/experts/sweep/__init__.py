"""The parts of a sweep: what is searched, what is known of its trials, which one is chosen."""

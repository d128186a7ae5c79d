"""Folders and buckets behind one `Store`: atomic writes, one-line errors, leases."""

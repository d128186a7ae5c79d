"""Captioned images in object storage, as rows: read, decoded, encoded."""

"""A release behind HTTP on Ray Serve: ingress, router, one deployment a code."""

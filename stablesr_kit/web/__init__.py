"""A page to restore pictures in, and an HTTP API on the same server."""

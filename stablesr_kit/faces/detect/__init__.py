"""Detectors of faces with five landmarks, and the one to use by name."""

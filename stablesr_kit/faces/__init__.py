"""Faces in photographs: found, aligned, and pasted back."""

"""Clips: their files, the motion in them, and noise that moves with it."""

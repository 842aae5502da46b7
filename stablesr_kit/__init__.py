"""Restore and enlarge real photographs with the prior of a frozen Stable Diffusion."""

"""Training data: photographs, their degraded versions, and data that is computed beforehand."""

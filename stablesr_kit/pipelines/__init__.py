"""The pipelines people call, in the conventions of diffusers."""

"""Networks small enough to be trained from nothing: how they are built and how they start."""

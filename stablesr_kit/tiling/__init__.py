"""A canvas larger than the device: exact tiles of the autoencoder, tiles of latents, memory."""

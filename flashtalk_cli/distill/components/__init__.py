"""Training of the embedded model's parts from nothing: video VAE, speech encoder, image encoder."""

"""Forward corruption and every conversion between the names of a denoiser. Pure mathematics, no networks."""

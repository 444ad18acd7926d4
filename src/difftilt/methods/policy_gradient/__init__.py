"""Policy gradient through the denoising chain."""

"""TokenBridge: VAE, quantizer, masked-autoregressive backbone, channel head, sampler."""

"""What happens after loading: joined products, kernels, a cache of latents, the slider, timing."""

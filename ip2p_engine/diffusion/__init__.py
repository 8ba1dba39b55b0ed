"""The mathematics of diffusion on tensors: schedules, guidance, noise, samplers. No weights, no files."""

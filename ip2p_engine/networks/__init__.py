"""Loaded networks, and what they are told: the model, its conditions, its attention, its denoisers."""

"""Prompt-to-Prompt: pairs of pictures from pairs of captions (Hertz et al. 2022; the paper, section 3.1)."""

"""Variational diffusion unlearning."""

"""Attacks on a bundle and on its defence, and what they leave standing."""

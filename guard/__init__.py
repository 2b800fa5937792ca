"""Guarded image classifiers: a prediction, whether to accept it, and how far it holds."""

__version__ = "0.1.0"

"""Step-wise reinforcement learning of language models with sparse, masked updates."""

__version__ = "0.1.0"

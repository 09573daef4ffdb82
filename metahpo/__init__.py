"""Meta-learning and hyperparameter optimisation over one inner loop, for PyTorch."""

__version__ = "0.2.0"

"""Preference optimisation of language models in JAX, from laptop to TPU pod.

Import the module you need: `from dpop_jax import losses`.
"""

__version__ = "0.1.0"

"""What environments are built on: gymnax, without the plotting libraries of its renderers.

Seaborn alone, which no step of an environment needs, takes a third of the time of gymnax's import.
"""

from mbrl_jax import lazy

with lazy.deferred("matplotlib.pyplot", "seaborn"):
    import gymnax
    from gymnax.environments import CartPole, ContinuousMountainCar, environment, spaces

__all__ = ["CartPole", "ContinuousMountainCar", "environment", "gymnax", "spaces"]

"""Noise whose power falls with frequency, so that sampled actions sway instead of trembling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl_jax.types import Scalar


def colored_noise(key: jax.Array, shape: tuple[int, ...], beta: Scalar) -> jax.Array:
    """Gaussian noise along the last axis with a power spectrum of 1 / f**beta; unit variance.

    Timmer and Koenig (1995), "On generating power law noise": random Fourier coefficients with the
    scale f**(-beta / 2), where the lowest frequency stands in for zero. beta = 0 is white.
    """
    steps = shape[-1]
    if steps == 1:
        return jax.random.normal(key, shape)
    frequency = jnp.fft.rfftfreq(steps)
    scale = jnp.maximum(frequency, 1.0 / steps) ** (-beta / 2.0)
    # the mean and, for an even length, the highest frequency have no imaginary part
    real_only = jnp.zeros(len(frequency), bool).at[0].set(True)
    if steps % 2 == 0:
        real_only = real_only.at[-1].set(True)

    def along(x: jax.Array) -> jax.Array:
        return x.reshape((1,) * (len(shape) - 1) + x.shape)

    parts = jax.random.normal(key, (2, *shape[:-1], len(frequency)))
    real = parts[0] * along(jnp.where(real_only, jnp.sqrt(2.0), 1.0))
    imaginary = parts[1] * along(jnp.where(real_only, 0.0, 1.0))
    spectrum = along(scale) * (real + 1j * imaginary)
    # the variance of a sample: every pair of conjugate coefficients counts twice
    weight = jnp.where(real_only, 2.0, 4.0)
    std = jnp.sqrt(jnp.sum(weight * jnp.square(scale))) / steps
    return jnp.fft.irfft(spectrum, n=steps, axis=-1) / std

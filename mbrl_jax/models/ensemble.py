"""An ensemble of dynamics networks as one stack of parameters.

Chua et al. (2018), "PETS", for the ways to propagate uncertainty: TS1 (each state draws a member
at every step), TSinf (a state keeps its member), expectation (the mean over members), distribution
sampling (one Gaussian with the mixture's moments) and moment matching (that, refitted over the
particles of a candidate). Janner et al. (2019), "MBPO", for elites.

TS1 and TSinf evaluate one member for each state, not all of them: the batch is cut into equal
blocks, as many for each elite. TS1 deals the elites out to the blocks anew at every step, so each
state meets each elite with the same chance, while neighbours in a block share theirs. TSinf keeps
the blocks, so row i of a batch has the same member at every step of a rollout.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.models import dynamics, fit
from mbrl_jax.models.dynamics import (
    Bounds,
    Dynamics,
    DynamicsModel,
    Gaussian,
    Prediction,
    Scaling,
    wide,
)
from mbrl_jax.types import InputError, PyTree, Scalar, Transition, unknown
from mbrl_jax.x64 import in_32_bits

Propagation = Literal["ts1", "tsinf", "expectation", "distribution", "moment_matching"]
Score = Literal["none", "std", "max_distance", "jensen_shannon"]
BLOCK_ROWS = 2_000  # of a member at once on a CPU, so that a layer's output stays in its cache


class Params(NamedTuple):
    """Of E members."""

    net: PyTree  # [E, ...]
    bounds: Bounds  # shared
    scaling: Scaling  # shared
    elites: jax.Array  # [M] int32, the members that predict


class Moments(NamedTuple):
    """Of a uniform mixture of Gaussians; its variance is the sum of both parts."""

    mean: jax.Array  # [*lead, K]
    aleatoric: jax.Array  # [*lead, K] mean of the members' variances: noise of the world
    epistemic: jax.Array  # [*lead, K] variance of the members' means: what data would tell


class Ensemble(NamedTuple):
    """The static description of an ensemble and the pure functions on its parameters."""

    dynamics: Dynamics
    num_members: int
    num_elites: int

    @in_32_bits
    def init(self, key: jax.Array) -> Params:
        """Fresh members that change nothing in scale; the first ones are the elites."""
        net = jax.vmap(self.dynamics.init)(jax.random.split(key, self.num_members))
        elites = jnp.arange(self.num_elites, dtype=jnp.int32)
        return Params(net, self.dynamics.bounds(), self.dynamics.scaling(), elites)

    @in_32_bits
    def predict(self, params: Params, obs: jax.Array, action: jax.Array) -> Gaussian:
        """Every member's `Gaussian` of the targets, [E, B, K], for obs [B, D]."""
        many = jax.vmap(self.dynamics.gaussian, (0, None, None, None, None))
        return many(params.net, params.bounds, params.scaling, obs, action)

    @in_32_bits
    def sample(
        self,
        params: Params,
        obs: jax.Array,
        action: jax.Array,
        key: jax.Array,
        propagation: Propagation = "ts1",
        score: Score = "none",
        particles: int = 1,
        clip_margin: Scalar | None = None,
    ) -> Prediction:
        """One step of B states.

        Args:
          params: of E members, M of them elites.
          obs, action: [B, D], and [B] int32 or [B, A]; B is any number.
          key: consumed.
          propagation: see the module. Expectation adds no noise.
          score: what `disagreement` holds, over the elites and in standardised targets; anything
            but "none" evaluates every elite on every state, M times the work of TS1.
          particles: for moment matching, 2 or more: `obs` is [particles, B / particles] flattened,
            and each column is refitted.
          clip_margin: next observations are clipped to the range of the training rows, wider by so
            many times itself on both sides; None clips nothing. Known rewards and terminations
            judge the clipped ones.

        Raises:
          InputError: an unknown propagation or score, moment matching without particles, or a B
            that does not divide by them.
        """
        _check(propagation, score, particles)
        if propagation == "moment_matching" and obs.shape[0] % particles:
            raise InputError(
                f"particles = {particles}: expected a divisor of the {obs.shape[0]} rows"
            )
        member_key, noise_key, again_key = jax.random.split(key, 3)
        elites = jax.tree.map(lambda leaf: leaf[params.elites], params.net)
        few = params._replace(net=elites)
        single = propagation in ("ts1", "tsinf")
        disagreement = jnp.zeros(obs.shape[0])
        if score == "none" and single:
            order = jnp.arange(self.num_elites)
            if propagation == "ts1":
                order = jax.random.permutation(member_key, order)
            y = self._blocks(few, order, obs, action)
        else:
            every = self.predict(few, obs, action)
            if score != "none":
                unit = wide(params.scaling.y_std, every.mean)
                scaled = Gaussian(every.mean / unit, every.var / jnp.square(unit), every.end)
                disagreement = SCORES[score](scaled)
            y = _pick(every, member_key, propagation) if single else _mixed(every)
        noise = jax.random.normal(noise_key, y.mean.shape)
        if propagation == "expectation":
            noise = jnp.zeros_like(noise)
        if propagation == "moment_matching":
            base = self.dynamics.base(obs)
            mean, var = _refitted(base + y.mean + jnp.sqrt(y.var) * noise, particles)
            y = Gaussian(mean - base, var, y.end)
            noise = jax.random.normal(again_key, noise.shape)
        targets = y.mean + jnp.sqrt(y.var) * noise
        limits = None
        if clip_margin is not None:
            limits = dynamics.obs_limits(params.scaling, clip_margin)
        step = self.dynamics.outcome(obs, action, targets, y.end, limits)
        return Prediction(*step, disagreement)

    @in_32_bits
    def fit(
        self,
        params: Params,
        opt: PyTree,
        config: fit.Config,
        data: Transition,
        size: jax.Array,
        key: jax.Array,
    ) -> tuple[Params, PyTree, fit.Curves]:
        """The members trained on the first `size` rows [C, ...] of `data`, and the new elites.

        `opt` is `init_opt`'s state, or that of the last training. See `fit.fit`.
        """
        done = fit.fit(self.dynamics, config, params.net, params.bounds, opt, data, size, key)
        best = elites(done.error, self.num_elites)
        return Params(done.net, done.bounds, done.scaling, best), done.opt, done.curves

    def init_opt(self, params: Params) -> PyTree:
        """The optimiser's state before the first `fit`."""
        return fit.init(params.net, params.bounds)

    def model(
        self,
        propagation: Propagation = "ts1",
        score: Score = "none",
        particles: int = 1,
        clip_margin: Scalar | None = None,
    ) -> DynamicsModel:
        """The contract that rollouts, planners and diagnostics speak; arguments as of `sample`.

        Raises:
          InputError: an unknown propagation or score, or moment matching without particles.
        """
        _check(propagation, score, particles)

        def predict(params: Params, obs: jax.Array, action: jax.Array, key: jax.Array):
            return self.sample(params, obs, action, key, propagation, score, particles, clip_margin)

        return DynamicsModel(predict)

    def _blocks(self, few: Params, order: jax.Array, obs: jax.Array, action: jax.Array) -> Gaussian:
        """Rows in blocks, those of a round by elites `order`; the last blocks may be short."""
        x = self.dynamics.scaled_inputs(few.scaling, obs, action)
        num, count = x.shape[0], self.num_elites
        rounds, size = _rounds(num, count)
        padded = jnp.pad(x, [(0, rounds * count * size - num), (0, 0)], mode="edge")
        net = jax.tree.map(lambda leaf: leaf[order], few.net)
        out = jax.lax.map(
            lambda rows: jax.vmap(self.dynamics.outputs)(net, rows),
            padded.reshape(rounds, count, size, x.shape[1]),
        )
        out = self.dynamics.gaussian_of(out.reshape(-1, out.shape[-1])[:num], few.bounds)
        return self.dynamics.in_own_units(out, few.scaling)


def make(
    config: dynamics.Config, spec: dynamics.EnvSpec, num_members: int = 7, num_elites: int = 5
) -> Ensemble:
    """An ensemble for worlds of `spec`.

    Raises:
      InputError: as `dynamics.make`; no member, or more elites than members.
    """
    if num_members < 1:
        raise InputError(f"num_members = {num_members}: expected 1 or more")
    if not 1 <= num_elites <= num_members:
        raise InputError(f"num_elites = {num_elites}: expected 1 to num_members = {num_members}")
    return Ensemble(dynamics.make(config, spec), num_members, num_elites)


def elites(error: jax.Array, count: int) -> jax.Array:
    """The `count` members of the least holdout error [E], best first, [count] int32; nan is last.

    Raises:
      InputError: more elites than members.
    """
    if not 1 <= count <= error.shape[0]:
        raise InputError(f"count = {count}: expected 1 to {error.shape[0]}, the members")
    return jnp.argsort(error)[:count].astype(jnp.int32)


def moments(members: Gaussian) -> Moments:
    """Of the uniform mixture of `members` [E, *lead, K] (Lakshminarayanan et al. 2017, 2.4)."""
    mean = jnp.mean(members.mean, axis=0)
    epistemic = jnp.mean(jnp.square(members.mean - mean[None]), axis=0)
    return Moments(mean, jnp.mean(members.var, axis=0), epistemic)


def disagreement_std(members: Gaussian) -> jax.Array:
    """Standard deviation of the means [E, *lead, K] over members, mean over dimensions; [*lead]."""
    return jnp.mean(jnp.std(members.mean, axis=0), axis=-1)


def disagreement_max_distance(members: Gaussian) -> jax.Array:
    """Greatest distance between two members' means (Kidambi et al. 2020, MOReL); [*lead]."""
    first, second = _pairs(members.mean.shape[0])
    if not len(first):
        return jnp.zeros(members.mean.shape[1:-1])
    gap = members.mean[first] - members.mean[second]
    return jnp.max(jnp.linalg.norm(gap, axis=-1), axis=0)


def disagreement_jensen_shannon(members: Gaussian) -> jax.Array:
    """Geometric Jensen-Shannon divergence, mean over all pairs of members; [*lead].

    MACURA's score (Frauenknecht et al. 2024): half the divergences of two diagonal Gaussians from
    their normalised geometric mean (Nielsen 2019, corollary 1, alpha = 1/2).
    """
    first, second = _pairs(members.mean.shape[0])
    if not len(first):
        return jnp.zeros(members.mean.shape[1:-1])
    m1, m2 = members.mean[first], members.mean[second]
    v1, v2 = members.var[first], members.var[second]
    var = 2.0 * v1 * v2 / (v1 + v2)
    # m1^2/v1/2 + m2^2/v2/2 - m^2/v for the mean m of the geometric mean, without cancellation
    apart = 0.5 * jnp.square(m1 - m2) / (v1 + v2)
    spread = 0.5 * (jnp.log(v1) + jnp.log(v2)) - jnp.log(var)
    return jnp.mean(0.5 * jnp.sum(apart + spread, axis=-1), axis=0)


SCORES = {
    "std": disagreement_std,
    "max_distance": disagreement_max_distance,
    "jensen_shannon": disagreement_jensen_shannon,
}
"""Measures of disagreement: members [E, *lead, K] -> [*lead]."""


def _check(propagation: str, score: str, particles: int) -> None:
    if propagation not in get_args(Propagation):
        raise unknown("propagation", propagation, get_args(Propagation))
    if score not in get_args(Score):
        raise unknown("score", score, get_args(Score))
    if propagation == "moment_matching" and particles < 2:
        raise InputError(
            f"particles = {particles}: expected 2 or more for moment matching, which refits a "
            "Gaussian over the particles of each candidate; with one take 'distribution'"
        )


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(list(itertools.combinations(range(count), 2)), int).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _rounds(num: int, count: int) -> tuple[int, int]:
    """How many rounds of `count` blocks cut `num` rows, and the rows of a block."""
    most = BLOCK_ROWS if jax.default_backend() == "cpu" else num
    rounds = -(-num // (count * most))
    return rounds, -(-num // (count * rounds))


def _pick(every: Gaussian, key: jax.Array, propagation: Propagation) -> Gaussian:
    """One member for each row: at random (TS1), or by its block."""
    count, num = every.mean.shape[:2]
    rows = jnp.arange(num)
    chosen = rows // _rounds(num, count)[1] % count
    if propagation == "ts1":
        chosen = jax.random.randint(key, (num,), 0, count)
    return jax.tree.map(lambda leaf: leaf[chosen, rows], every)


def _mixed(every: Gaussian) -> Gaussian:
    """One Gaussian with the mixture's moments; the members' mean logit ends the task."""
    mix = moments(every)
    return Gaussian(mix.mean, mix.aleatoric + mix.epistemic, jnp.mean(every.end, axis=0))


def _refitted(drawn: jax.Array, particles: int) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the particles of each candidate, for all of its rows."""
    rows = drawn.reshape(particles, -1, drawn.shape[-1])
    stats = (jnp.mean(rows, axis=0), jnp.var(rows, axis=0))
    mean, var = (jnp.broadcast_to(x, rows.shape).reshape(drawn.shape) for x in stats)
    return mean, var

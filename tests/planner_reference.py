"""Planners written slowly in numpy float64, one candidate at a time; only the draws are JAX's.

Each takes `worth(actions [H, A] or [H]) -> float` and the key that the planner under test gets, and
draws from it in the same order. A candidate that is worth nan or an infinity is worth -inf.
"""

from functools import partial

import jax
import numpy as np

from mbrl_jax.planning import noise as noises

colored_noise = jax.jit(noises.colored_noise, static_argnums=(1, 2))


@partial(jax.jit, static_argnums=2)
def draw_keys(key, i, num=2):
    return jax.random.split(jax.random.fold_in(jax.random.clone(key), i), num)


def judged(worth, candidates):
    values = [float(worth(one)) for one in candidates]
    return np.array([x if np.isfinite(x) else -np.inf for x in values])


def best_first(values, num):
    """Indices of the `num` greatest, the earlier one first where two are equal."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:num]


def shifted(plan, last):
    return np.concatenate([plan[1:], np.reshape(last, (1, *plan.shape[1:]))])


def random_shooting(worth, key, horizon, low, high, num_samples):
    draw_key, _ = jax.random.split(jax.random.clone(key))
    uniform = np.float64(jax.random.uniform(draw_key, (num_samples, horizon, len(low))))
    candidates = [low + (high - low) * one for one in uniform]
    values = judged(worth, candidates)
    best = best_first(values, 1)[0]
    return candidates[best], values[best]


def cem(worth, key, plan, low, high, num_samples, num_elites, iterations, momentum, take_best):
    """PETS: variances are bounded by the distance to the nearer bound."""
    mean = shifted(plan, (low + high) / 2)
    var = np.ones_like(mean) * (high - low) ** 2 / 16
    best, best_value = mean, -np.inf
    for i in range(iterations):
        shape = (num_samples, *mean.shape)
        noise = np.float64(jax.random.truncated_normal(draw_keys(key, i)[0], -2.0, 2.0, shape))
        bounded = np.zeros_like(var)
        for h in range(len(mean)):
            for a in range(len(low)):
                near = min((mean[h, a] - low[a]) / 2, (high[a] - mean[h, a]) / 2)
                bounded[h, a] = min(near**2, var[h, a])
        candidates = [mean + np.sqrt(bounded) * one for one in noise]
        values = judged(worth, candidates)
        top = best_first(values, num_elites)
        elites = np.array([candidates[j] for j in top])
        if values[top[0]] > best_value:
            best, best_value = elites[0], values[top[0]]
        mean = momentum * mean + (1 - momentum) * elites.mean(0)
        var = momentum * var + (1 - momentum) * elites.var(0)
    return mean, (best if take_best else mean), best_value


def icem(worth, key, plan, low, high, num_samples, num_elites, iterations, momentum, decay, beta):
    """Algorithm 1 of Pinneri et al. (2020); `plan` is (mean, elites or None, how many are kept)."""
    mean, elites, num_kept = plan
    mean = shifted(mean, mean[-1])
    horizon, size = mean.shape
    std = np.ones_like(mean) * (high - low) / 4
    for i in range(iterations):
        draw_key, tail_key, _ = draw_keys(key, i, 3)
        count = max(int(num_samples / decay**i), 2 * num_elites)
        noise = np.float64(colored_noise(draw_key, (count, size, horizon), beta))
        candidates = [np.clip(mean + std * one.T, low, high) for one in noise]
        if i == 0 and elites is not None:
            tail = np.float64(jax.random.normal(tail_key, (num_kept, 1, size)))
            for j in range(num_kept):
                last = np.clip(mean[-1] + std[-1] * tail[j, 0], low, high)
                candidates.append(shifted(elites[j], last))
        if i > 0:
            candidates += list(elites[:num_kept])
        if i == iterations - 1:
            candidates.append(mean)
        values = judged(worth, candidates)
        top = best_first(values, num_elites)
        elites = np.array([candidates[j] for j in top])
        mean = momentum * mean + (1 - momentum) * elites.mean(0)
        std = momentum * std + (1 - momentum) * elites.std(0)
    return mean, elites[:num_kept], elites[0], values[top[0]]


def mppi(worth, key, plan, low, high, num_samples, iterations, sigma, gamma, beta):
    """PDDM, equations 3 to 5; `plan` is (mean, the action before)."""
    mean, before = plan
    mean = shifted(mean, mean[-1])
    best_value = -np.inf
    for i in range(iterations):
        noise = np.float64(jax.random.normal(draw_keys(key, i)[0], (num_samples, *mean.shape)))
        candidates = []
        for one in noise:
            last, smoothed = before, []
            for h in range(len(mean)):
                last = beta * (mean[h] + sigma * one[h]) + (1 - beta) * last
                smoothed.append(last)
            candidates.append(np.clip(smoothed, low, high))
        values = judged(worth, candidates)
        best_value = max(best_value, values.max())
        if np.isfinite(values.max()):
            weight = np.exp(gamma * (values - values.max()))
            mean = sum(w * one for w, one in zip(weight, candidates, strict=True)) / weight.sum()
    return mean, best_value


def categorical_cem(worth, key, plan, num_samples, num_elites, iterations, momentum, floor):
    horizon, num_actions = plan.shape
    probs = shifted(plan, np.full(num_actions, 1 / num_actions))
    best, best_value = probs.argmax(-1), -np.inf
    for i in range(iterations):
        logits = np.log((1 - floor) * probs + floor / num_actions)
        gumbel = jax.random.gumbel(draw_keys(key, i)[0], (num_samples, horizon, num_actions))
        candidates = [np.argmax(logits + one, axis=-1) for one in np.float64(gumbel)]
        values = judged(worth, candidates)
        top = best_first(values, num_elites)
        if values[top[0]] > best_value:
            best, best_value = candidates[top[0]], values[top[0]]
        share = np.zeros_like(probs)
        for j in top:
            for h in range(horizon):
                share[h, candidates[j][h]] += 1 / num_elites
        probs = momentum * probs + (1 - momentum) * share
    return probs, best, best_value

"""Gumbel MuZero's tree search on a walk along a line.

Signatures, defaults and visits at the roots are mctx's: `help(mbrl_jax.search)` has a map for its
readers and a table of what differs. Descent needs no loop, the simulations of a round of sequential
halving share batches of the network where batches are small (up to 8 actions of a root on an
accelerator, 4 on a CPU), and under `vmap` seeds become lanes of one search. Numbers are float32
also under `JAX_ENABLE_X64`, functions may close over vmapped values, and a root with NaN gets NaN
weights. What mctx has not:

- `sampled_policy` searches among sampled candidates, for continuous or very many actions.
- `qtransform_by_tree_min_max` brings values to the range of the whole tree, as MuZero's paper does.
- `advance(tree, action)` is the tree below an action, from which
  `muzero_policy(search_tree=...)` goes on.
- `gumbel_muzero_policy(halve_once=True)` drops actions once in a phase, the paper's algorithm 2.
- `search_metrics` tells depth, entropy of the visits, and the improvement of the policy.
"""

import jax
import jax.numpy as jnp

from mbrl_jax import search


def step(params, key, action, position):  # a walk on a line; the goal is at 3
    position = position + 2 * action - 1
    done = jnp.abs(position) == 3
    return search.RecurrentFnOutput(
        reward=(position == 3).astype(jnp.float32),
        discount=jnp.where(done, 0.0, 0.9),
        prior_logits=jnp.zeros((*position.shape, 2)),
        value=jnp.zeros(position.shape),
    ), position


@jax.jit
def plan(key, position):
    root = search.RootFnOutput(
        prior_logits=jnp.zeros((*position.shape, 2)),
        value=jnp.zeros(position.shape),
        embedding=position,
    )
    return search.gumbel_muzero_policy((), key, root, step, num_simulations=32)


out = plan(jax.random.key(0), jnp.array([0, 1, 2]))
print(out.action)  # [1 1 1]
print(out.search_tree.summary().visit_counts.sum(-1))  # [32. 32. 32.]

"""The trees of all roots as one flat forest, descended without a loop.

Row i * B + b is node i of root b, so that the nodes which one batch of simulations adds are one
slice. Edge row * W + a is action a at a row, whose W cells hold first its edges.

Every rule of selection here sees the node alone, so a node's choice changes only when a simulation
passes through it. Each edge therefore keeps the edge at which greedy descent through it ends
(`target`), and the backup, which walks the path anyway, renews it. Selection is one lookup. Where
the rule looks at the whole tree (a forest with a `span`), `target` is the row of the edge's child
instead, and descent a loop.

Values follow the running mean of mctx and the papers: the value of a node is the mean over its own
evaluation and the returns of the simulations through it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_jax.search.base import Lanes
from mbrl_jax.search.node import Node, Rule
from mbrl_jax.search.vmapping import Model
from mbrl_jax.types import InputError

VISITS, QVALUE, VALUE, TARGET = range(4)
"""Of an edge: int32, bits of float32, bits of the child's value, int32."""
RAW, REWARD, DISCOUNT, PARENT = range(4)
"""Of a node: bits of float32 thrice, the edge it hangs at (int32)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forest:
    """A table of R = N * B rows, N nodes for each of B roots.

    A row is W cells of four int32; floats are kept as their bits. With five actions W is 8:

        cell 0       visits | qvalue | value    | target      edge of action 0
        ...
        cell 4       visits | qvalue | value    | target      edge of action 4
        cell 5       p(0)   | p(1)   | p(2)     | p(3)        prior of the node,
        cell 6       p(4)   | 0      | 0        | 0           filled up to whole cells
        cell 7       raw    | reward | discount | parent      the node

    An edge holds its visits, reward + discount * value, the child's mean value, and where greedy
    descent through it ends (an edge; with a span the row of the child). A node holds what the
    value network said, the reward and discount of the step to it, and the edge it hangs at. One
    gather of a row fetches all that a rule needs.
    """

    table: jax.Array  # [R, 4 W] int32
    embedding: Any  # [R, ...] of the nodes, what the recurrent function gets
    root_value: jax.Array  # [B] float32 mean of the root's own value and all returns
    root_visits: jax.Array  # [B] int32, the root's own evaluation among them
    depth: jax.Array | None  # [R] int32 edges from the root, where depth is limited
    span: jax.Array | None  # [2, B] least and greatest qvalue of an edge, where a rule asks for it
    outcomes: jax.Array | None  # [R, A, 2] rewards and discounts of edges, where one asks for them
    num_actions: int = dataclasses.field(metadata={"static": True})

    @property
    def batch(self) -> int:
        """The number B of roots."""
        return self.root_value.shape[0]

    @property
    def cells(self) -> jax.Array:
        """The table as [R * W, 4] int32; edges and nodes are numbers of cells."""
        return self.table.reshape(-1, 4)

    @property
    def width(self) -> int:
        """The number W of cells in a row."""
        return self.num_actions + -(-self.num_actions // 4) + 1

    def records(self, rows: jax.Array) -> jax.Array:
        """What `record` made of the rows [L], [L, 4 (W - A)] int32."""
        return self.table.at[rows, 4 * self.num_actions :].get(mode="promise_in_bounds")


def bits(x: jax.Array) -> jax.Array:
    """The bits of a float32 as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def number(x: jax.Array) -> jax.Array:
    """The float32 of an int32's bits."""
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [n, ...] at index [L], [L, ...]; every index lies within x."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def record(
    prior: jax.Array, raw: jax.Array, reward: jax.Array, discount: jax.Array, edge: jax.Array
) -> jax.Array:
    """What the rows of L new nodes hold beside their own edges, [L, 4 (W - A)] int32.

    Args:
      prior: [L, A] float32 probabilities.
      raw, reward, discount: [L] float32, see `Forest`.
      edge: [L] int32 at which the nodes hang.
    """
    num, num_actions = prior.shape
    node = jnp.stack([bits(raw), bits(reward), bits(discount), edge], axis=-1)
    fill = jnp.zeros((num, -num_actions % 4), jnp.int32)
    return jnp.concatenate([bits(prior), fill, node], axis=-1)


def unpack(rows: jax.Array, num_actions: int) -> tuple[Node, jax.Array]:
    """Rows as nodes.

    Args:
      rows: [L, 4 W] int32.
      num_actions: A.

    Returns:
      Nodes whose value is their raw one, without visits and as if each were the first root; and
      the nodes' own cells [L, 4] int32.
    """
    columns, cell = rows.T, rows[:, -4:]
    edges = columns[: 4 * num_actions].reshape(num_actions, 4, -1)
    prior = number(columns[4 * num_actions : 5 * num_actions])
    raw, zero = number(cell[:, RAW]), jnp.zeros(rows.shape[0], jnp.int32)
    node = Node(
        prior, edges[:, VISITS], number(edges[:, QVALUE]), number(edges[:, VALUE]), raw, raw,
        zero, zero, zero,
    )  # fmt: skip
    return node, cell


def outcomes_of(outcomes: jax.Array | None, rows: jax.Array) -> jax.Array | None:
    """Rewards and discounts at rows [L] of a forest's `outcomes`, [2, A, L]."""
    return None if outcomes is None else jnp.moveaxis(take(outcomes, rows), 0, -1).swapaxes(0, 1)


def plant(
    lanes: Lanes,
    prior: jax.Array,
    num_nodes: int,
    *,
    limited: bool,
    spanned: bool,
    with_outcomes: bool,
) -> Forest:
    """The roots, with room for more nodes.

    Args:
      lanes: the roots' values and embeddings.
      prior: [B, A] float32 of the roots; -inf where an action is not allowed.
      num_nodes: for which there is room under each root, itself among them.
      limited: in depth, so that depths are kept.
      spanned: a rule asks for the range of values in the tree.
      with_outcomes: a transform reads rewards and discounts.

    Raises:
      InputError: more edges than int32 can number.
    """
    batch, num_actions = prior.shape
    nothing = jnp.zeros(batch, jnp.float32)
    root = record(prior, lanes.value, nothing, nothing, jnp.zeros(batch, jnp.int32))
    num_rows, width = batch * num_nodes, num_actions + root.shape[1] // 4
    if num_rows * width >= 2**31:
        raise InputError(
            f"{batch} roots with {num_nodes} nodes of {num_actions} actions: expected fewer than "
            "2^31 edges; search in smaller batches"
        )
    infinite = jnp.float32([[jnp.inf], [-jnp.inf]])
    empty = Forest(
        table=jnp.zeros((num_rows, 4 * width), jnp.int32),
        embedding=jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype),
                               lanes.embedding),
        root_value=lanes.value, root_visits=jnp.ones(batch, jnp.int32),
        depth=jnp.zeros(num_rows, jnp.int32) if limited else None,
        span=jnp.tile(infinite, (1, batch)) if spanned else None,
        outcomes=jnp.zeros((num_rows, num_actions, 2), jnp.float32) if with_outcomes else None,
        num_actions=num_actions,
    )  # fmt: skip
    return store(empty, root, lanes.embedding, 0)


def divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers [L] that are not negative.

    Without the signs, for which jnp's own have kernels in the innermost loop.
    """
    divisor = jnp.full_like(x, by)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)


def store(forest: Forest, records: jax.Array, embedding: Any, first_row: Any) -> Forest:
    """Writes new nodes, one slice, where no edge was visited yet.

    Args:
      forest: to write to.
      records: [L, 4 (W - A)] int32, see `record`.
      embedding: [L, ...] of the nodes.
      first_row: [] int32 of the slice.
    """
    put = jax.lax.dynamic_update_slice_in_dim
    first_row, depth = jnp.int32(first_row), forest.depth
    if depth is not None:
        above, _ = divided(records[:, -4 + PARENT], forest.width)
        depth = put(depth, jnp.where(above < forest.batch, 1, take(depth, above) + 1), first_row, 0)
    return dataclasses.replace(
        forest,
        table=jax.lax.dynamic_update_slice(
            forest.table, records, (first_row, jnp.int32(4 * forest.num_actions))
        ),
        embedding=jax.tree.map(
            lambda x, new: put(x, new, first_row, 0), forest.embedding, embedding
        ),
        depth=depth,
    )


def expand(forest: Forest, model: Model, call: jax.Array, edge: jax.Array) -> tuple[jax.Array, Any]:
    """Asks the model what lies behind edges.

    Args:
      forest: whose nodes' embeddings the model gets.
      model: see `vmapping.Model`.
      call: [] int32 number of the call, which no other call has.
      edge: [L] int32.

    Returns:
      What `record` makes of the new nodes, and their embeddings [L, ...].

    Raises:
      InputError: outputs of the recurrent function whose shapes or dtypes do not agree.
    """
    # made whole, or a CPU would divide anew for each number of an embedding
    node, action = jax.lax.optimization_barrier(divided(edge, forest.width))
    before = jax.tree.map(lambda x: take(x, node), forest.embedding)
    out, embedding = model(call, action, before)
    num = edge.shape[0]
    shapes = dict.fromkeys(("reward", "discount", "value"), (num,))
    for name, expected in {**shapes, "prior_logits": (num, forest.num_actions)}.items():
        found = jnp.shape(getattr(out, name))
        if found != expected:
            raise InputError(f"recurrent_fn: {name} of shape {found}, expected {expected}")
    got, gave = (jax.tree.map(lambda x: (jnp.shape(x), x.dtype), x) for x in (before, embedding))
    if got != gave:
        raise InputError(f"recurrent_fn: embedding {gave}, expected {got}, as it was given")
    prior = jax.nn.softmax(jnp.asarray(out.prior_logits, jnp.float32))
    raw, reward, discount = (
        jnp.asarray(x, jnp.float32) for x in (out.value, out.reward, out.discount)
    )
    return record(prior, raw, reward, discount, edge), embedding


def choose(forest: Forest, rule: Rule) -> jax.Array:
    """The edge at which greedy descent from each root ends, [B] int32."""
    edge = first_edges(forest) + rule(roots(forest))
    return end_of(edge, root_cells(forest, edge))


def first_edges(forest: Forest) -> jax.Array:
    """The edges of the roots' first actions, [B] int32."""
    return jnp.arange(forest.batch, dtype=jnp.int32) * forest.width


def root_cells(forest: Forest, edge: jax.Array) -> jax.Array:
    """The cells [L, 4] of edges [L] of roots."""
    return take(forest.table[: forest.batch].reshape(-1, 4), edge)


def end_of(edge: jax.Array, cell: jax.Array) -> jax.Array:
    """The edge at which greedy descent through each of the edges [L] of `cell` [L, 4] ends."""
    return jnp.where(cell[:, VISITS] > 0, cell[:, TARGET], edge)


def roots(forest: Forest) -> Node:
    """The roots as nodes, B of them."""
    node, _ = unpack(forest.table[: forest.batch], forest.num_actions)
    every = jnp.arange(forest.batch, dtype=jnp.int32)
    return node._replace(
        value=forest.root_value, total=forest.root_visits, root=every, span=forest.span,
        outcomes=outcomes_of(forest.outcomes, every),
    )  # fmt: skip

"""Ways through a jaxpr."""

import jax


def inner(eqn):
    """The jaxprs within an equation."""
    parts = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(part, "jaxpr", part) for part in parts if hasattr(part, "eqns")]


def equations(jaxpr):
    """Of a jaxpr and of what it calls, loops apart."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name not in ("while", "scan"):
            for part in inner(eqn):
                yield from equations(part)


def loops(jaxpr):
    """Every loop of a jaxpr, also within others, and its body."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("while", "scan"):
            yield eqn, eqn.params["body_jaxpr" if name == "while" else "jaxpr"].jaxpr
        for part in inner(eqn):
            yield from loops(part)

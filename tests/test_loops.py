"""Scans and conditionals in the form for accelerators, which a CPU runs here, against jax.lax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax import loops


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def start():
    keys = jax.random.split(jax.random.key(3), 8)
    return {
        "weights": jax.random.normal(keys[0], (4, 3)),
        "bias": jax.random.normal(keys[1], (3,)),
        "large": jax.random.normal(keys[2], (64, 64)),
        "buffer": jnp.zeros(5000),
        "half": jnp.ones((2, 2), jnp.bfloat16),
        "bytes": jnp.arange(6, dtype=jnp.uint8),
        "count": jnp.int32(7),
        "bits": jnp.arange(5, dtype=jnp.uint32) + jnp.uint32(2**31),
        "flags": jnp.array([True, False, True]),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(5),
        "fixed": jnp.arange(4.0),
    }


def body(carry, x):
    new = dict(carry)
    new["weights"] = carry["weights"] * 0.5 + x["a"][None]
    new["bias"] = jnp.tanh(carry["weights"] @ x["a"] + carry["fixed"])[:3]
    new["large"] = carry["large"] @ carry["large"] / 64
    new["buffer"] = carry["buffer"].at[x["i"]].set(carry["bias"][0])
    new["half"] = carry["half"] + jnp.bfloat16(1)
    new["bytes"] = carry["bytes"] + jnp.uint8(1)
    new["count"] = carry["count"] - x["i"]
    new["bits"] = carry["bits"] * jnp.uint32(5) + jnp.uint32(1)
    new["flags"] = ~carry["flags"]
    new["empty"] = carry["empty"] + 1.0
    y = {"sum": jnp.sum(new["weights"]), "flags": new["flags"], "i": (x["i"], new["large"])}
    return new, y


def turns(num=5):
    return {
        "a": jnp.linspace(-1, 1, num * 3).reshape(num, 3),
        "i": jnp.arange(num, dtype=jnp.int32),
    }


def words(tree):
    def leaf(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return np.asarray(x).view(np.uint8).tobytes(), x.shape, x.dtype.name

    return jax.tree.map(leaf, tree)


@pytest.mark.parametrize("num", [0, 1, 5])
@pytest.mark.parametrize("vmapped", [False, True])
def test_a_packed_scan_is_that_of_jax(num, vmapped, accelerator):
    def run(scan, seed):
        carry = start()
        carry["weights"] = carry["weights"] + seed
        return scan(body, carry, turns(num))

    ours, theirs = (
        jax.jit(jax.vmap(lambda s, f=scan: run(f, s)) if vmapped else lambda s, f=scan: run(f, s))(
            jnp.arange(3.0) if vmapped else jnp.float32(1)
        )
        for scan in (loops.scan, jax.lax.scan)
    )
    # products of other layouts may be added up in another order
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-5, atol=1e-6
        )


def test_the_carry_is_a_vector_of_words_and_what_is_large(accelerator):
    jaxpr = jax.make_jaxpr(lambda: loops.scan(body, start(), turns()))()
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    consts, carries = scan.params["num_consts"], scan.params["num_carry"]
    carried = [v.aval for v in scan.invars[consts : consts + carries]]
    shapes = sorted((x.shape, x.dtype.name) for x in carried)
    # weights, bias, count, bits, flags; `empty` takes no word; `fixed` and the key stay outside
    small = 12 + 3 + 1 + 5 + 3
    others = [
        ((2, 2), "bfloat16"), ((6,), "uint8"), ((64, 64), "float32"), ((5000,), "float32"),
    ]  # fmt: skip
    assert shapes == sorted([*others, ((small,), "int32")])
    given = [v.aval.shape for v in scan.outvars[carries:]]
    assert sorted(given) == [(5, 5), (5, 64, 64)]


@pytest.mark.parametrize("word", [0x7FC00001, 0xFF800001, 0x80000000, 0x00000001, 0x7F800000])
def test_every_bit_of_a_float_is_kept(word, accelerator):
    value = jax.lax.bitcast_convert_type(jnp.full(3, word, jnp.uint32), jnp.float32)

    def turn(carry, x):
        return {"moved": carry["other"], "other": carry["moved"]}, carry["other"]

    carry = {"moved": value, "other": jnp.zeros(3)}
    out, ys = jax.jit(lambda c: loops.scan(turn, c, jnp.arange(3)))(carry)
    assert words(out)["other"] == words(carry)["moved"]
    assert words({"y": ys[1]}) == words({"y": value})


def test_a_scan_on_a_cpu_is_that_of_jax():
    ours, theirs = (
        str(jax.make_jaxpr(lambda f=scan: f(body, start(), turns()))())
        for scan in (loops.scan, jax.lax.scan)
    )
    assert ours == theirs


@pytest.mark.parametrize("fault", ["dtype", "shape", "structure"])
def test_a_body_that_changes_a_type_is_an_error_as_in_jax(fault, accelerator):
    def turn(carry, x):
        a, b = carry
        if fault == "structure":
            return (a,), None
        return (a.astype(jnp.int32) if fault == "dtype" else a[:2], b), None

    with pytest.raises(TypeError, match=r"scan body function carry"):
        loops.scan(turn, (jnp.zeros(3), jnp.zeros(2)), jnp.arange(2))


def test_no_derivative_is_silently_zero(accelerator):
    def loss(scan, weights):
        def turn(carry, x):
            return (jnp.tanh(carry[0] @ weights), carry[1] + 1), jnp.sum(carry[0])

        carry, ys = scan(turn, (jnp.ones((2, 3)), jnp.int32(0)), jnp.arange(4))
        return jnp.sum(carry[0]) + jnp.sum(ys)

    weights = jnp.linspace(-1, 1, 9).reshape(3, 3)
    assert jnp.all(jax.grad(lambda w: loss(jax.lax.scan, w))(weights) != 0)
    with pytest.raises(TypeError, match="has no derivative"):
        jax.grad(lambda w: loss(loops.scan, w))(weights)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("vmapped", [False, True])
def test_both_branches_are_selected_from(flag, vmapped, accelerator):
    def run(predicate, x):
        return loops.cond(
            predicate, lambda x: {"a": x, "k": x > 0}, lambda x: {"a": -x, "k": x < 0}, x
        )

    x = jnp.arange(3.0)
    if vmapped:
        out = jax.vmap(run)(jnp.array([flag, not flag]), jnp.stack([x, x]))
        out = jax.tree.map(lambda leaf: leaf[0], out)
    else:
        out = run(jnp.array(flag), x)
    sign = 1 if flag else -1
    np.testing.assert_array_equal(out["a"], sign * x)
    np.testing.assert_array_equal(out["k"], sign * x > 0)


def test_the_host_waits_for_no_conditional(accelerator):
    jaxpr = jax.make_jaxpr(lambda p: loops.cond(p, lambda x: x + 1, lambda x: x, 2.0))(True)
    assert not [e for e in jaxpr.eqns if e.primitive.name == "cond"]

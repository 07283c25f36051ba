"""What benchmarks/kernels.py counts, on programs whose kernels are known; none needs CUDA."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/; its `common` is another than that of experiments/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.delitem(sys.modules, "common", raising=False)
    yield importlib.import_module
    sys.modules.pop("common", None)


PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %e = f32[4]{0} exponential(%p)
}

%inner_body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[], f32[4]{0}) parameter(0)
  %a = f32[4]{0} fusion(%q), kind=kLoop, calls=%fused
  %c = f32[4]{0} copy(%a)
  ROOT %t = (s32[], f32[4]{0}) tuple(%q, %c)
}

%inner_condition (q: (s32[], f32[4])) -> pred[] {
  %q.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %l = pred[] fusion(%q.1), kind=kLoop, calls=%fused
}

%short (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} parameter(0)
}

%long (x: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %y = f32[4]{0} custom-call(%x.1), custom_call_target="__cublas$gemm"
  ROOT %z = f32[4]{0} fusion(%y), kind=kLoop, calls=%fused
}

%body (r: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (s32[], f32[4]{0}) parameter(0)
  %w.1 = (s32[], f32[4]{0}) while(%r), condition=%inner_condition, body=%inner_body, INNER
  ROOT %b = (s32[], f32[4]{0}) BRANCHES
}

%condition (r: (s32[], f32[4])) -> pred[] {
  %r.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %m = pred[] constant(true)
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %p0 = f32[4]{0} parameter(0)
  %w = (s32[], f32[4]{0}) while(%p0), condition=%condition, body=%body, OUTER
  %g = f32[4]{0} get-tuple-element(%w), index=1
  ROOT %last = f32[4]{0} fusion(%g), kind=kLoop, calls=%fused
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"3"}}'
BY_NUMBER = "conditional(%i, %x, %x), branch_computations={%short, %long}"
BY_FLAG = "conditional(%i, %x, %x), true_computation=%long, false_computation=%short"


@pytest.mark.parametrize(
    ("inner", "branches", "expected"),
    [
        (KNOWN, "copy(%w.1)", (5 * (3 * 2 + 1) + 1, 0)),
        # one turn and two conditions, each of which the host waits for
        ("metadata={}", "copy(%w.1)", (5 * (2 + 2 + 1) + 1, 5 * 2)),
        # the longer branch, and a wait
        (KNOWN, BY_NUMBER, (5 * (3 * 2 + 2) + 1, 5)),
        (KNOWN, BY_FLAG, (5 * (3 * 2 + 2) + 1, 5)),
        (KNOWN, "call(%w.1), to_apply=%long", (5 * (3 * 2 + 2) + 1, 0)),
        (KNOWN, "bitcast(%w.1)", (5 * 3 * 2 + 1, 0)),
    ],
)
def test_kernels_and_waits_of_a_known_program(inner, branches, expected, benchmark):
    gpu_program = benchmark("gpu_program")
    text = PROGRAM.replace("INNER", inner).replace("BRANCHES", branches)
    text = text.replace("OUTER", KNOWN.replace("3", "5"))
    assert gpu_program.count(text) == expected


def test_without_cuda_one_line_says_what_is_missing(benchmark, monkeypatch):
    gpu_program = benchmark("gpu_program")

    def missing(**kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(gpu_program.topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit, match=r"cuda13"):
        gpu_program.measure(jax.jit(lambda x: x + 1), jnp.zeros(3))


def test_code_that_asks_is_told_gpu_and_then_cpu_again(benchmark):
    gpu_program = benchmark("gpu_program")
    assert gpu_program.as_on_an_accelerator(lambda: jax.default_backend()) == "gpu"
    with pytest.raises(ZeroDivisionError):
        gpu_program.as_on_an_accelerator(lambda: 1 / 0)
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_programs_of_an_agent(seeds, benchmark):
    kernels, gpu_program = benchmark("kernels"), benchmark("gpu_program")

    def forms():
        for kind, fn, shapes, updates in kernels.programs("dqn", kernels.CASES["dqn"], seeds):
            yield kind, fn.trace(*shapes), updates

    traced = gpu_program.as_on_an_accelerator(lambda: {k: (t, n) for k, t, n in forms()})
    assert {kind: n for kind, (_, n) in traced.items()} == {"step": 1, "update": 1, "period": 100}
    for form, _ in traced.values():
        text = str(form.jaxpr)
        # the accelerator's form: no conditional, and the small leaves as words
        assert " cond[" not in text
        leaves = jax.tree.leaves(form.out_info)
        if seeds > 1:
            assert any(leaf.shape[:1] == (seeds,) for leaf in leaves)
    assert "bitcast_convert_type" in str(traced["period"][0].jaxpr)


def test_the_table_sets_two_records_side_by_side(benchmark):
    kernels = benchmark("kernels")
    row = {"agent": "sac", "env": "Pendulum-v1", "seeds": 1, "updates": 100, "waits": 0}
    measured = {"temporary_bytes": 800_000, "compile_seconds": 24.2}
    rows = [
        {**row, **measured, "program": kind, "kernels": number}
        for kind, number in (("step", 24), ("update", 82), ("period", 6946))
    ]
    before = [{**rows[-1], "kernels": 10922, "waits": 100}]
    text = kernels.table(rows, before).splitlines()
    expected = "| sac | Pendulum-v1 | 1 | 24 | 82 | 100 | 6,946 | 10,922 | 0 | 100 | 0.8 | 24 |"
    assert text[-1] == expected
    assert kernels.table(rows, []).splitlines()[-1] == expected.replace("10,922", "-").replace(
        "100 | 0.8", "- | 0.8"
    )
    assert kernels.parser().parse_args([]).seeds == [1, 16]

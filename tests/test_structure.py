"""How the house is built: imports, files, and what XLA makes of the loop."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

import mbrl_jax
from mbrl_jax.agents import AgentDef
from mbrl_jax.runtime.loop import make_program
from mbrl_jax.runtime.train import make_job, traced
from mbrl_jax.types import Agent, Schedule, config

PACKAGE = Path(mbrl_jax.__file__).parent
ROOT = PACKAGE.parent
# a folder stands above what it imports
MAY_IMPORT = {
    "types": set(),
    "prng": set(),
    "loops": {"types"},
    "lazy": set(),
    "memory": set(),
    "xla": set(),
    "x64": set(),
    "analysis": {"lazy"},
    "data": {"types", "prng"},
    "nn": {"x64", "types", "prng", "data", "lazy"},
    "models": {"x64", "lazy", "types", "prng", "data", "nn", "search"},
    "search": {"types"},
    "planning": {"x64", "types", "prng", "data", "nn", "models"},
    "envs": {"x64", "lazy", "types", "prng", "loops"},
    "agents": {
        "x64",
        "lazy",
        "memory",
        "types",
        "prng",
        "loops",
        "data",
        "nn",
        "models",
        "search",
        "planning",
    },
    "runtime": {
        "x64",
        "lazy",
        "memory",
        "types",
        "prng",
        "loops",
        "agents",
        "envs",
        "analysis",
        "data",
        "nn",
        "models",
        "search",
    },
    "__main__": {"types", "agents", "envs", "analysis", "runtime"},
}
# the oracle model wraps an environment
EXCEPTIONS = {("models/oracle.py", "envs")}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upwards(path):
    name = path.relative_to(PACKAGE)
    place = name.parts[0].removesuffix(".py")
    for module in imported(ast.parse(path.read_text())):
        if not module.startswith("mbrl_jax."):
            assert module.split(".")[0] != "distrax" or str(name) == "nn/distributions.py"
            assert module.split(".")[0] != "gymnax" or place == "envs", f"{name} imports gymnax"
            continue
        target = module.split(".")[1]
        allowed = target == place or target in MAY_IMPORT[place]
        assert allowed or (str(name), target) in EXCEPTIONS, f"{name} imports {target}"


# modules that have another name than what is installed, or that come with it
DISTRIBUTIONS = {"PIL": "pillow", "orbax": "orbax-checkpoint", "mujoco": "mujoco-mjx"}


def declared(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_what_is_imported_is_declared():
    """As a dependency; environments of other packages may have theirs in the extra `envs`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = declared(project["dependencies"])
    extra = declared(project["optional-dependencies"]["envs"])
    for path in modules():
        known = always | extra if path.parent.name == "envs" else always
        for module in imported(ast.parse(path.read_text())):
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names | {"mbrl_jax"}:
                assert DISTRIBUTIONS.get(name, name) in known, f"{path.name} imports {name}"


def test_files_stay_readable():
    for path in modules() + sorted((ROOT / "experiments").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 420, path


def run_python(code, warnings="error"):
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_import_starts_no_backend_and_loads_nothing_heavy():
    code = """
import sys
import mbrl_jax, mbrl_jax.__main__
mbrl_jax.AGENTS["dyna_q"], mbrl_jax.make_train, mbrl_jax.train, mbrl_jax.make_env
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
heavy = ("gymnax", "distrax", "matplotlib", "orbax", "flax")
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_an_environment_loads_no_plotting_library_until_it_is_drawn():
    code = """
import sys
import mbrl_jax
mbrl_jax.make_env("Pong-misc")
assert not {"seaborn", "pandas", "matplotlib.pyplot"} & sys.modules.keys()
from gymnax.environments.misc import pong
from gymnax.environments.bsuite import catch
assert not hasattr(pong.sns, "__path__")
print(len(pong.sns.color_palette("cubehelix", 3)), catch.plt.subplots.__module__)
assert {"seaborn", "matplotlib.pyplot"} <= sys.modules.keys()
import seaborn.utils
assert seaborn is sys.modules["seaborn"] is not pong.sns
"""
    assert run_python(code, "ignore").split() == ["3", "matplotlib.pyplot"]


PUBLIC = """
    AGENTS InputError Result make_agent make_env make_train train types.EnvSpec types.InputError
    search.muzero_policy search.gumbel_muzero_policy search.stochastic_muzero_policy
    planning.random_shooting planning.cem planning.icem planning.mppi
    models.dynamics.make models.ensemble.make models.rollout.rollout models.fit.fit
    models.diagnostics.k_step_errors models.oracle.oracle models.latent.LatentModel
    models.tabular.init_counts models.rssm.observe models.rssm_codec.encode data.ring.make
    data.sequence.make data.prioritised.make
    analysis.stats.iqm analysis.plots.learning_curves analysis.runs.read_run analysis.model_plots
    nn.networks.MLP nn.optimiser.adam nn.normaliser.update nn.schedules.linear
    nn.distributions.tanh_normal envs.make_env envs.tabular
    runtime.loop.play_episodes runtime.train.train runtime.evaluate runtime.checkpoint.Checkpoints
    runtime.devices runtime.logs runtime.plan agents.dqn.q_target agents.sac agents.dyna agents.mbpo
"""


def test_every_public_name_works_after_the_import_alone():
    """Each with nothing of ours loaded before it, so that none leans on another's imports."""
    names = PUBLIC.split()
    code = f"""
import importlib, sys
for name in {names}:
    for module in [m for m in sys.modules if m.split(".")[0] == "mbrl_jax"]:
        del sys.modules[module]
    here = importlib.import_module("mbrl_jax")
    for part in name.split("."):
        assert part in dir(here), name
        here = getattr(here, part)
print(sorted(name for name in dir(importlib.import_module("mbrl_jax")) if name in {names}))
"""
    shown = run_python(code, "ignore").strip()
    assert shown == str(sorted(name for name in names if "." not in name))
    with pytest.raises(AttributeError, match="module 'mbrl_jax' has no attribute 'dyna'"):
        _ = mbrl_jax.dyna
    with pytest.raises(AttributeError, match=r"module 'mbrl_jax\.models' has no attribute 'dyn'"):
        _ = mbrl_jax.models.dyn


def test_what_a_package_promises_is_there():
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        package = getattr(mbrl_jax, folder.name)
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert files <= set(dir(package)), "a file that nobody finds"
        for name in (*files, *getattr(package, "__all__", ())):
            assert getattr(package, name) is not None


def test_gymnax_finds_our_environments():
    import gymnax

    mbrl_jax.make_env("DynaMaze-sutton")
    base, params = gymnax.make("DynaMaze-sutton", resolution=2)
    assert base.observation_space(params).n == 216


@config
class RingConfig:
    scale: float = 1.0


ROWS, WIDTH = 4096, 8


def ring_agent(cfg, spec):
    """A replay ring written at t, and a heavy branch every eighth step."""

    def observe(state, step, extras, t):
        row = jnp.broadcast_to(step.reward[:, None] * cfg.scale, (1, WIDTH))
        ring = jax.lax.dynamic_update_slice(state["ring"], row, (t % ROWS, 0))
        return {**state, "ring": ring}

    def update(state, key, t, n):
        def heavy(weights):
            index = jax.random.randint(key, (32,), 0, ROWS)
            batch = state["ring"][index]
            return jnp.tanh(weights @ batch.T @ batch) + weights

        weights = jax.lax.cond(t % 8 == 0, heavy, lambda weights: weights, state["weights"])
        return {**state, "weights": weights}, {"norm": jnp.sum(weights**2)}

    def init(key):
        return {
            "ring": jnp.zeros((ROWS, WIDTH)),
            "weights": jax.random.normal(key, (WIDTH, WIDTH)),
        }

    def act(state, memory, obs, is_first, key, t, mode):
        return jax.random.randint(key, (obs.shape[0],), 0, 2), memory, ()

    return Agent(init, lambda n: (), act, observe, update, Schedule(warmup_steps=4))


RING = AgentDef("ring", "a replay ring", RingConfig(), ring_agent, {})


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def conds(jaxpr):
    heavy = [e for e in primitives(jaxpr) if e.primitive.name == "cond"]
    return [e for e in heavy if any("tanh" in str(b) for b in e.params["branches"])]


def test_cond_on_the_time_stays_cond_in_a_resumed_vmapped_chunk():
    env = mbrl_jax.make_env("CartPole-v1")
    program = make_program(RING, env, RING.config, 400, eval_every=64, eval_episodes=0)
    run = jax.vmap(program.init, in_axes=(0, None))(
        jax.random.split(jax.random.key(0), 3), RING.config
    )
    run, _ = jax.jit(jax.vmap(program.period, in_axes=(0, None, None)))(
        run, RING.config, jnp.int32(0)
    )
    resumed = jax.vmap(program.period, in_axes=(0, None, None))
    assert len(conds(jax.make_jaxpr(resumed)(run, RING.config, jnp.int32(1)).jaxpr)) == 1
    # the fault this guards against: a time that is batched with the seeds
    batched = jax.vmap(program.period, in_axes=(0, None, 0))
    with jax.debug_key_reuse(False):  # both branches of a select consume the key
        assert not conds(jax.make_jaxpr(batched)(run, RING.config, jnp.arange(3)).jaxpr)


def compiled_chunk(agent, env, seeds, **overrides):
    job = make_job(agent, env, 400, seeds, 0, 100, 4, None, "auto", overrides)
    init, chunk = job.functions()
    config = traced(job.config)
    run = jax.eval_shape(init, job.keys(), config)
    lowered = chunk.lower(run, config, jnp.int32(0))
    # of XLA's passes over the program it leaves out none
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def copies_in_loops(text, shape):
    """Copies of `shape` in any computation but the entry."""
    found = []
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        if not computation.startswith("ENTRY"):
            found += re.findall(rf"= {re.escape(shape)}\S* copy\(", computation)
    return found


def test_no_whole_ring_is_copied_in_the_loop():
    compiled = compiled_chunk(RING, mbrl_jax.make_env("CartPole-v1"), 2)
    text = compiled.as_text()
    for shape in (f"f32[2,{ROWS},{WIDTH}]", f"f32[{ROWS},2,{WIDTH}]", f"f32[1,{ROWS},{WIDTH}]"):
        assert not copies_in_loops(text, shape)
    assert str(ROWS) in text, "the ring is in the program"
    ring = 4 * ROWS * WIDTH  # bytes of one seed on one device
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * ring
    assert compiled.memory_analysis().alias_size_in_bytes >= ring, "the state is not donated"


@pytest.mark.parametrize("agent", ["q_learning", "dyna_q", "dyna_q_plus", "prioritised_sweeping"])
def test_no_table_is_copied_in_the_loop(lake, agent):
    text = compiled_chunk(agent, lake, 16).as_text()
    for shape in ("f32[2,64]", "s32[2,64]", "f32[2,64,3]"):  # two seeds on each of 8 devices
        loops = [c for c in re.split(r"\n(?=%|ENTRY)", text) if "fused_computation" not in c[:40]]
        assert not copies_in_loops("\n".join(loops), shape), shape

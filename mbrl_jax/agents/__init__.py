"""One file per algorithm, each with its `Config`, its losses and `make(config, spec) -> Agent`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mbrl_jax import lazy
from mbrl_jax.types import Agent, EnvSpec, InputError, check_config, unknown
from mbrl_jax.x64 import in_32_bits


class AgentDef(NamedTuple):
    """An algorithm by name: what `make_train` and the command line need to build it."""

    name: str
    summary: str
    config: Any  # the default config
    make: Callable[[Any, EnvSpec], Agent]  # called inside the traced function
    presets: Mapping[str, Mapping[str, Any]]  # environment id -> fields that differ there
    resolve: Callable[[Any, EnvSpec], Any] = lambda config, spec: config
    """The config as it is used in an environment like `spec`, where fields depend on it."""
    tabular: bool = False
    """Whether a step is a few operations on a table, for which the command line asks XLA for whole
    loops as kernels (`runtime.devices.loops_as_kernels`)."""
    dynamic_loops: bool = False
    """Whether most of an update is in loops whose length only data tell, for which the command line
    asks XLA for loops as CUDA graphs (`runtime.devices.loops_as_graphs`)."""

    def config_for(self, env: str | EnvSpec, **overrides: Any) -> Any:
        """The default config with the preset of the environment and then `overrides`.

        Args:
          env: an id, or a spec, with which fields that depend on the environment are resolved, so
            that the config is the one that a run uses and records.
          overrides: fields; a config within is changed by a mapping of its fields.

        Raises:
          InputError: an unknown field, a wrong type or a value outside its interval.
        """
        env_id = env if isinstance(env, str) else env.id
        config = _with(self.config, self.presets.get(env_id, {}), self.name)
        config = _with(config, overrides, self.name)
        check_config(config)
        return config if isinstance(env, str) else self.resolve(config, env)


def _with(config: Any, fields: Mapping[str, Any], owner: str) -> Any:
    """`config` with `fields` in place; a mapping changes fields of a config within it."""
    names = [field.name for field in dataclasses.fields(config)]
    hints = {field.name: field.type for field in dataclasses.fields(config)}
    new = dict(fields)
    for name, value in fields.items():
        if name not in names:
            raise unknown(f"field of {owner}:", name, names)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(getattr(config, name)):
            new[name] = _with(getattr(config, name), value, f"{owner}.{name}")
        elif hints[name] in (float, "float") and isinstance(value, int):
            new[name] = value if isinstance(value, bool) else float(value)
        elif isinstance(value, list):  # as JSON has a tuple
            new[name] = tuple(value)
    return dataclasses.replace(config, **new)


_MODULES = {
    "q_learning": "dyna",
    "dyna_q": "dyna",
    "dyna_q_plus": "dyna",
    "prioritised_sweeping": "dyna",
    "dqn": "dqn",
    "ppo": "ppo",
    "sac": "sac",
    "pets": "pets",
    "mbpo": "mbpo",
    "dreamer": "dreamer",
    "muzero": "muzero",
    "muzero_plain": "muzero",
}


class _Agents(Mapping[str, AgentDef]):
    """Agent names to definitions; an algorithm's module loads when it is asked for."""

    def __getitem__(self, name: str) -> AgentDef:
        if name not in _MODULES:
            raise unknown("agent", name, _MODULES)
        module = importlib.import_module(f"mbrl_jax.agents.{_MODULES[name]}")
        return module.AGENTS[name]

    def __contains__(self, name: object) -> bool:
        return name in _MODULES

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


AGENTS = _Agents()

_PARTS = (
    "dreamer_config", "dreamer_losses", "dreamer_records", "mbpo_presets", "muzero_config",
    "muzero_losses", "muzero_presets", "muzero_search", "muzero_targets", "sac_learner",
)  # fmt: skip
__getattr__, __dir__ = lazy.attach(__name__, (*sorted(set(_MODULES.values())), *_PARTS))


def make_agent(name: str | AgentDef, spec: EnvSpec, config: Any = None) -> Agent:
    """The agent `name` for an environment like `spec`; `config` defaults to the preset.

    Raises:
      InputError: an unknown name, a config of another agent, a field outside its interval, or a
        spec that the agent cannot act in.
    """
    definition = name if isinstance(name, AgentDef) else AGENTS[name]
    if config is None:
        config = definition.config_for(spec)
    if type(config) is not type(definition.config):
        raise InputError(
            f"config of {definition.name}: got {type(config).__name__}, "
            f"expected {type(definition.config).__module__}.{type(definition.config).__name__}"
        )
    check_config(config)
    agent = in_32_bits(definition.make)(config, spec)
    parts = [name for name in Agent._fields if name != "schedule"]
    return agent._replace(**{name: in_32_bits(getattr(agent, name)) for name in parts})

"""`plan_memory`: what an engine would take, from its config alone; nothing is allocated."""

from contextlib import closing
from dataclasses import replace

from octavo.backends.select import select
from octavo.engine.assemble import cache_maker, limits_of, open_model
from octavo.engine.build import cache_folder, use_cache
from octavo.engine.config import ConfigError, EngineConfig, devices_of
from octavo.engine.encoder_plan import EncoderMemory, plan_encoder
from octavo.engine.memory import MemoryPlan, Resolved, resolve, size
from octavo.engine.programs import Programs
from octavo.engine.runner import choose_runner
from octavo.engine.step import Machine
from octavo.models.config import ModelConfig


def plan_memory(config: EngineConfig) -> MemoryPlan | EncoderMemory:
    """The plan, with the workspace that the largest compiled programs really need.

    Raises ConfigError where it does not fit.
    """
    config.validate()
    if choose_runner(config) == "pooling":
        use_cache(config.compilation_cache)
        return plan_encoder(config)
    backend = select(config.device, devices_of(config.mesh))
    with closing(open_model(config)) as checkpoint:
        resolved = resolve(config, backend, ModelConfig.from_hf(checkpoint.config))
    folder = cache_folder(config.compilation_cache)
    machine = Machine(resolved.dims, resolved.model, backend, resolved.mesh)
    limits = replace(
        limits_of(config, resolved),
        row_buckets=resolved.row_buckets[-1:],
        token_buckets=resolved.token_buckets[-1:],
        several_rows=resolved.several_rows[-1:],
    )
    programs = Programs(machine, limits, config.max_logprobs, folder)
    programs.compile(resolved.model.abstract_params(resolved.dtype), cache_maker(backend, resolved))
    return check_workspace(resolved, programs.workspace())


def check_workspace(resolved: Resolved, workspace: int) -> MemoryPlan:
    """The plan with the measured workspace. Raises ConfigError where that no longer fits."""
    plan = replace(resolved.memory, workspace=workspace)
    if plan.total > plan.usable:
        raise ConfigError(
            f"the compiled steps need {size(workspace)} of workspace, and with "
            f"{size(plan.weights)} of weights and {size(plan.cache)} of cache that is "
            f"{size(plan.total - plan.usable)} more than the {size(plan.usable)} usable; use a "
            "smaller --max-num-batched-tokens or a lower --memory-utilization"
        )
    return plan

"""A configuration, bound addresses and a started engine -> the parts of a running service.

Knows which part needs which setting; knows nothing of what the parts do.
"""

from flashrl_rollout.app import empty_app
from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.engine import Engine
from flashrl_rollout.generation import Generator
from flashrl_rollout.history import History, OnResult
from flashrl_rollout.lease import RunLease
from flashrl_rollout.receiver import Receiver
from flashrl_rollout.service import Parts
from flashrl_rollout.stage_dir import StageDir
from flashrl_rollout.standard_routes import StandardRoutes
from flashrl_rollout.store import UpdateSettings, WeightStore
from flashrl_rollout.versions import VersionGate
from flashrl_rollout.weights import Weights, WriteSettings

_MIB, _GIB = 1 << 20, 1 << 30


async def assemble(
    config: RolloutConfig, engine: Engine, receiver: Receiver, stage_dir: StageDir, on_result: OnResult
) -> Parts:
    """Everything around `engine`; the receiver has been started."""
    gate = VersionGate(config.max_num_seqs + config.max_waiting, config.admit_timeout_s)
    weights = await Weights.of(engine, gate, _write_settings(config))
    lease = RunLease(config.run_idle_s)
    history = History(config.audit_every, on_result)
    store = WeightStore(engine, weights, receiver, stage_dir, lease, history, _update_settings(config))
    generator = Generator(engine, gate, config.request_timeout_s)
    standard = await _standard_routes(config, engine, gate)
    return Parts(engine, gate, weights, store, generator, lease, history, receiver, standard)


async def _standard_routes(config: RolloutConfig, engine: Engine, gate: VersionGate) -> StandardRoutes | None:
    app = await engine.standard_app(empty_app)
    return None if app is None else StandardRoutes(app, gate, config.request_timeout_s)


def _write_settings(config: RolloutConfig) -> WriteSettings:
    return WriteSettings(config.commit_mode, config.drain_deadline_s, config.write_deadline_s)


def _update_settings(config: RolloutConfig) -> UpdateSettings:
    return UpdateSettings(
        credit_bytes=config.credit_mib * _MIB,
        max_update_bytes=int(config.max_update_gib * _GIB),
        transfer_deadline_s=config.transfer_deadline_s,
        checkpoint_roots=config.roots(),
    )

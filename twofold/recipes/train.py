"""`twofold train`: from a configuration to a run folder with an adapter, a report and its proof."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from twofold import atomic
from twofold.adapter.attach import attach, folding
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import Provenance, load_adapter, open_adapter, save_adapter
from twofold.base.chat import Renderer
from twofold.base.load import Base, Precision, load_base, renderer_for
from twofold.data.batches import evaluation_batches, micro_batches, step_indices, steps_per_epoch
from twofold.data.examples import Examples, load_examples
from twofold.errors import ProofError, UserError
from twofold.events import Emit, Event, Message, Warned, fan_out, silent, working
from twofold.machine import checked_device, fastest_dtype, peak_memory_bytes
from twofold.recipes.adapters import check_base
from twofold.recipes.preflight import Preflight, preflight, total_steps
from twofold.recipes.proof import Verification, base_digest, pad_token, proof_batch, verify_merge, within_memory
from twofold.recipes.report import write_page
from twofold.recipes.runs import EventLog, RunFolder, as_begun, open_new, open_resumed, trackers
from twofold.recipes.settings import TrainConfig, continued
from twofold.training.checkpoint import Progressed
from twofold.training.floor import StepTimes, measured_floor
from twofold.training.loop import Job, restore
from twofold.training.loop import train as run_job
from twofold.training.objective import HeldOut, evaluate_loss, objective_for

EVALUATION_TOKENS = 2048
"""Tokens in one forward pass of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Event):
    """Everything is loaded and foreseen; training comes next."""

    preflight: Preflight

    def record(self) -> dict[str, Any]:
        return {"event": "prepared", "steps": self.preflight.steps, "seconds": self.preflight.seconds}


@dataclass(frozen=True)
class _Loaded:
    base: Base
    train: Examples
    evaluation: Examples | None
    lora: LoraConfig


def train(config: TrainConfig, emit: Emit = silent, *, resume: bool = False) -> dict[str, Any]:
    """Train an adapter and prove it; returns what report.json holds.

    Raises:
        UserError: anything about the configuration, the base or the data; nothing was trained then.
        NonFiniteLossError: a loss that is NaN or infinite; checkpoints are kept.
        ProofError: the base changed, or merging does not give what the adapter gives.
    """
    config = _resolved(as_begun(config) if resume else config)
    run, newest = open_resumed(config) if resume else (open_new(config), None)
    with run.locked():
        log = EventLog(run)
        try:
            with trackers(config, run) as told:
                return _train(config, run, newest, fan_out(log, emit, *told))
        except UserError:
            run.withdraw()
            raise
        finally:
            log.close()


def dry_run(config: TrainConfig, emit: Emit = silent) -> Preflight:
    """Everything up to the first step, and nothing written."""
    loaded = _load(_resolved(config), emit)
    return preflight(loaded.base, loaded.lora, config.training, loaded.train, loaded.evaluation)


def prepare(config: TrainConfig, emit: Emit = silent) -> tuple[Base, Examples | None, Job]:
    """The base with a fresh adapter, the held-out data, and the job to run; nothing is written.

    Raises:
        UserError: as `train`.
    """
    config = _resolved(config)
    loaded = _load(config, emit)
    _attach(config, loaded)
    return loaded.base, loaded.evaluation, _job(config, RunFolder(Path(config.output)), loaded)


def _resolved(config: TrainConfig) -> TrainConfig:
    """`auto` and the settings of an adapter to go on from made definite, for whoever reads or resumes the run."""
    device = str(checked_device(config.device))
    dtype = str(fastest_dtype(torch.device(device))).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    return replace(config, device=device, dtype=cast(Precision, dtype), adapter=continued(config.adapter))


def _load(config: TrainConfig, emit: Emit) -> _Loaded:
    base = load_base(config.base, config.dtype, config.device, emit)
    if config.adapter.init_from:
        files = open_adapter(Path(config.adapter.init_from))
        check_base(files, base, emit, allow_foreign=config.allow_foreign_base)
    template = config.data.chat_template()
    if template is not None:
        base = replace(base, renderer=renderer_for(base.model, base.tokenizer, template))
    train_set = load_examples(config.data.train, config.data, base.renderer, emit)
    held_out = (
        load_examples(config.data.evaluation, config.data, base.renderer, emit) if config.data.evaluation else None
    )
    return _Loaded(base, train_set, held_out, config.adapter.lora())


def _train(config: TrainConfig, run: RunFolder, newest: Path | None, emit: Emit) -> dict[str, Any]:
    loaded = _load(config, emit)
    base, model = loaded.base, loaded.base.model
    foreseen = preflight(base, loaded.lora, config.training, loaded.train, loaded.evaluation)
    if newest is not None:
        run.require_same(foreseen.as_json())
    atomic.write_json(run.preflight, foreseen.as_json())
    for warning in foreseen.warnings:
        emit(Warned(text=warning))
    emit(Prepared(preflight=foreseen))
    _say_where_it_begins(newest, config, emit)
    before = base_digest(model)
    evaluation: dict[str, Any] = {"base": _evaluated("base", loaded, emit)}
    _attach(config, loaded)
    job = _job(config, run, loaded)
    emit(Message(text=job.objective.path))
    times = StepTimes()
    progressed = run_job(job, fan_out(times, emit), newest)
    peak = peak_memory_bytes(base.device)
    floor = measured_floor(job.objective, times, job.batches)
    _save(config, run, loaded, job, progressed)
    evaluation["adapter"] = _evaluated("adapter", loaded, emit)
    evaluation["merged"], verification, skipped = _prove(config, loaded, emit)
    report = {
        **_figures(config, run, progressed),
        "peak_memory_bytes": peak,
        "floor": floor and floor.as_json(),
        "parameters": foreseen.as_json()["parameters"],
        "predicted": {"seconds": foreseen.seconds, "memory": foreseen.memory.as_json()},
        "evaluation": evaluation,
        "verification": verification.as_json() if verification else None,
        "verification_skipped": skipped,
        "base_unchanged": base_digest(model) == before,
    }
    write_page(run.page, report, foreseen.as_json(), run.recorded())
    atomic.write_json(run.report, report)  # last: where it stands, the run is finished
    if not report["base_unchanged"]:
        raise ProofError("the base's tensors changed in training, which must never happen; do not use this adapter")
    if verification:
        verification.require("the merged model", emit)
    return report


def _say_where_it_begins(newest: Path | None, config: TrainConfig, emit: Emit) -> None:
    if newest is not None:
        emit(Message(text=f"going on from checkpoint {newest.name}"))
    if config.adapter.init_from:
        emit(Message(text=f"going on from the adapter {config.adapter.init_from}, with its own r, alpha and targets"))


def _attach(config: TrainConfig, loaded: _Loaded) -> None:
    torch.manual_seed(config.training.seed)
    if config.adapter.init_from:
        load_adapter(loaded.base.model, config.adapter.init_from)
    else:
        attach(loaded.base.model, loaded.lora)


def _job(config: TrainConfig, run: RunFolder, loaded: _Loaded) -> Job:
    base, items, training = loaded.base, loaded.train.items, config.training
    objective = objective_for(
        base.model,
        pad_token(base),
        recompute=training.gradient_checkpointing,
        share_prefixes=training.share_prefixes,
        cache_frozen=training.cache_frozen,
    )
    held_out = evaluation_batches(loaded.evaluation.items, EVALUATION_TOKENS) if loaded.evaluation else []

    def batches(step: int) -> Any:
        chosen = [items[i] for i in step_indices(len(items), training.batch_size, training.seed, step)]
        return micro_batches(chosen, training.micro_batch_size, training.micro_batch_tokens)

    def evaluate() -> tuple[float, float]:
        found = evaluate_loss(objective, held_out)
        return found.loss, found.token_accuracy

    return Job(
        model=base.model,
        objective=objective,
        parameters={n: p for n, p in base.model.named_parameters() if p.requires_grad},
        config=training,
        steps=total_steps(len(items), training),
        steps_per_epoch=steps_per_epoch(len(items), training.batch_size),
        batches=batches,
        evaluate=evaluate if held_out else None,
        checkpoints=run.checkpoints,
        device=base.device,
    )


def held_out_loss(base: Base, examples: Examples, emit: Emit = silent, task: str = "evaluating") -> HeldOut:
    """Loss and accuracy of the model as it stands."""
    objective = objective_for(base.model, pad_token(base), recompute=False)
    return evaluate_loss(objective, evaluation_batches(examples.items, EVALUATION_TOKENS), emit, task)


def _evaluated(name: str, loaded: _Loaded, emit: Emit) -> dict[str, Any] | None:
    """Held-out figures for the report; None without held-out data."""
    if loaded.evaluation is None:
        return None
    return asdict(held_out_loss(loaded.base, loaded.evaluation, emit, f"held-out loss, {name}"))


def _save(config: TrainConfig, run: RunFolder, loaded: _Loaded, job: Job, progressed: Progressed) -> None:
    """`adapter/` is the best by evaluation where there were evaluations, else the last; then the last is kept apart."""
    provenance = _provenance(config, loaded, progressed)
    model, name = loaded.base.model, loaded.base.public_name
    if progressed.best and progressed.best_step != progressed.step:
        save_adapter(model, run.last_adapter, provenance=provenance, base_name=name)
        restore(job.parameters, progressed.best)
    save_adapter(model, run.adapter, provenance=provenance, base_name=name)


def _provenance(config: TrainConfig, loaded: _Loaded, progressed: Progressed) -> Provenance:
    """What can be said without times and paths, so that the same training gives the same bytes."""
    renderer: Renderer = loaded.base.renderer
    return Provenance(
        base=loaded.base.fingerprint.as_json(),
        chat_template=renderer.template,
        eos_token_ids=renderer.end_token_ids,
        training={
            "settings": asdict(config.training),
            "data": loaded.train.report.digest,
            "steps": progressed.step,
            "best_step": progressed.best_step,
            "dtype": config.dtype,
        },
    )


class _Proof(NamedTuple):
    """The proof, or why there is none (memory ran out), and the merged model's held-out figures."""

    evaluation: dict[str, Any] | None = None
    verification: Verification | None = None
    skipped: str | None = None


def _prove(config: TrainConfig, loaded: _Loaded, emit: Emit) -> _Proof:
    if not config.verify:
        return _Proof()

    def prove() -> _Proof:
        base = loaded.base
        batch = proof_batch((loaded.evaluation or loaded.train).items, base.device)
        with working("proving that the merged model says what the adapter says", emit):
            verification = verify_merge(base.model, batch, pad_token(base))
        with folding(base.model):
            return _Proof(_evaluated("merged", loaded, emit), verification)

    proof, skipped = within_memory(prove, emit)
    return proof or _Proof(skipped=skipped)


def _figures(config: TrainConfig, run: RunFolder, progressed: Progressed) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "adapter": str(run.adapter),
        "base": config.base,
        "dtype": config.dtype,
        "device": config.device,
        "steps": progressed.step,
        "best_step": progressed.best_step,
        "seconds": progressed.seconds,
        "tokens": progressed.tokens,
        "supervised_tokens": progressed.supervised_tokens,
        "tokens_per_second": progressed.tokens / progressed.seconds if progressed.seconds else 0.0,
    }

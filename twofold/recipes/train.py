"""`twofold train`: from a configuration to a run folder with an adapter, a report and its proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from twofold import atomic
from twofold.adapter.attach import attach, constants, folding, freeze_a
from twofold.adapter.files import Provenance, load_adapter, save_adapter
from twofold.base.batch import Example, PackedBatch
from twofold.base.chat import Renderer
from twofold.base.load import Base, Precision
from twofold.data.batches import evaluation_batches, examples_seen, micro_batches, step_indices, steps_per_epoch
from twofold.data.examples import Examples
from twofold.errors import ProofError, TwofoldError, UserError
from twofold.events import Emit, Message, Warned, fan_out, silent, working
from twofold.machine import checked_device, fastest_dtype, peak_memory_bytes, pick_device
from twofold.recipes.full import free, full_objective, save_model
from twofold.recipes.loading import Loaded, check_alike, foresee, is_sharded, load, own_tensors
from twofold.recipes.others import comparable, same_data
from twofold.recipes.preflight import Preflight, Prepared, total_steps
from twofold.recipes.proof import Verification, base_digest, pad_token, proof_batch, verify_merge, within_memory
from twofold.recipes.report import write_page
from twofold.recipes.runs import EventLog, RunFolder, as_begun, open_new, open_resumed, trackers
from twofold.recipes.settings import TrainConfig, continued
from twofold.recipes.starts import started
from twofold.recipes.tasks import TASKS
from twofold.training.checkpoint import Progressed
from twofold.training.floor import StepTimes, measured_floor
from twofold.training.loop import Job, restore
from twofold.training.loop import train as run_job
from twofold.training.objective import HeldOut, Objective, evaluate_loss, objective_for
from twofold.training.optim import TrainingConfig
from twofold.world import ALONE, World, joined

EVALUATION_TOKENS = 2048
"""Tokens in one forward pass of an evaluation."""


def train(config: TrainConfig, emit: Emit = silent, *, resume: bool = False) -> dict[str, Any]:
    """Train an adapter and prove it, or the whole base; returns what report.json holds. Under torchrun, every process calls this.

    Raises:
        UserError: anything about the configuration, the base or the data; nothing was trained then.
        NonFiniteLossError: a loss that is NaN or infinite; checkpoints are kept.
        LostProcessError: another process of the training is gone; checkpoints are kept.
        ProofError: the base changed.
    """
    with joined() as world, ExitStack() as held:
        config, run, newest = world.on_main(lambda: _begin(config, held, resume=resume))
        with _recording(config, run, emit, world) as heard:
            return _train(config, run, newest, heard, world)


def _begin(config: TrainConfig, held: ExitStack, *, resume: bool) -> tuple[TrainConfig, RunFolder, Path | None]:
    """The run and the checkpoint to go on from; its lock, which comes before any look at what to forget, stays in `held`."""
    config = resolved(as_begun(config) if resume else config)
    held.enter_context(RunFolder(Path(config.output)).locked())
    run, newest = open_resumed(config) if resume else (open_new(config), None)
    return config, run, newest


@contextmanager
def _recording(config: TrainConfig, run: RunFolder, emit: Emit, world: World) -> Iterator[Emit]:
    """Who hears of the run; one process writes it down."""
    if not world.main:
        yield silent
        return
    with closing(EventLog(run)) as log:
        try:
            with trackers(config, run) as told:
                yield fan_out(log, emit, *told)
        except TwofoldError as error:
            if isinstance(error, UserError) or not run.preflight.exists():
                run.withdraw()
            raise


def dry_run(config: TrainConfig, emit: Emit = silent) -> Preflight:
    """Everything up to the first step, and nothing written."""
    config = resolved(config)
    return foresee(config, load(config, emit, ALONE), ALONE)


def prepare(config: TrainConfig, emit: Emit = silent) -> tuple[Base, Examples | None, Job]:
    """The base with a fresh adapter, the held-out data, and the job to run; nothing is written.

    Raises:
        UserError: as `train`.
    """
    config = resolved(config)
    loaded = load(config, emit, ALONE)
    _attach(config, loaded)
    return loaded.base, loaded.evaluation, job_of(config, RunFolder(Path(config.output)), loaded, ALONE)


def resolved(config: TrainConfig) -> TrainConfig:
    """`auto` and the settings of an adapter to go on from made definite, so that whoever reads or resumes the run, and every
    process of it, computes the same."""
    device = pick_device() if config.device == "auto" else config.device
    chosen = checked_device(device)
    dtype = str(fastest_dtype(chosen)).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    return replace(config, device=device, dtype=cast(Precision, dtype), adapter=continued(config.adapter))


def _train(config: TrainConfig, run: RunFolder, newest: Path | None, emit: Emit, world: World) -> dict[str, Any]:
    loaded = load(config, emit, world)
    base = loaded.base
    foreseen = foresee(config, loaded, world)
    check_alike(foreseen, world)
    world.on_main(lambda: _record_preflight(run, foreseen, newest))
    for warning in foreseen.warnings:
        emit(Warned(text=warning))
    emit(Prepared(preflight=foreseen))
    _say_where_it_begins(newest, config, emit)
    before = None if config.full else base_digest(own_tensors(config, base, world))
    evaluation: dict[str, Any] = {"base": _evaluated("base", config, loaded, emit, world)}
    _attach(config, loaded)
    job = job_of(config, run, loaded, world)
    emit(Message(text=_path(config, job)))
    times = StepTimes()
    progressed = run_job(job, fan_out(times, emit), newest)
    peak = world.largest(peak_memory_bytes(base.device))
    _say_what_was_left_out(progressed, emit)
    floor = None if loaded.stream else measured_floor(job.objective, times, job.batches)  # a stream is not read again
    _save(config, run, loaded, job, progressed)
    what = "full" if config.full else "adapter"
    evaluation["adapter"] = None
    evaluation[what] = _evaluated(what, config, loaded, emit, world)
    evaluation["merged"], verification, skipped = _prove(config, loaded, emit, world)
    unchanged = config.full or base_digest(own_tensors(config, base, world)) == before
    report = {
        **_figures(config, run, progressed),
        **comparable(config, foreseen.as_json()),
        "examples_per_second": _examples_per_second(config.training, loaded, progressed),
        "processes": world.size,
        "peak_memory_bytes": peak,
        "floor": floor and floor.as_json(),
        "parameters": foreseen.as_json()["parameters"],
        "predicted": {"seconds": foreseen.seconds, "memory": foreseen.memory.as_json()},
        "evaluation": evaluation,
        "verification": verification.as_json() if verification else None,
        "verification_skipped": skipped,
        "base_unchanged": None if config.full else all(world.gather(unchanged)),
    }
    report["same_data"] = world.on_main(lambda: same_data(run, report))
    world.on_main(lambda: _record_report(run, report, foreseen))
    if report["base_unchanged"] is False:
        raise ProofError("the base's tensors changed in training, which must never happen; do not use this adapter")
    if verification:
        verification.warn("a merged model", emit)
    return report


def _record_preflight(run: RunFolder, foreseen: Preflight, newest: Path | None) -> None:
    if newest is not None:
        run.require_same(foreseen.as_json())
    atomic.write_json(run.preflight, foreseen.as_json())


def _record_report(run: RunFolder, report: dict[str, Any], foreseen: Preflight) -> None:
    write_page(run.page, report, foreseen.as_json(), run.recorded())
    atomic.write_json(run.report, report)  # last: where it stands, the run is finished


def _path(config: TrainConfig, job: Job) -> str:
    if not is_sharded(config, job.world):
        shared = f", each of {job.world.size} processes on its share of a step" if job.world.size > 1 else ""
        return job.objective.path + shared
    return f"base sharded over {job.world.size} processes by FSDP2, which gathers each layer in the model's own forward"


def _say_what_was_left_out(progressed: Progressed, emit: Emit) -> None:
    if progressed.left_out:
        said = (
            f"{progressed.left_out} examples of the stream were too long or had nothing supervised, and were left out"
        )
        emit(Warned(text=said))


def _say_where_it_begins(newest: Path | None, config: TrainConfig, emit: Emit) -> None:
    if newest is not None:
        emit(Message(text=f"going on from checkpoint {newest.name}"))
    if config.adapter.init_from:
        emit(Message(text=f"going on from the adapter {config.adapter.init_from}, with its own r, alpha and targets"))


def _attach(config: TrainConfig, loaded: Loaded) -> None:
    """Make what is to learn: a fresh adapter, one to go on from, or the base itself."""
    torch.manual_seed(config.training.seed)
    if loaded.lora is None:
        free(loaded.base)
    elif config.adapter.init_from:
        load_adapter(loaded.base.model, config.adapter.init_from)
        if config.adapter.freeze_a:
            freeze_a(loaded.base.model)
    else:
        base = loaded.base
        lora, factors = started(base.model, loaded.lora, loaded.train.items, pad_token(base), base.reference)
        attach(loaded.base.model, lora, factors=factors)


def job_of(config: TrainConfig, run: RunFolder, loaded: Loaded, world: World) -> Job:
    """The training of whatever learns in the model now."""
    base, training = loaded.base, config.training
    objective = _objective(config, base)
    held_out = evaluation_batches(loaded.evaluation.items, EVALUATION_TOKENS) if loaded.evaluation else []

    def evaluate() -> tuple[float, float]:
        found = evaluate_loss(objective, held_out, world=world)
        return found.loss, found.token_accuracy

    return Job(
        model=base.model,
        objective=objective,
        parameters={n: p for n, p in base.model.named_parameters() if p.requires_grad},
        constants=constants(base.model),
        config=training,
        steps=total_steps(loaded.train, training),
        epoch=_epochs(training, loaded),
        batches=_batches(training, loaded, world),
        left_out=lambda: loaded.stream.left_out if loaded.stream else 0,
        evaluate=evaluate if held_out else None,
        checkpoints=run.checkpoints,
        device=base.device,
        world=world,
    )


def _objective(config: TrainConfig, base: Base) -> Objective:
    training, pad_id = config.training, pad_token(base)
    if config.full:
        return full_objective(base.model, pad_id, recompute=training.gradient_checkpointing)
    return objective_for(
        base.model,
        pad_id,
        recompute=training.gradient_checkpointing,
        share_prefixes=training.share_prefixes,
        cache_frozen=training.cache_frozen,
    )


def _batches(training: TrainingConfig, loaded: Loaded, world: World) -> Callable[[int], list[PackedBatch]]:
    """This process's share of each step: examples are dealt out in turn, so that a step has the same ones for any number."""
    items, stream = loaded.train.items, loaded.stream

    def own(step: int) -> list[Example]:
        if stream is not None:
            return stream.examples(step, world.rank, world.size)
        chosen = step_indices(len(items), training.batch_size, training.seed, step)
        return [items[i] for i in chosen[world.rank :: world.size]]

    return lambda step: micro_batches(own(step), training.micro_batch_size, training.micro_batch_tokens)


def _epochs(training: TrainingConfig, loaded: Loaded) -> Callable[[int], float]:
    """Passes over the data after so many steps; of a stream, whose length is unknown, whole ones only."""
    stream, in_one = loaded.stream, steps_per_epoch(len(loaded.train.items), training.batch_size)
    return lambda step: step / in_one if stream is None else float(stream.passes)


def held_out_loss(
    base: Base, examples: Examples, emit: Emit = silent, task: str = "evaluating", world: World = ALONE
) -> HeldOut:
    """Loss and accuracy of the model as it stands."""
    objective = objective_for(base.model, pad_token(base), recompute=False)
    batches = evaluation_batches(examples.items, EVALUATION_TOKENS)
    return evaluate_loss(objective, batches, emit, task, world)


def _evaluated(name: str, config: TrainConfig, loaded: Loaded, emit: Emit, world: World) -> dict[str, Any] | None:
    """Held-out figures for the report; None without held-out data."""
    if loaded.evaluation is None:
        return None
    found = held_out_loss(loaded.base, loaded.evaluation, emit, f"held-out loss, {name}", world)
    return TASKS[config.task].figures(found)


def _save(config: TrainConfig, run: RunFolder, loaded: Loaded, job: Job, progressed: Progressed) -> None:
    """What is kept is the best by evaluation where there were evaluations, else the last; then the last is kept apart."""
    provenance = provenance_of(config, loaded, progressed)
    model, name = loaded.base.model, loaded.base.public_name

    def save(adapter: Path, whole: Path) -> None:
        if config.full:
            save_model(loaded.base, whole)
        else:
            save_adapter(model, adapter, provenance=provenance, base_name=name)

    if progressed.best and progressed.best_step != progressed.step:
        job.world.on_main(lambda: save(run.last_adapter, run.last_model))
        restore(job.parameters, progressed.best)
    job.world.on_main(lambda: save(run.adapter, run.model))


def provenance_of(config: TrainConfig, loaded: Loaded, progressed: Progressed) -> Provenance:
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
            **({"quantization": asdict(config.scheme)} if config.scheme else {}),
            **TASKS[config.task].provenance(loaded.base),
        },
    )


class _Proof(NamedTuple):
    """The proof, or why there is none (memory ran out), and the merged model's held-out figures."""

    evaluation: dict[str, Any] | None = None
    verification: Verification | None = None
    skipped: str | None = None


def _prove(config: TrainConfig, loaded: Loaded, emit: Emit, world: World) -> _Proof:
    """Every process proves it of its own model; of a sharded one nobody can, for no process holds its weights."""
    if config.full:
        return _Proof(skipped="the whole base learned, so there is no adapter to prove anything of")
    if not config.verify:
        return _Proof()
    if is_sharded(config, world):
        reason = "nothing is proved of the merged model, for no process holds the whole base; twofold merge does"
        emit(Warned(text=reason))
        return _Proof(skipped=reason)

    def prove() -> _Proof:
        base = loaded.base
        batch = proof_batch((loaded.evaluation or loaded.train).items, base.device)
        with working("proving that the merged model says what the adapter says", emit):
            verification = verify_merge(base.model, batch, pad_token(base))
        with folding(base.model):
            return _Proof(_evaluated("merged", config, loaded, emit, world), verification)

    proof, skipped = within_memory(prove, emit)
    return proof or _Proof(skipped=skipped)


def _figures(config: TrainConfig, run: RunFolder, progressed: Progressed) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "adapter": None if config.full else str(run.adapter),
        "model": str(run.model) if config.full else None,
        "base": config.base,
        "task": config.task,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "device": config.device,
        "steps": progressed.step,
        "best_step": progressed.best_step,
        "seconds": progressed.seconds,
        "tokens": progressed.tokens,
        "supervised_tokens": progressed.supervised_tokens,
        "tokens_per_second": progressed.tokens / progressed.seconds if progressed.seconds else 0.0,
    }


def _examples_per_second(training: TrainingConfig, loaded: Loaded, progressed: Progressed) -> float:
    count, batch = len(loaded.train.items), training.batch_size
    seen = progressed.step * batch if loaded.stream else examples_seen(count, batch, progressed.step)
    return seen / progressed.seconds if progressed.seconds else 0.0

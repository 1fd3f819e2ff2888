"""One training run from a config to an adapter on disk; reads from top to bottom."""

import contextlib
import dataclasses
import json
import time
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from vlm_jax.distributed import processes
from vlm_jax.files.atomic import write_json
from vlm_jax.quantization import summary
from vlm_jax.sharding import row_parts, row_share
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.compile import (
    compile_largest_loss,
    compile_largest_step,
    out_of_memory_explained,
)
from vlm_jax.train.fingerprint import identity, settings_of
from vlm_jax.train.mesh import mesh_of, rows_of
from vlm_jax.train.metrics import (
    Watch,
    added_only,
    evaluated,
    idle_components,
    told,
    untrained_tokens,
)
from vlm_jax.train.optimizer import OptimizerSettings, learning_rate, optimizer
from vlm_jax.train.placement import Feed, on_mesh
from vlm_jax.train.preemption import Stopped, interruptible
from vlm_jax.train.progress import Bar, Doing, details, headline
from vlm_jax.train.results import write_result
from vlm_jax.train.run_dir import (
    Claim,
    Places,
    nothing_half_written,
    output_directory,
    places_of,
    result_half_written,
)
from vlm_jax.train.selection import Best, Patience, best_of, every, patience_of, total_steps
from vlm_jax.train.setup import (
    absolute_paths,
    build,
    evaluates,
    make_pipeline,
    objective_of,
    state_options,
    step_options,
)
from vlm_jax.train.step import TrainState, init_state, make_step
from vlm_jax.train.trackers import Lines, check_reporters, open_log, print_report
from vlm_jax.train.trainable import report, trainable_line
from vlm_jax.trees import flatten, join, split
from vlm_jax.weights import is_quantized


@out_of_memory_explained()
def train(
    config: ConfigDict,
    resume: bool | str = False,
    console: Console | None = None,
    verbose: bool = False,
) -> dict:
    """Train as the config says and return {"steps", "interrupted", "output", ...}.

    `training.output_dir` then holds config.json, metrics.jsonl (a line a logged step),
    evaluations.jsonl, tensorboard/, checkpoints/, and at the end adapter/ in PEFT's format, or
    model/ where the language model trained in full; with load_best_model_at_end also best.json,
    which says of what step. resume: go on from the newest checkpoint, to the very numbers that a
    run without a stop gives; "auto": where there is a run. verbose: print the details of data and
    weights too. Ctrl-C or SIGTERM saves a checkpoint; an evaluation that it meets is given up, and
    is the first thing that the resumed run does.
    Raises `UserError` for bad input, a component without gradient, and a loss that is not finite:
    mostly before anything is written. What fails before the first checkpoint leaves no files.
    """
    places = places_of(config)
    check_reporters(config.training.report_to)
    best, patience = best_of(config), patience_of(config)
    if not processes.is_primary():  # the first process speaks for all
        console = Console(quiet=True)
    console = console or Lines()
    with output_directory(places, resume) as (resumes, warning):
        if warning is not None:
            console.print(warning, highlight=False, soft_wrap=True)
        claim = places.claim() if places.in_bucket and processes.is_primary() else None
        return _train(config, resumes, console, places, best, patience, claim, verbose)


def _train(
    config: ConfigDict,
    resume: bool,
    console: Console,
    places: Places,
    best: Best | None,
    patience: Patience | None,
    claim: Claim | None,
    verbose: bool,
) -> dict:
    directory = places.directory
    t, start = config.training, time.perf_counter()
    processes.check_same("configs", settings_of(config))

    # What is trained, and on what
    mesh = mesh_of(config)
    model, params, table, encoder = build(config, mesh)
    rows, share = rows_of(config, mesh), row_share(mesh)
    eval_rows = t.per_device_eval_batch_size * row_parts(mesh)
    data = make_pipeline(config, encoder, rows, share)
    held_out = None
    if evaluates(config):
        held_out = make_pipeline(config, encoder, eval_rows, share, training=False)

    # How
    total = total_steps(t.max_steps, t.num_train_epochs, data.steps_per_epoch)
    epoch = data.steps_per_epoch or total
    settings = dataclasses.replace(OptimizerSettings.of(t), max_steps=total)
    rate = learning_rate(settings)
    print_report(
        console, report(model, params, table, t.learning_rate), trainable_line(model, params, table)
    )
    four = any(is_quantized(leaf) for leaf in flatten(params).values())
    weights = summary(model, params) if four else []
    shown = [headline(data, held_out, rows, total, mesh), *weights[:1]]
    for line in shown + (weights[1:] + details(data, model) if verbose else []):
        console.print(line, highlight=False, soft_wrap=True)
    trainable, frozen = split(params, table)
    trained = list(flatten(trainable))
    idle = idle_components({model.component(path) for path in trained}, data.may_have_images)
    for name in idle:
        console.print(
            f"Warning: the {name} is to be trained, but data.train_file has no image: it stays as "
            f"it is.",
            highlight=False,
            soft_wrap=True,
        )
    spare = untrained_tokens(model, trained, encoder.tokenizer.get_added_vocab())
    if spare:
        console.print(
            f"Warning: the rows of {len(spare)} tokens that were added to the tokenizer "
            f"({', '.join(spare[:3])}{' ...' * (len(spare) > 3)}) lie in the frozen embedding: "
            f"nothing trains them. lora.modules_to_save=embed_tokens does.",
            highlight=False,
            soft_wrap=True,
        )
    still = [path for path in trained if model.component(path) in idle]
    tx = optimizer(trainable, table, settings, still)
    state = on_mesh(init_state(trainable, tx, t.seed, **state_options(config)), mesh)
    del params, trainable

    # Where from
    same = identity(config, model, table, rows)
    processes.check_same("data and base checkpoints", {**same, "shapes": data.shapes})
    place, step = {"epoch": 0, "step": 0}, 0
    pending = t.eval_on_start and held_out is not None  # whether this step is still to be evaluated
    if resume:
        checkpoints = Checkpoints(places.checkpoints, same, t.save_total_limit, best)
        if checkpoints.steps:
            state, place = checkpoints.restore_newest(
                state, lambda words: console.print(words, highlight=False, soft_wrap=True)
            )
            step = int(state.step)
            pending = checkpoints.pending(step) and held_out is not None
            if patience is not None:
                patience = patience.at(checkpoints.patience(step))
        console.print(f"Resuming '{directory}' from step {step}.", highlight=False)

    # The largest shapes are compiled first, so that what cannot run fails now
    run = make_step(model, tx, t.gradient_accumulation_steps, **step_options(config))
    doing = Doing(console)
    run_step = compile_largest_step(
        run, model, state, frozen, data.shapes, rows, mesh, data.wider, doing
    )
    losses = None
    if held_out is not None:
        smoothing = t.label_smoothing_factor
        losses = compile_largest_loss(
            model,
            state,
            frozen,
            held_out.shapes,
            eval_rows,
            mesh,
            smoothing,
            held_out.wider,
            doing,
            objective_of(config),
        )
    feed = Feed(encoder, mesh)

    # From here on things are written
    evaluation: dict[str, float] = {}
    with nothing_half_written(places):
        if processes.is_primary():
            write_json(directory / "config.json", absolute_paths(config))
        if not resume:
            checkpoints = Checkpoints(places.checkpoints, same, t.save_total_limit, best)
        checkpoints.claim = claim
        log = open_log(
            directory,
            t.report_to,
            run_name=t.run_name,
            project=t.project,
            config=absolute_paths(config),
            resume_step=step if resume else None,
        )
        rare = added_only(trained, model.component)
        log_at = every(t.logging_strategy, t.logging_steps, epoch, total)
        first = 1 if t.logging_first_step else 0
        watch = Watch(log, rate, epoch, lambda step: step == first or log_at(step), rare)
        save_at = every(t.save_strategy, t.save_steps, epoch, total)
        eval_at = every(t.eval_strategy, t.eval_steps, epoch, total, t.eval_delay)
        batches: Any = data.batches(place, feed.bytes_only)
        with (
            interruptible(mesh) as stop,  # until the last checkpoint is whole
            checkpoints,
            contextlib.closing(batches),
            (bar := Bar(doing, total, step, stop.asked.is_set)).drawn(),
            contextlib.closing(log),
        ):

            def evaluate(state: TrainState) -> None:
                assert held_out is not None
                with (
                    contextlib.suppress(Stopped),  # the evaluation stays pending
                    doing("evaluating", line=False),
                ):
                    found = evaluated(
                        config=config,
                        model=model,
                        encoder=encoder,
                        held_out=held_out,
                        losses=losses,
                        state=state,
                        frozen=frozen,
                        feed=feed,
                        check=stop.check,
                        answered=lambda done, of: doing.say(f"evaluating {done}/{of}"),
                    )
                    log.write_evaluation(step, found)
                    console.print(f"step {step}/{total}  {told(found)}", highlight=False)
                    watch.meter.leave_out(found["seconds"])
                    bar.leave_out(found["seconds"])
                    take(found)

            def take(found: dict[str, float]) -> None:
                nonlocal evaluation, patience, pending
                evaluation, pending = found, False
                if step > 0:  # the one on start is only shown
                    patience = patience and patience.after(found)

            def save(state: TrainState, candidate: bool = False) -> None:
                note = None if patience is None else patience.note
                found = evaluation if candidate and not pending else None
                checkpoints.save(step, state, place, found, note, pending)

            if pending:
                known = processes.gather("evaluated", log.evaluated(step))[0]
                if known is None:
                    evaluate(state)
                else:  # by a run that was killed before its next save
                    take(known)
                if best is not None and step > 0 and (save_at(step) or step == total):
                    save(state, candidate=True)
            while step < total and not stop.now() and not (patience and patience.over):
                if save_at(step + 1):  # or a kill in that step would cost the steps of two saves
                    checkpoints.finish()
                asked = time.perf_counter()
                batch, ids, place = next(batches)
                watch.meter.wait(time.perf_counter() - asked)
                state, metrics = run_step(state, frozen, feed(batch))
                watch.meter.leave_out(run_step.compiling)
                step += 1
                stop.step_done()
                bar.line(watch.push(step, ids, metrics, bool(batch.patch_segments.any())))
                bar.stepped(step, watch.newest, run_step.compiling)
                due = save_at(step) or step == total
                saving = due or stop.now()
                ends = step == total and (t.eval_strategy != "steps" or t.eval_delay <= step)
                pending = held_out is not None and (eval_at(step) or ends)
                if saving or pending or step == 1:
                    bar.line(
                        watch.flush()
                    )  # a broken step's checkpoint must not replace a good one
                # One that may be the best holds its value, and all hold what decides whether the
                # run stops early. One out of turn is no candidate, for a run that nobody stopped
                # would lack it. Others come before an evaluation, which takes time and may fail.
                candidate = due and best is not None
                later = pending and (candidate or patience is not None)
                if saving and not later:
                    save(state)
                if pending:
                    evaluate(state)
                if saving and later:
                    save(state, candidate)
            bar.line(watch.flush())
            save(state)

    outcome: dict[str, Any] = {"steps": step, "output": str(directory), "evaluation": evaluation}
    outcome["stopped_early"] = patience is not None and patience.over and step < total
    outcome["interrupted"] = (step < total or pending) and not outcome["stopped_early"]
    outcome["seconds"] = time.perf_counter() - start
    outcome["data"] = data.report
    known = processes.gather("skipped", [dataclasses.asdict(one) for one in data.skipped()])
    skipped = list({one["index"]: one for found in known for one in found}.values())
    if skipped and processes.is_primary():
        lines = "".join(json.dumps(one) + "\n" for one in skipped)
        (directory / "skipped.jsonl").write_text(lines, encoding="utf-8")
    for reason, count in outcome["data"]["dropped"].items():
        first = outcome["data"]["first_dropped"][reason]
        console.print(f"Left out {count} ({reason}): {first}", highlight=False, soft_wrap=True)
    if outcome["interrupted"]:
        where = places.checkpoints / str(step)
        unseen = ", before its evaluation" if pending else ""
        console.print(
            f"Stopped after step {step} of {total}{unseen}; saved '{where}'. Go on with --resume.",
            highlight=False,
            soft_wrap=True,
        )
        return outcome
    if patience is not None and outcome["stopped_early"]:
        console.print(
            f"Stopped early, after step {step} of {total}: {patience.waited} evaluations in a row "
            f"did not better the {patience.measure.metric}, {patience.best:.4f}, by more than "
            f"{patience.threshold:g}.",
            highlight=False,
            soft_wrap=True,
        )
    trainable, kept = state.result, "trainable" if state.ema is None else "ema"
    del state  # the moments make room for what is read
    if best is not None:
        trainable, outcome["best"] = _best_trainable(
            best, checkpoints, trainable, step, console, kept
        )
        if processes.is_primary():
            write_json(directory / "best.json", outcome["best"])
    elif processes.is_primary():
        (directory / "best.json").unlink(missing_ok=True)
    with result_half_written(places):
        result = write_result(model, join(trainable, frozen), directory, encoder)
    outcome["result"] = str(result)
    console.print(f"Wrote '{result}'.", highlight=False, soft_wrap=True)
    return outcome


def _best_trainable(
    best: Best, checkpoints: Checkpoints, last: Any, step: int, console: Console, kept: str
) -> tuple[Any, dict[str, Any]]:
    """Return (the best checkpoint's trainable leaves, {"step", "metric", "value"}), and say so.

    last: those of the last step, `step`, which are taken where no checkpoint has a value. kept:
    which leaves of a state they are, trainable or ema.
    """
    chosen = checkpoints.best_step
    if chosen is None:
        words = (
            f"Warning: no checkpoint was saved with a finite {best.metric} on held-out data: the "
            f"result is the last step's."
        )
        console.print(words, highlight=False, soft_wrap=True)
        return last, {"step": step, "metric": best.metric, "value": None}
    value = checkpoints.evaluations[chosen][best.metric]
    console.print(
        f"The result is step {chosen}'s: its {best.metric} on held-out data, {value:.4f}, is the "
        f"best of all checkpoints.",
        highlight=False,
        soft_wrap=True,
    )
    if chosen != step:
        last = checkpoints.restore_trainable(last, chosen, kept)
    return last, {"step": chosen, "metric": best.metric, "value": value}

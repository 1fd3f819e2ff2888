"""One training run from a config to an adapter on disk; reads from top to bottom."""

import contextlib
import dataclasses
import time
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from vlm_jax.config.specs import RunSpec
from vlm_jax.distributed import processes
from vlm_jax.files.atomic import write_json
from vlm_jax.sharding import row_parts, row_share
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.compile import (
    compile_largest_loss,
    compile_largest_step,
    out_of_memory_explained,
)
from vlm_jax.train.fingerprint import identity, settings_of
from vlm_jax.train.mesh import mesh_of, rows_of
from vlm_jax.train.metrics import Watch, added_only, evaluated, told, untrained
from vlm_jax.train.optimizer import OptimizerSettings, learning_rate, optimizer
from vlm_jax.train.placement import Feed, on_mesh
from vlm_jax.train.preemption import Stopped, interruptible
from vlm_jax.train.progress import Bar, Doing, closing_lines, opening_lines
from vlm_jax.train.results import write_result
from vlm_jax.train.run_dir import (
    Places,
    nothing_half_written,
    output_directory,
    places_of,
    result_half_written,
)
from vlm_jax.train.selection import (
    HELD_OUT,
    Best,
    Intervals,
    Patience,
    Standing,
    best_leaves,
    best_of,
    patience_of,
    total_steps,
)
from vlm_jax.train.setup import (
    absolute_paths,
    build,
    evaluates,
    evaluators_of,
    make_pipeline,
    objective_of,
    state_options,
    step_options,
)
from vlm_jax.train.step import init_state, make_step
from vlm_jax.train.trackers import (
    Lines,
    Profiler,
    check_reporters,
    open_log,
    print_report,
    say,
    write_skipped,
)
from vlm_jax.train.trainable import report, trainable_line
from vlm_jax.trees import flatten, join, split


@out_of_memory_explained()
def train(
    config: RunSpec | ConfigDict,
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
    config = RunSpec.of(config)
    places = places_of(config)
    check_reporters(config.training.report_to)
    best, patience = best_of(config), patience_of(config)
    if not processes.is_primary():  # the first process speaks for all
        console = Console(quiet=True)
    console = console or Lines()
    with output_directory(places, resume) as (resumes, warning):
        if warning is not None:
            say(console, warning)
        return _train(config, places, resumes, best, patience, console, verbose)


def _train(
    config: RunSpec,
    places: Places,
    resume: bool,
    best: Best | None,
    patience: Patience | None,
    console: Console,
    verbose: bool,
) -> dict:
    start, t, directory = time.perf_counter(), config.training, places.directory
    claim = places.claim() if places.in_bucket and processes.is_primary() else None
    processes.check_same("configs", settings_of(config))

    # Model and data
    mesh, named = mesh_of(config), evaluators_of(config)
    model, params, table, encoder = build(config, mesh)
    rows, share = rows_of(config, mesh), row_share(mesh)
    eval_rows = t.per_device_eval_batch_size * row_parts(mesh)
    data, held_out = make_pipeline(config, encoder, rows, share), None
    if evaluates(config):
        held_out = make_pipeline(config, encoder, eval_rows, share, training=False)
    total = total_steps(t.max_steps, t.num_train_epochs, data.steps_per_epoch)
    epoch = data.steps_per_epoch or total
    intervals = Intervals.of(
        t, epoch, total, held_out is not None, best, patience, config.evaluators
    )

    # Optimizer and state
    print_report(
        console, report(model, params, table, t.learning_rate), trainable_line(model, params, table)
    )
    for line in opening_lines(model, params, data, held_out, rows, total, mesh, verbose):
        say(console, line)
    trainable, frozen = split(params, table)
    trained = list(flatten(trainable))
    idle, warnings = untrained(model, trained, data.may_have_images, encoder.tokenizer)
    for line in warnings:
        say(console, line)
    settings = dataclasses.replace(OptimizerSettings.of(t), max_steps=total)
    still = [path for path in trained if model.component(path) in idle]
    tx = optimizer(trainable, table, settings, still)
    state = on_mesh(init_state(trainable, tx, t.seed, **state_options(config)), mesh)
    del params, trainable

    # Resume
    same = identity(config, model, table, rows)
    processes.check_same("data and base checkpoints", {**same, "shapes": data.shapes})
    checkpoints = None
    run = Standing(state, pending=t.eval_on_start and bool(intervals.evaluate), patience=patience)
    if resume:
        checkpoints = Checkpoints(places.checkpoints, same, t.save_total_limit, best)
        if checkpoints.steps:
            run.restore(checkpoints, bool(intervals.evaluate), lambda words: say(console, words))
        console.print(f"Resuming '{directory}' from step {run.step}.", highlight=False)
    del state

    # Compile: the largest shapes first, so that what cannot run fails now
    doing = Doing(console)
    step = make_step(model, tx, t.gradient_accumulation_steps, **step_options(config))
    run_step = compile_largest_step(
        step, model, run.state, frozen, data.shapes, rows, mesh, data.wider, doing
    )
    losses = held_out and compile_largest_loss(
        model, run.state, frozen, held_out.shapes, eval_rows, mesh,
        t.label_smoothing_factor, held_out.wider, doing, objective_of(config),
    )  # fmt: skip
    feed = Feed(encoder, mesh)

    # From here on things are written
    with contextlib.ExitStack() as opened:
        opened.enter_context(nothing_half_written(places))
        settings_told = absolute_paths(config)
        if processes.is_primary():
            write_json(directory / "config.json", settings_told)
        checkpoints = checkpoints or Checkpoints(places.checkpoints, same, t.save_total_limit, best)
        checkpoints.claim = claim
        log = open_log(
            directory, t.report_to, run_name=t.run_name, project=t.project, config=settings_told,
            resume_step=run.step if resume else None,
        )  # fmt: skip
        watch = Watch(
            log, learning_rate(settings), epoch, intervals.log, added_only(trained, model.component)
        )
        batches: Any = data.batches(run.place, feed.bytes_only)
        stop = opened.enter_context(interruptible(mesh))  # until the last checkpoint is whole
        opened.enter_context(checkpoints)
        opened.enter_context(contextlib.closing(batches))
        bar = Bar(doing, total, run.step, stop.asked.is_set)
        opened.enter_context(bar.drawn())
        opened.enter_context(contextlib.closing(log))
        profiler = opened.enter_context(Profiler(t.profile_steps, directory / "profile", console))

        # What is done at some steps
        def save(candidate: bool = False) -> None:
            checkpoints.save(run.step, run.state, run.place, *run.note(candidate))

        def evaluate(candidate: bool = False) -> None:
            due = intervals.evaluations(run.step)
            with (
                contextlib.suppress(Stopped),  # the evaluation stays pending
                doing("evaluating", line=False),
            ):
                found = evaluated(
                    config=config, model=model, encoder=encoder,
                    held_out=held_out if HELD_OUT in due else None, losses=losses,
                    named=[one for name, one in named.items() if name in due],
                    state=run.state, frozen=frozen, feed=feed, check=stop.check,
                    answered=lambda done, of: doing.say(f"evaluating {done}/{of}"),
                )  # fmt: skip
                log.write_evaluation(run.step, found)
                console.print(f"step {run.step}/{total}  {told(found)}", highlight=False)
                watch.meter.leave_out(found["seconds"])
                bar.leave_out(found["seconds"])
                run.take(found)

        actions = {"save": save, "evaluate": evaluate}
        hooks = [(profiler.at, profiler.toggle)]

        # The loop
        if run.pending:
            known = processes.gather("evaluated", log.evaluated(run.step))[0]
            if known is None:
                evaluate()
            else:  # by a run that was killed before its next save
                run.take(known)
            if best is not None and run.step > 0 and intervals.saves(run.step):
                save(candidate=True)
        profiler.start(run.step)
        while run.step < total and not stop.now() and not run.over:
            if intervals.save(run.step + 1):  # or a kill in it would cost the steps of two saves
                checkpoints.finish()
            asked = time.perf_counter()
            batch, ids, run.place = next(batches)
            watch.meter.wait(time.perf_counter() - asked)
            run.state, metrics = run_step(run.state, frozen, feed(batch))
            watch.meter.leave_out(run_step.compiling)
            run.step += 1
            stop.step_done()
            bar.line(watch.push(run.step, ids, metrics, bool(batch.patch_segments.any())))
            bar.stepped(run.step, watch.newest, run_step.compiling)
            due = intervals.due(run.step, stop.now())
            run.pending = "evaluate" in due.actions
            if due.actions or run.step == 1:  # a broken step's checkpoint must replace no good one
                bar.line(watch.flush())
            for action in due.actions:
                actions[action](due.candidate)
            for when, act in hooks:
                if when(run.step):
                    act(run.step)
        bar.line(watch.flush())
        save()

    # Results
    outcome: dict[str, Any] = {
        "steps": run.step,
        "output": str(directory),
        "evaluation": run.evaluation,
        "stopped_early": run.over and run.step < total,
        "seconds": time.perf_counter() - start,
        "data": data.report,
    }
    unfinished = run.step < total or run.pending
    outcome["interrupted"] = unfinished and not outcome["stopped_early"]
    write_skipped(directory / "skipped.jsonl", data.skipped())
    for line in closing_lines(outcome, run, places.checkpoints, total):
        say(console, line)
    if outcome["interrupted"]:
        return outcome
    trainable, kept = run.state.result, "trainable" if run.state.ema is None else "ema"
    step_now, run.state = run.step, None  # the moments make room for what is read
    if best is not None:
        trainable, outcome["best"], line = best_leaves(best, checkpoints, trainable, step_now, kept)
        say(console, line)
        if processes.is_primary():
            write_json(directory / "best.json", outcome["best"])
    elif processes.is_primary():
        (directory / "best.json").unlink(missing_ok=True)
    with result_half_written(places):
        result = write_result(model, join(trainable, frozen), directory, encoder)
    outcome["result"] = str(result)
    say(console, f"Wrote '{result}'.")
    return outcome

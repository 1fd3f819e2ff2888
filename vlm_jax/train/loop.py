"""One training run from a config to an adapter on disk; reads from top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from vlm_jax.config.specs import RunSpec
from vlm_jax.distributed import processes
from vlm_jax.files.atomic import write_json
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.compile import (
    Shapes,
    compile_largest_loss,
    compile_largest_step,
    keep_programs,
    out_of_memory_explained,
)
from vlm_jax.train.fingerprint import chosen_settings, identity, resumed, settings_of
from vlm_jax.train.mesh import mesh_of, policy_line, rows_of, with_policy
from vlm_jax.train.metrics import Watch, added_only, evaluated, untrained
from vlm_jax.train.optimizer import OptimizerSettings, learning_rate, optimizer
from vlm_jax.train.placement import Feed, on_mesh
from vlm_jax.train.preemption import Stopped, interruptible
from vlm_jax.train.progress import (
    Bar,
    Doing,
    Monitor,
    attention_line,
    closing_lines,
    opening_lines,
)
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
    best_of,
    patience_of,
    result_leaves,
)
from vlm_jax.train.setup import (
    RunData,
    absolute_paths,
    build,
    data_of,
    evaluators_of,
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
        if resumes:
            config, notes = resumed(config, places)
            for line in notes:
                say(console, line)
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
    start, directory = time.perf_counter(), places.directory
    claim = places.claim() if places.in_bucket and processes.is_primary() else None
    processes.check_same("configs", settings_of(config))

    # Model and data
    mesh, evaluators = mesh_of(config), evaluators_of(config)
    config, choice = with_policy(config, mesh)
    t = config.training
    kept = keep_programs(t.compilation_cache_dir, mesh.devices.flat[0].platform)
    model, params, table, encoder = build(config, mesh)
    data = data_of(config, encoder, mesh, rows_of(config, mesh))
    intervals = Intervals.of(
        t, data.epoch, data.total, data.held_out is not None, best, patience, config.evaluators
    )

    # Optimizer and state
    trainable, frozen = split(params, table)
    trained = list(flatten(trainable))
    idle, warnings = untrained(model, trained, data.training.may_have_images, encoder.tokenizer)
    print_report(
        console, report(model, params, table, t.learning_rate), trainable_line(model, params, table)
    )
    said = [] if choice is None else [policy_line(config, choice, mesh)]
    said += [] if kept is None else [kept]
    for line in (*opening_lines(model, params, data, mesh, verbose), *said, *warnings):
        say(console, line)
    settings = dataclasses.replace(OptimizerSettings.of(t), max_steps=data.total)
    still = [path for path in trained if model.component(path) in idle]
    tx = optimizer(trainable, table, settings, still)
    state = on_mesh(init_state(trainable, tx, t.seed, **state_options(config)), mesh)
    del params, trainable

    # Resume
    same = identity(config, model, table, data.rows)
    processes.check_same("data and base checkpoints", {**same, "shapes": data.training.shapes})
    chosen = chosen_settings(config)
    open_checkpoints = partial(
        Checkpoints, places.checkpoints, same, t.save_total_limit, best, chosen
    )
    checkpoints = open_checkpoints() if resume else None
    run = Standing(state, pending=t.eval_on_start and bool(intervals.evaluate), patience=patience)
    del state
    if checkpoints is not None:
        if checkpoints.steps:
            run.restore(checkpoints, bool(intervals.evaluate), partial(say, console))
        console.print(f"Resuming '{directory}' from step {run.step}.", highlight=False)

    # Compile: the largest shapes first, so that what cannot run fails now
    doing, feed = Doing(console), Feed(encoder, mesh)
    step = make_step(model, tx, t.gradient_accumulation_steps, **step_options(config))
    shapes = Shapes(data.rows, mesh, data.training.shapes, data.training.wider)
    run_step = compile_largest_step(step, model, run.state, frozen, shapes, doing)
    say(console, attention_line(run_step.attention))
    losses: Any = None
    if data.held_out is not None:
        shapes = Shapes(data.held_out_rows, mesh, data.held_out.shapes, data.held_out.wider)
        objective = partial(objective_of(config), label_smoothing=t.label_smoothing_factor)
        losses = compile_largest_loss(objective, model, run.state, frozen, shapes, doing)

    # From here on things are written
    with contextlib.ExitStack() as opened:
        opened.enter_context(nothing_half_written(places))
        written = absolute_paths(config)
        written["training"]["dropout_rng"] = model.dropout_rng  # whatever a later default is
        if processes.is_primary():
            write_json(directory / "config.json", written)
        checkpoints = checkpoints or open_checkpoints()
        checkpoints.claim = claim
        log = open_log(
            directory, t.report_to, run_name=t.run_name, project=t.project, config=written,
            resume_step=run.step if resume else None,
        )  # fmt: skip
        rare = added_only(trained, model.component)
        watch = Watch(log, learning_rate(settings), data.epoch, intervals.log, rare)
        batches: Any = data.training.batches(run.place, feed.bytes_only)
        stop = opened.enter_context(interruptible(mesh))  # until the last checkpoint is whole
        opened.enter_context(checkpoints)
        opened.enter_context(contextlib.closing(batches))
        monitor = Monitor(watch, Bar(doing, data.total, run.step, stop.asked.is_set))
        opened.enter_context(monitor.bar.drawn())
        opened.enter_context(contextlib.closing(log))
        profiler = opened.enter_context(Profiler(t.profile_steps, directory / "profile", console))

        # What is done at some steps
        def save(candidate: bool = False) -> None:
            checkpoints.save(run.step, run.state, run.place, *run.note(candidate))

        def evaluate(candidate: bool = False) -> None:
            due = intervals.evaluations(run.step)
            with contextlib.suppress(Stopped), doing("evaluating", line=False):  # or it is pending
                found = evaluated(
                    config=config, model=model, encoder=encoder, losses=losses,
                    held_out=data.held_out if HELD_OUT in due else None,
                    named={name: one for name, one in evaluators.items() if name in due},
                    state=run.state, frozen=frozen, feed=feed, check=stop.check,
                    answered=lambda done, of: doing.say(f"evaluating {done}/{of}"),
                )  # fmt: skip
                monitor.evaluated(run.step, found)
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
        while run.step < data.total and not stop.now() and not run.over:
            if intervals.save(run.step + 1):  # or a kill in it would cost the steps of two saves
                checkpoints.finish()
            batch, ids, run.place = monitor.next(batches)
            run.state, metrics = run_step(run.state, frozen, feed(batch))
            run.step += 1
            stop.step_done()
            images = bool(batch.patch_segments.any())
            monitor.step(run.step, ids, metrics, images, run_step.compiling)
            due = intervals.due(run.step, stop.now())
            run.pending = "evaluate" in due.actions
            if due.actions or run.step == 1:  # a broken step's checkpoint must replace no good one
                monitor.flush()
            for action in due.actions:
                actions[action](due.candidate)
            for when, act in hooks:
                if when(run.step):
                    act(run.step)
        monitor.flush()
        save()

    seconds = time.perf_counter() - start
    return _results(
        run, data, checkpoints, places, console, seconds,
        lambda trainable: write_result(model, join(trainable, frozen), directory, encoder),
    )  # fmt: skip


def _results(
    run: Standing,
    data: RunData,
    checkpoints: Checkpoints,
    places: Places,
    console: Console,
    seconds: float,
    write: Callable[[Any], Path],
) -> dict:
    """Report the end of a run and, unless it was interrupted, write what it results in."""
    outcome: dict[str, Any] = {
        "steps": run.step,
        "output": str(places.directory),
        "evaluation": run.evaluation,
        "stopped_early": run.over and run.step < data.total,
        "seconds": seconds,
        "data": data.training.report,
    }
    unfinished = run.step < data.total or run.pending
    outcome["interrupted"] = unfinished and not outcome["stopped_early"]
    write_skipped(places.directory / "skipped.jsonl", data.training.skipped())
    for line in closing_lines(outcome, run, places.checkpoints, data.total):
        say(console, line)
    if outcome["interrupted"]:
        return outcome
    trainable, chosen = result_leaves(run, checkpoints, partial(say, console))
    outcome |= {} if chosen is None else {"best": chosen}
    if processes.is_primary():
        best_file = places.directory / "best.json"
        best_file.unlink(missing_ok=True)
        if chosen is not None:
            write_json(best_file, chosen)
    with result_half_written(places):
        outcome["result"] = str(write(trainable))
    say(console, f"Wrote '{outcome['result']}'.")
    return outcome

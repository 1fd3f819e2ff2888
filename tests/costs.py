"""Processor time of every test, its child processes' included, and a limit on it.

Wall time depends on what else a machine does; processor time does less, and the limit grows with
what a known piece of work takes at that moment. Fixtures that several tests share are counted
apart, so that their cost does not fall on whichever test comes first.
Under pytest-xdist the workers measure and the controller reports.
"""

import os
import resource
import time

import pytest

# Seconds of processor time, for a test that is not marked nightly, where slowness()'s work takes
# KNOWN_WORK of them.
LIMIT = float(os.environ.get("VLM_JAX_TEST_LIMIT", "20"))
KNOWN_WORK = 0.12
SLOWEST = 10

# Tests (or shared fixtures) of the fast tier that may take longer: {name: why}.
MAY_BE_SLOW: dict[str, str] = {
    "fixture straight of tests": "the run that other tests resume; it compiles for them",
    "tests/test_loop.py::test_two_stages_projector_alone_then_lora": "two runs, two programs each",
    "tests/test_loop.py::test_an_evaluation_that_a_stop_meets_is_made_by_the_resumed_run": (
        "a straight, a stopped and a resumed run with evaluations"
    ),
    "tests/test_plan_command.py::test_the_head_is_gathered_once_however_many_chunks_of_the_loss_"
    "there_are[True-128-256]": "the TPU compiler takes 16 s for the least step",
    "tests/test_plan_command.py::test_arguments_of_4_bit_kernels_too": (
        "the TPU compiler takes 16 s for the least step"
    ),
    "tests/test_full_tuning.py::test_a_run_of_all_of_them_resumes_to_the_bit": (
        "three runs of a model that trains in full with all options of full training at once"
    ),
    "tests/test_processes.py::test_two_processes_train_stop_and_go_on_as_one_process_does": (
        "two processes start and compile, and this is the only test of several in the fast tier"
    ),
    "tests/test_export_spread.py::test_files_are_those_of_one_device[nf4-dq-True]": (
        "a run on four devices in 4 bits, and exports of it by four devices and by one"
    ),
    "tests/test_packing.py::test_packed_loss_and_gradients_are_those_of_rows_of_their_own"
    "[qwen2_vl]": "gradients of packed rows and of each example's own, a program each",
    "tests/test_packing.py::test_packed_loss_and_gradients_are_those_of_rows_of_their_own"
    "[llava]": "as of qwen2_vl",
    **{
        f"tests/test_packing.py::test_packed_loss_and_gradients_are_those_of_rows_of_their_own"
        f"[{family}]": "as of qwen2_vl"
        for family in ("qwen2_5_vl", "qwen3_vl", "gemma3")
    },
    **{
        f"tests/test_features.py::test_qlora_of_images_and_film_in_packed_rows[{family}]": (
            "a run in 4 bits, its export, and an answer of what it wrote"
        )
        for family in ("qwen2_5_vl", "qwen3_vl")
    },
    **{
        f"tests/test_meshes.py::test_every_mesh_gives_the_step_of_one_device[{case}]": (
            "a step in 4 bits on one device and on a mesh"
        )
        for case in (
            "qwen2_vl-nf4-dq-sizes0",
            "qwen2_5_vl-nf4-dq-sizes18",
            "qwen3_vl-nf4-dq-sizes23",
            "gemma3-nf4-dq-sizes26",
        )
    },
    "tests/parity/test_full_steps.py::test_ten_steps_of_all_weights[qwen3_vl]": (
        "ten steps of every weight here and in torch"
    ),
    "tests/test_features.py::test_gemma3_in_packed_rows": (
        "a run, its export, and an answer of what it wrote"
    ),
    "tests/parity/test_starts.py::test_what_4_bits_lose_is_less_in_every_layer[pissa_niter_4]": (
        "starts in 4 bits of every layer, each by SVDs"
    ),
    "tests/test_lora_run.py::test_starts": "runs of several starts and their exports",
    "tests/test_features.py::test_llava_in_4_bits_from_captions": (
        "a run and its export, in 4 bits, of the second family"
    ),
    "tests/test_recipe_yaml.py::test_the_recipe_trains_as_it_is": "a run of a whole recipe",
    "tests/test_quantization.py::test_merging_makes_dense_kernels_or_quantizes_again": (
        "programs of both merges and of the adapted and the merged model, at 4 bits"
    ),
}


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def slowness() -> float:
    """Return how many times longer work takes now than where the limit was chosen, at least 1."""
    start = time.process_time()
    sum(i * i for i in range(2_000_000))
    return max(1.0, (time.process_time() - start) / KNOWN_WORK)


class Costs:
    """A pytest plugin: measures, lists the slowest, and fails the run above the limit."""

    def __init__(self) -> None:
        self.started = 0.0
        self.fixtures: list[tuple[str, float]] = []  # shared ones that the current test set up
        self.seconds: dict[str, float] = {}
        self.over: dict[str, float] = {}  # the limit of each that took longer
        self.total = 0.0
        self.peak = 0.0  # GB, of the largest process
        self.nightly: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.started, self.fixtures = processor_seconds(), []
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        start, first = processor_seconds(), len(self.fixtures)
        result = yield
        if fixturedef.scope != "function":
            spent = processor_seconds() - start
            inner = sum(seconds for _, seconds in self.fixtures[first:])
            name = f"fixture {fixturedef.argname} of {fixturedef.baseid or 'conftest'}"
            self.fixtures.append((name, spent - inner))
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "teardown":
            whole = processor_seconds() - self.started
            own = whole - sum(seconds for _, seconds in self.fixtures)
            nightly = item.get_closest_marker("nightly") is not None
            whom = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            peak = max(resource.getrusage(who).ru_maxrss for who in whom) / 1e6
            limit = LIMIT * slowness() if max(own, whole - own) > LIMIT else LIMIT
            value = (own, nightly, self.fixtures, peak, limit)
            report.user_properties.append(("processor_seconds", value))
        return report

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name == "processor_seconds" and report.when == "teardown":
                own, nightly, fixtures, peak, limit = value
                self.peak = max(self.peak, peak)
                for test, seconds in [(report.nodeid, own), *fixtures]:
                    self.total += seconds
                    # A shared fixture is set up by each worker, and for each of its parameters.
                    self.seconds[test] = max(seconds, self.seconds.get(test, 0.0))
                    if seconds > limit:
                        self.over[test] = limit
                if nightly:
                    self.nightly |= {report.nodeid, *(fixture for fixture, _ in fixtures)}

    def too_slow(self) -> list[str]:
        """Return the names of what took longer than it may."""
        excused = self.nightly | MAY_BE_SLOW.keys()
        return [name for name in self.over if name not in excused]

    def pytest_sessionfinish(self, session, exitstatus):
        if not hasattr(session.config, "workerinput") and self.too_slow() and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, config):
        if hasattr(config, "workerinput"):  # of xdist: the controller has the rows of all
            return
        write = terminalreporter.write_line
        ordered = sorted(self.seconds.items(), key=lambda row: -row[1])
        if file := os.environ.get("VLM_JAX_TEST_COSTS"):  # every one of them, to sort and to sum
            with open(file, "a") as out:
                out.writelines(f"{seconds:.2f}\t{name}\n" for name, seconds in ordered)
        write(f"{self.total:,.0f} s of processor time, {self.peak:.1f} GB in one process at most.")
        write("The slowest:")
        for name, seconds in ordered[:SLOWEST]:
            write(f"{seconds:8.1f} s  {name}")
        for name in self.too_slow():
            write(
                f"FAILED {name}: {self.seconds[name]:.0f} s of processor time, more than "
                f"{self.over[name]:.0f}. Shorten it, mark it nightly and leave a small sibling, "
                f"or name it in MAY_BE_SLOW of tests/costs.py with the reason.",
                red=True,
            )

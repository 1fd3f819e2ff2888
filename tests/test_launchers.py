"""The files that start runs elsewhere: their shell, what they run, and the manifest's fields."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SHELL = sorted([*ROOT.glob("scripts/*.sh"), *LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# Fields of a JobSet (jobset.x-k8s.io/v1alpha2) and of the pods inside it that the manifest may
# use: {field: its own fields, [those of each item], a type, or dict for free names}.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": dict,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "resources": {"limits": dict, "requests": dict},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "nfs": {"server": str, "path": str}}],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "template": {"metadata": {"annotations": dict}, "spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def misfits(value, schema, path="$"):
    """Return what of a manifest its schema does not know."""
    if isinstance(schema, type):
        return [] if isinstance(value, schema) else [f"{path} is {value!r}, no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [m for i, v in enumerate(value) for m in misfits(v, schema[0], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path} is no map"]
    unknown = [f"{path}.{key} is unknown" for key in value.keys() - schema.keys()]
    known = value.keys() & schema.keys()
    return unknown + [m for k in known for m in misfits(value[k], schema[k], f"{path}.{k}")]


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_the_shell_is_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    lint = Path(sys.executable).with_name("shellcheck")
    command = [str(lint), "--shell=bash", "--exclude=SC1091", str(script)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_manifest_is_a_jobset_of_one_slice():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert misfits(manifest, JOBSET) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slice_,) = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert int(rows) * int(columns) == job["parallelism"] * chips == 16
    assert job["completions"] == job["parallelism"] and job["backoffLimit"] == 0
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    broken = json.loads(json.dumps(manifest).replace("parallelism", "paralelism"))
    assert any("paralelism is unknown" in one for one in misfits(broken, JOBSET))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Put programs on PATH that only write down how they are called; return a reader of that."""
    log = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name in ("gcloud", "scontrol", "scancel", "srun"):
        program = tmp_path / "bin" / name
        body = 'printf "%s\\n" "$(basename "$0") $*" >>"$CALLS"\n'
        if name == "srun":  # it ends when its processes do, and kills them where it is told to stop
            body = "trap 'echo killed >>\"$CALLS\"; exit 137' TERM\n" + body
            body += 'for _ in $(seq 600); do grep -q scancel "$CALLS" && exit 0; sleep 0.1; done\n'
        program.write_text(f"#!/usr/bin/env bash\n{body}")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(log))
    monkeypatch.setenv("NAME", "vlm")
    monkeypatch.setenv("ZONE", "us-west4-a")
    monkeypatch.setenv("SHARE", "10.0.0.2:/share")
    return lambda: log.read_text() if log.exists() else ""


def tpu_vm(*arguments):
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_slice_is_asked_for_trained_on_and_given_back(commands):
    for verb in ("create", "state", "stop", "delete"):
        assert tpu_vm(verb).returncode == 0
    asked, _, told, *_, gone = commands().splitlines()
    assert "queued-resources create vlm" in asked and asked.endswith("--spot")
    assert "--accelerator-type=v5litepod-16" in asked and "--zone=us-west4-a" in asked
    assert "--worker=0" in told and "pkill -TERM" in told
    assert "queued-resources delete vlm" in gone and "--force" in gone


def test_every_host_gets_the_same_command_quoted(commands):
    done = tpu_vm("train", "--config=share/run.yaml", "--config.training.run_name=two words")
    assert done.returncode == 0, done.stderr
    call = commands()
    assert "--worker=all" in call
    line = next(one for one in call.splitlines() if "vlm-jax train" in one)
    assert r"--config.training.run_name=two\ words" in line
    assert re.search(r"</dev/null &\s*$", call)  # it outlives the connection


def test_what_is_missing_is_said(commands, monkeypatch):
    assert tpu_vm("creat").returncode == 2 and "tpu_vm.sh create" in tpu_vm("creat").stderr
    monkeypatch.delenv("SHARE")
    assert tpu_vm("setup").returncode == 0 and "if [ -n '' ] && " in commands()  # no share
    monkeypatch.delenv("NAME")
    before = commands()
    done = tpu_vm("create")
    assert done.returncode != 0 and "set NAME" in done.stderr and commands() == before


def test_a_job_whose_time_is_up_is_stopped_and_goes_back_to_the_queue(commands, tmp_path):
    environment = {**os.environ, "SLURM_JOB_ID": "17", "VENV": "/opt/venv"}
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "run.yaml"], env=environment
    )
    try:
        while "srun" not in commands():
            assert job.poll() is None
            time.sleep(0.01)
        job.terminate()
        assert job.wait(60) == 0
    finally:
        job.kill()
    started, told, requeued = commands().splitlines()
    assert started == (
        "srun --kill-on-bad-exit=1 /opt/venv/bin/vlm-jax train --resume=auto --config run.yaml"
    )
    assert (told, requeued) == ("scancel --signal=TERM 17", "scontrol requeue 17")

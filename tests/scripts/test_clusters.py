"""The files for Kubernetes and SkyPilot: fields that exist, commands that the launcher understands."""

from pathlib import Path

import pytest
import yaml

from tests import pairset

ROOT = Path(__file__).parents[2]
SERVICE = {"clusterIP": str, "selector": dict}
JOB = {
    **{"completions": int, "parallelism": int, "completionMode": str, "template": dict},
    **{"backoffLimit": int, "backoffLimitPerIndex": int},
}
POD = {
    **{"subdomain": str, "restartPolicy": str, "terminationGracePeriodSeconds": int},
    **{"containers": list, "volumes": list},
}
CONTAINER = {
    **{"name": str, "image": str, "workingDir": str, "command": list, "args": list, "env": list},
    **{"ports": list, "resources": dict, "volumeMounts": list},
}
TASK = {  # of SkyPilot
    **{"name": str, "num_nodes": int, "resources": dict, "envs": dict, "file_mounts": dict},
    **{"setup": str, "run": str},
}


def fits(values, kinds):
    """Check that each field is one of a kind's, of the right type."""
    assert values
    for key, value in values.items():
        assert isinstance(value, kinds[key]), key


def launched(script, folder, **environment):
    """Return what the launcher makes of a script."""
    from accelerate.commands.launch import launch_command_parser

    programs = folder / "bin"
    programs.mkdir()
    (programs / "accelerate").write_text('#!/bin/sh\nexec python "$@"\n')
    (programs / "accelerate").chmod(0o755)
    script = f'PATH="{programs}:$PATH"\n' + script.replace("cd /work\n", "")
    (words,) = pairset.words_in_shell(script, folder, **environment)
    program, launch, *words = words
    assert (program, launch) == ("python", "launch")
    return launch_command_parser().parse_args(words)


@pytest.mark.parametrize("name", ["train", "pairs"])
def test_the_jobs_of_kubernetes(name, tmp_path):
    parts = list(yaml.safe_load_all((ROOT / f"scripts/kubernetes/{name}.yaml").read_text()))
    kinds = [(part["apiVersion"], part["kind"]) for part in parts]
    assert kinds == [("v1", "Service"), ("batch/v1", "Job")][2 - len(parts) :]
    job = parts[-1]["spec"]
    fits(job, JOB)
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    fits(pod, POD)
    (container,) = pod["containers"]
    fits(container, CONTAINER)
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    (script,) = container["args"]
    if name == "pairs":
        (words,) = pairset.words_in_shell(script, tmp_path)
        assert words == ["flowmatch", "pairs", "NAME"]
        return
    fits(parts[0]["spec"], SERVICE)
    service = parts[0]["metadata"]["name"]
    assert parts[0]["spec"]["selector"] == {"job-name": parts[1]["metadata"]["name"]}
    assert pod["subdomain"] == service
    call = launched(script, tmp_path, JOB_COMPLETION_INDEX="1")
    assert (call.machine_rank, call.num_machines) == (1, job["completions"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert call.num_processes == gpus * job["completions"]
    assert call.main_process_ip == f"{parts[1]['metadata']['name']}-0.{service}"
    assert call.main_process_port == container["ports"][0]["containerPort"]
    assert (call.module, call.training_script) == (True, "flowmatch.pipelines.reflow")


def test_the_task_of_skypilot(tmp_path):
    task = yaml.safe_load((ROOT / "scripts/skypilot/train.yaml").read_text())
    fits(task, TASK)
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1"}
    environment |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    call = launched(task["run"], tmp_path, **environment, **task["envs"])
    assert (call.machine_rank, call.num_machines, call.num_processes) == (1, 2, 16)
    assert (call.main_process_ip, call.main_process_port) == ("10.0.0.7", 29500)
    assert call.training_script == "flowmatch.pipelines.reflow"
    assert call.training_script_args == ["my_flux"]
    assert task["resources"]["ports"] == 29500

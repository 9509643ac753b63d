"""Launching in containers: command lines, refusals, the image's recipe, and the Kubernetes example against the API."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from launch import container, start
from launch.container import Container
from launch.folder import Attempt, LaunchFolder, Plan
from moe.errors import LaunchError

LAUNCH = Path(start.__file__).parent


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH to put commands in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _tool(folder: Path, name: str, said: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{said}'\n")
    (folder / name).chmod(0o755)


def test_a_container_is_run_by_what_the_cluster_has(tools: Path) -> None:
    _tool(tools, "srun", "--mem=MB")
    _tool(tools, "apptainer", "")
    assert container.find("docker://turnout", None, "python3", ()).runtime == "apptainer"
    _tool(tools, "srun", "--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH")
    assert container.find("turnout", None, "python3", ()).runtime == "pyxis"
    assert container.find("turnout", "apptainer", "python3", ()).runtime == "apptainer"


@pytest.mark.parametrize(
    ("image", "runtime", "mounts", "said"),
    [
        ("turnout", None, (), "neither pyxis .* nor apptainer is here"),
        ("turnout", "pyxis", (), "but pyxis is not here"),
        ("gone.sif", "apptainer", (), "gone.sif, which is not there"),
        ("turnout", "apptainer", ("data",), "--container-mount is data"),
    ],
)
def test_a_container_that_cannot_be_run_is_refused_with_the_way_out(
    image: str, runtime: container.Runtime | None, mounts: tuple[str, ...], said: str, tools: Path
) -> None:
    if runtime == "apptainer":
        _tool(tools, "apptainer", "")
    with pytest.raises(LaunchError, match=said.replace("but pyxis is not here", "but pyxis is not here")):
        container.find(image, runtime, "python3", mounts)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    where = Container("turnout.sqsh", "pyxis", "python3", ("/data",))
    return Plan("slurm", "/runs/a", "/project", "/venv/bin/python", 2, 4, container=where)


def test_an_agent_starts_inside_and_sees_the_run_the_recipe_and_the_data(plan: Plan) -> None:
    attempt = Attempt(1, "t", ("a", "b"), 0.0, 0)
    folder = LaunchFolder(Path(plan.run_folder))
    (pyxis,) = start.commands(folder, plan, attempt)
    assert {
        "--container-image=turnout.sqsh",
        "--container-mounts=/project:/project,/runs/a:/runs/a,/data:/data",
        "--container-workdir=/project",
    } <= set(pyxis)
    agent = ["python3", "-u", "-m", "launch.agent", "/runs/a", "--attempt", "1"]
    assert pyxis[-len(agent) :] == agent
    where = replace(plan.container, runtime="apptainer", image="t.sif")  # type: ignore[type-var]
    (apptainer,) = start.commands(folder, replace(plan, container=where), attempt)
    assert shlex.join(apptainer).endswith(
        f"apptainer exec --nv --bind /project,/runs/a,/data --pwd /project t.sif {shlex.join(agent)}"
    )


def test_a_plan_with_a_container_is_read_as_it_was_written(plan: Plan, tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path)
    folder.home.mkdir()
    folder.write_plan(plan)
    assert folder.plan() == plan


def test_variables_that_name_the_hosts_folders_stay_outside() -> None:
    given = {
        "PATH": "/a",
        "PYTHONPATH": "/b",
        "LD_LIBRARY_PATH": "/c",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
    }
    assert set(container.without_the_hosts(given)) == {"NCCL_DEBUG", "OMP_NUM_THREADS"}


def test_all_that_the_image_takes_from_the_repository_is_there() -> None:
    page = (LAUNCH / "Containerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+)$", page, re.MULTILINE) for name in line.split()[:-1]]
    assert {"moe", "data_prep", "launch", "pyproject.toml", "requirements.lock"} <= set(copied)
    assert [name for name in copied if not (LAUNCH.parent / name).exists()] == []


class _Page(BaseModel):
    """A part of an object of Kubernetes: unknown fields, which the API server would drop or refuse, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


Name = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)


class _Port(_Page):
    containerPort: int = Field(ge=1, le=65535)


class _Mount(_Page):
    name: str = Name
    mountPath: str
    readOnly: bool = False


class _Resources(_Page):
    limits: dict[str, int | str]
    requests: dict[str, int | str] = {}


class _Container(_Page):
    name: str = Name
    image: str
    workingDir: str
    command: list[str]
    args: list[str]
    ports: list[_Port]
    resources: _Resources
    volumeMounts: list[_Mount]


class _Claim(_Page):
    claimName: str


class _EmptyDir(_Page):
    medium: Literal["", "Memory", "HugePages"]
    sizeLimit: str = Field(pattern=r"^[0-9]+(Ki|Mi|Gi|Ti)?$")


class _Volume(_Page):
    name: str = Name
    persistentVolumeClaim: _Claim | None = None
    emptyDir: _EmptyDir | None = None


class _PodSpec(_Page):
    restartPolicy: Literal["Never", "OnFailure"]  # what a Job allows
    terminationGracePeriodSeconds: int = Field(ge=0)
    containers: list[_Container]
    volumes: list[_Volume]


class _Pod(_Page):
    spec: _PodSpec


class _JobSpec(_Page):
    parallelism: int = Field(ge=0)
    completions: int = Field(ge=0)
    completionMode: Literal["NonIndexed", "Indexed"]
    backoffLimit: int = Field(ge=0)
    template: _Pod


class _Job(_Page):
    spec: _JobSpec


class _ReplicatedJob(_Page):
    name: str = Name
    replicas: int = Field(ge=0)
    template: _Job


class _Network(_Page):
    enableDNSHostnames: bool
    subdomain: str | None = None
    publishNotReadyAddresses: bool | None = None


class _FailurePolicy(_Page):
    maxRestarts: int = Field(ge=0)
    restartStrategy: Literal["Recreate", "BlockingRecreate"] = "Recreate"


class _Spec(_Page):
    network: _Network
    failurePolicy: _FailurePolicy
    replicatedJobs: list[_ReplicatedJob]


class _Metadata(_Page):
    name: str = Name


class JobSet(_Page):
    """jobset.x-k8s.io/v1alpha2, as api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset has it."""

    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: _Metadata
    spec: _Spec


def test_the_kubernetes_example_fits_the_api_and_itself() -> None:
    page = JobSet.model_validate(yaml.safe_load((LAUNCH / "jobset.yaml").read_text()))
    (jobs,) = page.spec.replicatedJobs
    job = jobs.template.spec
    (train,) = job.template.spec.containers
    words = shlex.split(train.args[0])
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    # A pod is called JOBSET-JOB-REPLICA-INDEX, in the domain of the JobSet's service.
    assert options["master-addr"] == f"{page.metadata.name}-{jobs.name}-0-0.{page.metadata.name}"
    assert int(options["nnodes"]) == job.parallelism == job.completions
    assert job.completionMode == "Indexed"
    assert int(options["nproc-per-node"]) == train.resources.limits["nvidia.com/gpu"]
    assert int(options["master-port"]) == train.ports[0].containerPort
    assert {mount.name for mount in train.volumeMounts} == {
        volume.name for volume in job.template.spec.volumes
    }
    assert words[words.index("-m") + 1] == "moe.train"

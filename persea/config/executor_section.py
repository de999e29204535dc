"""The section `executor`: where units of work run. It changes no result, so no hash holds it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from persea.config.section import RecipeSection, check_contradictions


class ExecutorSection(RecipeSection):
    """Where models answer in capture and evaluation: here, in several processes, or on Ray."""

    kind: Literal["local", "ray"] = Field(
        default="local",
        description="local = on this machine; ray = actors on a Ray cluster (`pip install "
        "'persea[ray]'`)",
    )
    workers: int = Field(
        default_factory=lambda seen: 0 if seen["kind"] == "ray" else 1,
        ge=0,
        le=65536,
        validate_default=True,
        description="processes that hold a model each; 1 with `kind: local` = this process "
        "alone; 0 with `kind: ray` = as many as the cluster has room for, while nodes come and go",
    )
    address: str = Field(
        default="",
        pattern=r"^(auto|[A-Za-z0-9_.-]+:[0-9]{1,5}|ray://[A-Za-z0-9_.-]+:[0-9]{1,5})?$",
        description="address of the head of a Ray cluster, HOST:PORT, or auto = the cluster of "
        "this node; empty = a cluster of this machine alone, on the loopback interface",
    )
    cpus_per_worker: float = Field(
        default=1, ge=0, le=4096, description="CPUs that Ray reserves for a worker"
    )
    gpus_per_worker: float = Field(
        default=0, ge=0, le=64, description="GPUs that Ray reserves for a worker"
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=100,
        description="attempts at a unit, with several workers, before the run leaves it in "
        "quarantine and ends with exit code 5",
    )
    min_timeout_s: float = Field(
        default=60,
        gt=0,
        le=604800,
        description="an attempt is cancelled after 5 times the median of its teacher's units, and "
        "never before so many seconds",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="use a cluster of several machines although it does not ask for a token: "
        "whoever reaches its port runs code on all of them",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        ray_keys = ("address", "cpus_per_worker", "gpus_per_worker", "allow_unauthenticated")
        return check_contradictions(
            self,
            *(
                (
                    self.kind == "local" and key in self.model_fields_set,
                    (key,),
                    "given, but `kind` is local",
                    f"write `kind: ray`, or delete `{key}:`",
                )
                for key in ray_keys
            ),
            (
                self.kind == "local" and self.workers == 0,
                ("workers",),
                "0, but `kind` is local",
                "write at least 1",
            ),
        )

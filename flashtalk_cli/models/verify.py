"""Check a model folder against what this program expects, without loading it."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models.folder import COMPONENTS, Component, ModelFolder
from flashtalk_cli.models.tensors import Difference
from flashtalk_cli.models.weights import plan_of


@dataclass(frozen=True)
class ComponentReport:
    """What `verify_folder` found of a component. `problem` is one line; empty when all is well."""

    component: Component
    files: list[str]
    n_tensors: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)  # "NAME [is] instead of [should be]"
    problem: str = ""


def verify_folder(folder: ModelFolder) -> list[ComponentReport]:
    """Check every component's tensor names and shapes against what this program expects.

    Reads headers, loads nothing. The tensors' values are not looked at.
    """
    return [_verify(folder, component) for component in COMPONENTS]


def _verify(folder: ModelFolder, component: Component) -> ComponentReport:
    names: list[str] = []
    try:
        names = [path.name for path in folder.files(component)]
        n_tensors, difference = _compare(folder, component)
    except ModelError as error:
        return ComponentReport(component, names, 0, problem=str(error))
    return ComponentReport(
        component,
        names,
        n_tensors,
        difference.missing,
        difference.unexpected,
        difference.misshapen,
        problem=str(difference) if difference else "",
    )


def _compare(folder: ModelFolder, component: Component) -> tuple[int, Difference]:
    """Number of tensors in a component's files, and how they differ from what is expected.

    Reads headers only. Raises ModelError for files that are absent or broken.
    """
    plan = plan_of(folder, component, random=False)
    assert plan.source is not None
    found = plan.source.shapes
    return len(found), Difference.of(found, plan.layout.shapes(plan.module))

"""`dllm-sparse doctor`: what is here, whether it computes correctly, and the text for a bug report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.output import Output
from dllm_sparse.types import SelfTestFailed

_SCHEMA = "dllm-sparse/doctor@1"


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Run the checks (under a minute), or only look.")
    ] = True,
    as_json: opt.JsonOpt = False,
    quiet: opt.QuietOpt = False,
) -> None:
    """Look at this installation, test it, and print what belongs in a bug report.

    No host name is printed, and the home folder is written as ~. Exit code 1 when a check fails.
    """
    from dllm_sparse.doctor.environment import environment
    from dllm_sparse.doctor.self_test import self_test as run_checks

    output = Output(as_json=as_json, quiet=quiet)
    facts, outcomes = environment(), []
    if not as_json:
        for name, value in _environment_rows(facts):
            output.answer(f"{name:<13} {value}")
    for outcome in run_checks() if self_test else ():
        outcomes.append(outcome.to_dict())
        if not as_json:
            output.answer(_check_line(outcomes[-1]))
    failed = [outcome for outcome in outcomes if outcome["outcome"] == "failed"]
    if as_json:
        output.json({"schema": _SCHEMA, "environment": facts, "checks": outcomes, "passed": not failed})
    else:
        output.answer(f"{'self-test':<13} {_verdict(outcomes)}")
        output.say("Paste the text above into a bug report, with the command that went wrong.")
    if failed:
        raise SelfTestFailed("; ".join(f"{one['name']} on {one['device']}: {one['detail']}" for one in failed))


def _environment_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    versions = dict(facts["versions"])
    revision = f" ({facts['git_revision']})" if facts["git_revision"] else ""
    yield "dllm-sparse", f"{versions.pop('dllm_sparse')}{revision}"
    yield "python", f"{versions.pop('python')} on {facts['system']}"
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    yield "torch", f"{versions.pop('torch')}, {built}"
    yield "packages", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    cpu = facts["cpu"]
    yield "cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']}{_gigabytes(cpu['memory_bytes'])}"
    for index, gpu in enumerate(facts["gpus"]):
        memory = _gigabytes(gpu["memory_bytes"])
        yield f"cuda:{index}", f"{gpu['name']} ({gpu['capability']}){memory}, kernel tiles {gpu['tiles']}"
    for number, backend in enumerate(facts["backends"]):
        here = "yes" if backend["available"] else "no "
        yield "" if number else "backends", f"{backend['name']:<13} {here}  {backend['reason']}"
    for number, folder in enumerate(facts["folders"]):
        there = "" if folder["exists"] else " (not there yet)"
        yield "" if number else "folders", f"{folder['name']:<13} {folder['path']}{there}"
    yield "hub", "offline (HF_HUB_OFFLINE)" if facts["offline"] else "asked when a model is not here"
    yield "variables", ", ".join(f"{name}={value}" for name, value in facts["variables"].items()) or "none of ours set"


def _gigabytes(size: int | None) -> str:
    return f", {size / 2**30:.1f} GiB" if size else ""


def _check_line(one: dict[str, Any]) -> str:
    return f"{one['outcome']:<13} {one['name'] + ' on ' + one['device']:<27} {one['seconds']:>4.1f} s  {one['detail']}"


def _verdict(outcomes: list[dict[str, Any]]) -> str:
    counts = {kind: sum(one["outcome"] == kind for one in outcomes) for kind in ("passed", "skipped", "failed")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"{said} in {sum(one['seconds'] for one in outcomes):.0f} s" if outcomes else "not run (--no-self-test)"

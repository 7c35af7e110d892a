"""`flashtalk doctor`: what this machine has of what a render needs, and which preset fits it."""

from __future__ import annotations

from typing import Annotated

import typer

from flashtalk_cli.cli.options import REPORT, Debug, flag

MARKS = {"good": ("ok", "green"), "note": ("--", "yellow"), "bad": ("no", "red")}


def doctor(
    json: Annotated[bool, flag("--json", REPORT, "Print the findings as JSON.")] = False,
    quick: Annotated[
        bool, flag("--quick", REPORT, "Leave out the speed, which takes as long to measure as all the rest.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check this machine: ffmpeg, torch, GPUs, attention kernels, disk, models, which preset fits, and speed."""
    from dataclasses import asdict
    from json import dumps

    from flashtalk_cli.cli.display import one_line
    from flashtalk_cli.cli.machine import examine, probe
    from flashtalk_cli.cli.pace import pace, rehearse
    from flashtalk_cli.errors import FlashtalkError

    seen = probe()
    findings = examine(seen)
    if "error" not in seen:
        findings.append(pace(None if quick else rehearse()))
    if json:
        typer.echo(dumps({"findings": [asdict(finding) for finding in findings], "probe": seen}, indent=2))
    else:
        for finding in findings:
            mark, colour = MARKS[finding.state]
            typer.echo(f"{typer.style(mark, fg=colour)}  {finding.topic:<10} {one_line(finding.text)}")
    bad = [finding.topic for finding in findings if finding.state == "bad"]
    if bad:
        raise FlashtalkError(
            f"nothing can be rendered on this machine yet: see {', '.join(dict.fromkeys(bad))}"
        )

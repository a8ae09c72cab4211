"""The command lines in pods are command lines of the programs: every flag exists, every value is taken."""

import pytest
from click import Command, Context

from coordinator.cli import coordctl
from coordinator.discovery.target import DnsTarget, LeaseTarget, ServiceTarget, read_lease, read_target
from shardworker.cli import shardworker
from tests.helm.chart import Rendered, containers, render
from tests.helm.matrix import CASES

PROGRAMS = {"coordctl": coordctl, "shardworker": shardworker}


def command_of(program: str, name: str) -> Command:
    group = PROGRAMS[program]
    command = group.get_command(Context(group), name)
    assert command
    return command


def flags_of(command: Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def command_lines(rendered: Rendered) -> list[list[str]]:
    lines = [
        [*container["command"], *container["args"]]
        for _, template in rendered.workloads()
        for container in containers(template["spec"])
        if container["command"][0] in PROGRAMS
    ]
    assert len(lines) >= 2
    return lines


@pytest.mark.parametrize("case", CASES)
def test_the_programs_take_their_command_lines(case: str) -> None:
    for program, name, *arguments in command_lines(render(CASES[case])):
        command = command_of(program, name)
        # In full: click would take the beginning of a flag for it.
        assert {argument.partition("=")[0] for argument in arguments} <= flags_of(command)
        # Parses, checks types and choices, runs nothing.
        command.make_context(name, arguments)


@pytest.mark.parametrize("case", CASES)
def test_discovery_takes_what_it_is_told(case: str) -> None:
    # As kubelet writes it into the command line.
    arguments = [argument.replace("$(POD_NAMESPACE)", "models") for argument in render(CASES[case]).arguments("coordinator")]
    given = dict(argument.partition("=")[::2] for argument in arguments)
    target = read_target(given["--discover"])
    if "--lease" in given:
        assert target == ServiceTarget("models", "mesh-workers", 7001)
        assert read_lease(given["--lease"]) == LeaseTarget("models", "mesh-coordinator")
    else:
        assert target == DnsTarget("mesh-workers", 7001)

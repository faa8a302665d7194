"""What is wrong with a pod. Pure.

A container that exits is in trouble from its first exit until it is ready, or until it has run
RECOVERED_AFTER_S longer than the run that failed. It is crash looping (`_is_looping`) if it has
exited twice and the last run was short or never became ready. A crash loop outlasts readiness:
its trouble ends when a run has lasted RECOVERED_AFTER_S, which is when the kubelet resets its own
back-off. The reported trouble therefore stays the same while the container waits, runs and exits.
"""

from __future__ import annotations

import math
import re

import msgspec

from kubeai.operator.pod_object import ContainerStatus, Exit, PodObject, Status, Waiting, seconds

MESSAGE_MAX_CHARS = 500
OUTPUT_MAX_CHARS = 500  # of a container's last lines
RECOVERED_AFTER_S = 600.0  # of running, after which the kubelet's back-off restarts at 10 s

# Waiting reasons that are not a trouble, unless they have a message.
_STARTING = ("", "ContainerCreating", "PodInitializing")
# Exits caused by the node rather than by the container.
_NODE_EXITS = ("ContainerStatusUnknown", "KubeletStopped")
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # terminal colours and cursor movements
_NONE: tuple[None, float] = None, math.inf


class Trouble(msgspec.Struct, frozen=True):
    """What is wrong with a pod. ``reason`` is one word."""

    reason: str
    message: str
    output: str = ""  # the container's last lines, for cluster operators, not for API clients

    @property
    def text(self) -> str:
        """The message and the container's last lines."""
        return f"{self.message}: {self.output}" if self.output else self.message


def trouble_of(obj: PodObject, ready: bool) -> tuple[Trouble | None, float]:
    """The pod's trouble, and the Unix time at which it ends if the container keeps running.

    If several containers are in trouble, the one whose trouble lasts longest.
    """
    status = obj.status
    if not ready:
        trouble = _pod_trouble(status)
        if trouble is not None:
            return trouble, math.inf
    if status.phase in ("Succeeded", "Failed"):
        return _NONE
    found = [
        (trouble, until_s)
        for container in (*status.init_container_statuses, *status.container_statuses)
        for trouble, until_s in (_container_trouble(obj, container),)
        if trouble is not None
    ]
    return max(found, key=lambda one: one[1]) if found else _NONE


def _pod_trouble(status: Status) -> Trouble | None:
    if status.phase == "Failed":
        return Trouble(_word(status.reason) or "Failed", status.message[:MESSAGE_MAX_CHARS])
    for condition in status.conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            reason = _word(condition.reason) or "Unschedulable"
            return Trouble(reason, condition.message[:MESSAGE_MAX_CHARS])
    return None


def _container_trouble(obj: PodObject, container: ContainerStatus) -> tuple[Trouble | None, float]:
    waiting = container.state.waiting
    if waiting is not None and waiting.reason != "CrashLoopBackOff":
        trouble = _waiting_trouble(container.name, waiting)
        if trouble is not None:
            return trouble, math.inf
    last = _last_exit(obj, container)
    looping = _is_looping(obj, container, last)
    if last is None:
        message = f"container {container.name} keeps exiting; see its logs"
        return (Trouble("CrashLoopBackOff", message), math.inf) if looping else _NONE
    if container.ready and not looping:
        return _NONE
    until_s = math.inf
    if container.state.running is not None and container.state.running.started_at is not None:
        until_s = container.state.running.started_at.timestamp() + RECOVERED_AFTER_S
        until_s += 0.0 if container.ready else last.ran_s  # it may fail at the same point again
    return _exit_trouble(container.name, last, looping), until_s


def _waiting_trouble(name: str, waiting: Waiting) -> Trouble | None:
    if waiting.reason in _STARTING and not waiting.message:
        return None
    if waiting.reason in ("ErrImagePull", "ImagePullBackOff"):  # the kubelet alternates them
        return Trouble("ImagePullBackOff", f"the image of container {name} cannot be pulled")
    return Trouble(_word(waiting.reason) or "Waiting", waiting.message[:MESSAGE_MAX_CHARS])


def _exit_trouble(name: str, last: Exit, looping: bool) -> Trouble:
    output = _last_lines(last.message)
    if last.reason == "OOMKilled":
        return Trouble("OOMKilled", f"container {name} ran out of memory", output)
    if looping:  # the kubelet's own message includes the back-off, so it would keep changing
        reason, message = "CrashLoopBackOff", f"keeps exiting (exit code {last.exit_code})"
    else:
        reason = "ContainerExited"
        message = f"exited (exit code {last.exit_code}) and is restarting"
    hint = "" if output else "; see its logs"
    return Trouble(reason, f"container {name} {message}{hint}", output)


def _last_exit(obj: PodObject, container: ContainerStatus) -> Exit | None:
    """The container's last exit, if the container itself failed."""
    last = container.state.terminated or container.last_state.terminated
    if last is None or last.reason in _NODE_EXITS or obj.metadata.deletion_timestamp is not None:
        return None
    may_end = obj.spec.restart_policy != "Always" or container in obj.status.init_container_statuses
    return None if may_end and last.exit_code == 0 else last


def _is_looping(obj: PodObject, container: ContainerStatus, last: Exit | None) -> bool:
    """Whether it has failed at least twice, and the last run was short or never became ready."""
    waiting = container.state.waiting
    if waiting is not None and waiting.reason == "CrashLoopBackOff":
        return True
    exits = container.restart_count + (container.state.running is None)
    if last is None or exits < 2:
        return False
    if last.ran_s < RECOVERED_AFTER_S:
        return True
    # Ready became False when the last run ended if that run was ready, otherwise before it began.
    since_s = max(
        (seconds(c.last_transition_time) for c in obj.status.conditions if c.type == "Ready"),
        default=0.0,
    )
    return not container.ready and since_s <= seconds(last.started_at)


def _last_lines(message: str) -> str:
    """The end of a termination message as one line of printable characters."""
    lines = (" ".join(line.split()) for line in _ESCAPES.sub("", message).splitlines())
    text = " | ".join(line for line in lines if line)
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= OUTPUT_MAX_CHARS else "…" + text[1 - OUTPUT_MAX_CHARS :]


def _word(reason: str) -> str:
    """The reason reduced to the characters conditions allow: letters, digits, ``_,:``."""
    return "".join(c for c in reason if c.isascii() and (c.isalnum() or c in "_,:")).strip("_,:")

"""Decoding steps as CUDA graphs: a step is thousands of small launches, a replay is one.

A step that draws no random numbers and writes only to tensors at fixed addresses can be captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_EAGER_STEPS = 2  # before a capture: libraries allocate and compile when they are first called


class GraphedSteps:
    """Makes steps that run as CUDA graphs, until one cannot."""

    def __init__(self, device: torch.device, on_message: Callable[[str], None]):
        """Take the GPU, and who is told, once, that steps stay eager."""
        self.on_message = on_message
        self.refused = False
        self.stream = torch.cuda.Stream(device)  # one for all: cuBLAS keeps a workspace for each

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what `step` does; its graph lives as long as it."""
        return step if self.refused else _GraphedStep(step, self)

    def refuse(self, reason: str) -> None:
        """Stay eager from now on."""
        self.refused = True
        self.on_message(f"cuda_graph: decoding steps run one kernel at a time, since {reason}")


class _GraphedStep:
    """A step that runs eagerly at first, is then captured, and then replayed.

    The eager steps are steps of the completions like any other and a capture runs nothing, so
    there is no state to restore.
    """

    def __init__(self, step: Callable[[], None], owner: GraphedSteps):
        self.step, self.owner = step, owner
        self.eager_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None and self.eager_steps == _EAGER_STEPS and not self.owner.refused:
            self.capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.owner.refused:
            self.step()
        else:
            self.eager_steps += 1
            self.warm_up()

    def warm_up(self) -> None:
        """Step on the stream of the capture; refuse if the host waited in the last such step."""
        stream = self.owner.stream
        stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        waits = any("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        if self.eager_steps == _EAGER_STEPS and waits:
            self.owner.refuse("the model waits for the GPU inside a step")

    def capture(self) -> None:
        """Record a step without running it; refuse if that fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            # When a capture fails, `torch.cuda.graph` leaves its stream as the current one.
            with (
                torch.cuda.stream(self.owner.stream),
                torch.cuda.graph(
                    graph, stream=self.owner.stream, capture_error_mode="thread_local"
                ),
            ):
                self.step()
        except torch.OutOfMemoryError:
            raise  # fewer rows may do
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.owner.refuse(f"they cannot be captured as a CUDA graph ({reason})")
        else:
            self.graph = graph

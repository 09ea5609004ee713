"""Between host and device without a wait: batches on their way there, numbers on their way back."""

from __future__ import annotations

import torch
from torch import Tensor

from samtune.structures import Batch


class Upload:
    """Copies batches to the device beside the work that is queued there.

    The host runs ahead of a GPU: it asks for the next batch while a step is still being computed.
    Copied on a stream of its own, from pinned memory, the batch travels meanwhile; on the stream of
    the step it would wait for the step's end first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; what is queued from now on finds it complete."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            batch = batch.to(self.device)
        steps = torch.cuda.current_stream(self.device)
        steps.wait_stream(self._stream)
        batch.record_stream(steps)  # else its memory could be given away while a step reads it
        return batch


class Arrival:
    """A tensor's values on their way to the host, as they are now."""

    def __init__(self, tensor: Tensor):
        self._event = None
        self._values = tensor
        if tensor.is_cuda:
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._values = pinned.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """The values, on the CPU; at once if the device has done what was queued before them."""
        if self._event:
            self._event.synchronize()
        return self._values

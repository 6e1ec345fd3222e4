"""Anyone's model, as attacks want it."""

from __future__ import annotations

from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import unwrapped
from surestep.devices import out_of_memory
from surestep.errors import UserError


class Adapted(nn.Module):
    """Wrap a model: pixels in the threat model's range in, logits (N, K) in float32 out.

    Images are preprocessed as declared and cast to the type of the model's weights; logits are
    taken from a tuple or a dict; what the model raises becomes one line.

    Args:
        model: any classifier; of a DistributedDataParallel one the module inside is taken, since
            a process that judges must not wait for the others.
        preprocess: applied to the pixels first, such as ``models.Normalize(mean, std)`` for a
            model that wants normalised images.
    """

    def __init__(self, model: nn.Module, preprocess: nn.Module | None = None) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.preprocess = preprocess
        # The same mode as the model: whoever restores modes must not find one it did not set.
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K).

        Raises:
            UserError: the model raises, or returns no logits.
        """
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        try:
            z = x if self.preprocess is None else self.preprocess(x)
            if weight is not None and weight.dtype != z.dtype:
                z = z.to(weight.dtype)
            return forward_logits(self.model, z)
        except Exception as e:
            if isinstance(e, UserError) or out_of_memory(e):
                raise
            reason = str(e).strip().splitlines()[0] if str(e).strip() else ""
            raise UserError(
                f"the model fails on one batch of shape {tuple(x.shape)} and type {x.dtype}: "
                f"{type(e).__name__} {reason}".rstrip()
            ) from e

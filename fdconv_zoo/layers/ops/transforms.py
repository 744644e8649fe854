"""What torch.func and second derivatives take in place of the operators: plain operations, differentiated by torch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_plain_gradients(grad: Tensor) -> bool:
    """Whether a backward pass is to be differentiated again (create_graph=True), or runs on gradients in batches.

    Args:
        grad: Gradient of the output; torch.autograd's own vmap (is_grads_batched, vectorize) shows in it alone.
    """
    is_transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return torch.is_grad_enabled() or is_transformed or torch._C._functorch.is_legacy_batchedtensor(grad)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of a function of plain operations, which have derivatives in turn.

    Args:
        function: Takes the inputs.
        inputs: Those to differentiate by.
        grad: Gradient of the output.
    """
    _, pull_back = torch.func.vjp(function, *inputs)
    return list(pull_back(grad))

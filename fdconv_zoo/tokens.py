"""Blocks whose tokens FDConv must not pool: causal ones, and those that keep tokens before samples.

An FDConv layer makes one weight for a sample from the mean over all its tokens. In a causal block that lets a later
token change an earlier one; where the first dimension is tokens, it lets one sample change another.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from .causal import asks_for_causal, is_causal, may_be_masked
from .sources import forward_source
from .structure import find_mlps

# In a forward's source: what comes in, or the tokens made from it, gets its first two dimensions exchanged.
TURNS_TOKENS = re.compile(
    r"\b(x|h|src|tokens|embeddings|hidden_states|inputs?_ids|inputs_embeds)\s*="
    r"\s*\1\.(transpose\((0, 1|1, 0)\)|permute\(1, 0, 2\)|swapaxes\(0, 1\))"
)


class Problem(NamedTuple):
    """Why FDConv would be wrong for a layer.

    Attributes:
        keyword: What insists on it nevertheless.
        reason: For messages.
    """

    keyword: str
    reason: str


POOLS = "FDConv pools over all tokens, so that a later one, or padding, would change those before it"
CAUSAL = Problem("causal", f"causal: {POOLS}")
DECODER = Problem(
    "causal",
    "causal if nn.TransformerDecoderLayer is called with a tgt_mask, as decoders of text are, and nothing here rules "
    f"that out: {POOLS}",
)
SEQUENCE_FIRST = Problem(
    "sequence_first",
    "sequence first: nn.MultiheadAttention(batch_first=False) beside them, or the model around them, which exchanges "
    "the first two dimensions, has (tokens, batch, channels), and FDLinear takes the first dimension for samples, so "
    "that one sample would change another",
)
PROBLEMS = (CAUSAL, DECODER, SEQUENCE_FIRST)


def _is_sequence_first(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return not module.batch_first
    # Attention turns its tokens within itself; who has MLPs turns them for these.
    return bool(TURNS_TOKENS.search(forward_source(type(module)) or "") and find_mlps(module)[0])


def _blocks(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> Iterator[nn.Module]:
    """Blocks of the modules that match: of each the innermost that holds an MLP, or what holds it where none does.

    Attention may be in a module of its own, or in several (norm, residual), beside the MLP.
    """
    for name, module in model.named_modules():
        if matches(name, module):
            parts = name.split(".")
            around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
            parent = model.get_submodule(name.rpartition(".")[0])
            yield next((block for block in around if find_mlps(block)[0]), parent)


def find_unfit(model: nn.Module) -> dict[nn.Module, Problem]:
    """Layers for which FDConv would be wrong, and why."""
    unfit: dict[nn.Module, Problem] = {}
    asking = {kind for kind in {type(module) for module in model.modules()} if asks_for_causal(kind)}
    tests = {
        SEQUENCE_FIRST: lambda _, module: _is_sequence_first(module),
        DECODER: lambda name, module: isinstance(module, nn.TransformerDecoderLayer) and may_be_masked(model, name),
        CAUSAL: lambda _, module: is_causal(module, asking),
    }
    for problem, matches in tests.items():
        kinds = (nn.Linear,) if problem is SEQUENCE_FIRST else (nn.Linear, nn.modules.conv._ConvNd)
        for block in _blocks(model, matches):
            unfit.update({part: problem for part in block.modules() if isinstance(part, kinds)})
    return unfit

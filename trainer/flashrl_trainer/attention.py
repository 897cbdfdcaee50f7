"""Attention over packed documents: each sees itself only, causally, with no padding and no [T, T] mask.

Registered with transformers under `NAME`; a model gets `cu_seq_lens_q` [S+1] int32, `max_length_q` and, where
documents share a beginning, `document_rows` and `document_kept` as keyword arguments of its forward. Knows nothing of
particular architectures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "packed_documents"  # transformers takes any name with "flash" in it for a kernel to download
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers; may be called again."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    document_rows: Tensor,
    document_kept: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D].

    Document i is the tokens at `document_rows[cu_seq_lens_q[i] : cu_seq_lens_q[i + 1]]` ([E] int64), and answers for
    those of them that are kept (`document_kept` [E] bool): each of the T once, in order. A window w lets a token see
    itself and w - 1 before it. Raises ValueError for dropout and for options of architectures that this does not
    compute, rather than leave them out.
    """
    present = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if present or dropout:
        raise ValueError(f"model: attention with {', '.join(present) or 'dropout'} is not supported in training")
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    documents = Documents(cu_seq_lens_q, max_length_q, document_rows, document_kept)
    # the kernel for documents of any length takes 16 bits only
    attend = _on_cuda if query.is_cuda and query.dtype != torch.float32 else _by_length
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if len(document_rows) > query.shape[2]:
        # rows of a shared beginning are copied to each document, and their gradients added up again
        queries, keys, values = (tensor.index_select(0, document_rows) for tensor in (queries, keys, values))
    return attend(queries, keys, values, documents, scaling, window).unsqueeze(0), None


@dataclass(frozen=True)
class Documents:
    """Where they begin among E rows, [S + 1] int32, the longest one, their rows among the T, and which are kept."""

    bounds: Tensor
    longest: int
    rows: Tensor
    kept: Tensor


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports CUDA kernels

    groups = query.shape[1] // key.shape[1]
    reach = (-1 if window is None else window - 1, 0)
    keys, values = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    bounds, longest = documents.bounds, documents.longest
    out = varlen_attn(query, keys, values, bounds, bounds, longest, longest, scale=scaling, window_size=reach)
    assert isinstance(out, Tensor)
    return out[documents.kept]


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """Documents of about the same length go through the kernel together: it starts slower than it computes on a CPU.

    The shorter ones are padded at their end, which a causal token never sees.
    """
    grouped = query.shape[1] != key.shape[1]
    pieces, places = [], []
    for rows, is_token in _alike(documents.bounds.tolist(), query.device):
        queries, keys, values = (tensor[rows].transpose(1, 2) for tensor in (query, key, value))
        mask = None if window is None else _window_mask(rows.shape[1], window, query.device)
        found = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )  # [documents, heads, longest, D]
        is_kept = is_token & documents.kept[rows]
        pieces.append(found.transpose(1, 2)[is_kept])
        places.append(documents.rows[rows[is_kept]])
    return torch.cat(pieces)[torch.cat(places).argsort()]


def _alike(bounds: list[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions [documents, longest] of documents whose lengths differ by at most a quarter, and which are theirs."""
    documents = sorted(pairwise(bounds), key=lambda document: document[1] - document[0], reverse=True)
    while documents:
        longest = documents[0][1] - documents[0][0]
        count = sum(4 * (end - start) >= 3 * longest for start, end in documents)
        together, documents = torch.tensor(documents[:count], device=device), documents[count:]
        steps = torch.arange(longest, device=device)
        positions = together[:, :1] + steps
        kept = positions < together[:, 1:]
        yield positions.where(kept, together[:, :1]), kept  # any position will do for padding


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)

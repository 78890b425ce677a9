"""Token ids as rows of a small table: what is known of a token from its id alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from specmoe.dataset import Window
from specmoe.predictors._tables import grow_on_load

__all__ = ["Vocabulary", "routing_components"]

# A profile seen once is mostly chance: this many tokens' worth of the average is mixed in.
_SHRINKAGE = 1.5
_LEAST_ROWS = 2


class Vocabulary(nn.Module):
    """Gives the ids that training saw most often a row each, and all others row 0.

    A model's vocabulary may have more ids than a trace has tokens; a table over all of it would be mostly
    unused, and its size would depend on the model.

    Args:
        rows: how many rows there are, row 0 included.

    Buffers: row_V int32, the row of each id up to the largest that has one.
    """

    row_V: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = max(_LEAST_ROWS, rows)
        self.register_buffer("row_V", torch.zeros(1, dtype=torch.int32))
        grow_on_load(self, "row_V")

    def prepare(self, windows: Iterable[Window]) -> None:
        """Count the ids of the training windows and hand out the rows."""
        counts = torch.zeros(1, dtype=torch.long)
        for window in windows:
            ids = window.token_ids_BT[window.valid_BT & window.scored_BT].cpu().clamp_min(0)
            seen = torch.bincount(ids, minlength=len(counts))
            seen[: len(counts)] += counts
            counts = seen
        frequent = counts.argsort(descending=True, stable=True)[: self.rows - 1]
        frequent = frequent[counts[frequent] > 0]
        row_V = torch.zeros(len(counts), dtype=torch.int32)
        row_V[frequent] = torch.arange(1, len(frequent) + 1, dtype=torch.int32)
        self.row_V = row_V.to(self.row_V.device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Rows, int64, of ids of any shape."""
        known = (token_ids >= 0) & (token_ids < len(self.row_V))
        rows = self.row_V[torch.where(known, token_ids, 0)].long()
        return torch.where(known, rows, 0)


def routing_components(windows: Iterable[Window], vocabulary: Vocabulary, width: int) -> Tensor:
    """What is typical of each row's routing, as a starting point for an embedding: [rows, width] float32.

    The principal components of the rows' mean routing over all layers and experts, shrunk towards the
    average of all tokens, and scaled to unit variance. Row 0 and rows that were not seen are zero.
    """
    sums_RX, counts_R1 = torch.zeros(0), torch.zeros(vocabulary.rows, 1)
    for window in windows:
        own_BT = window.valid_BT & window.scored_BT
        routed_NX = window.routed_BTLE[own_BT].flatten(1).cpu()
        rows_N = vocabulary(window.token_ids_BT)[own_BT].cpu()
        if len(sums_RX) == 0:
            sums_RX = torch.zeros(vocabulary.rows, routed_NX.shape[1])
        sums_RX.index_add_(0, rows_N, routed_NX)
        counts_R1.index_add_(0, rows_N, torch.ones(len(rows_N), 1))
    components_RC = torch.zeros(vocabulary.rows, width)
    if len(sums_RX) == 0:
        return components_RC
    profile_RX = (sums_RX - counts_R1 * sums_RX.sum(0) / counts_R1.sum().clamp_min(1)) / (counts_R1 + _SHRINKAGE)
    rank = min(width, *profile_RX.shape)
    # Frequent ids weigh more, as they do in the text.
    _, _, axes_XC = torch.svd_lowrank(profile_RX * counts_R1.sqrt(), q=rank, niter=3)
    components_RC[:, :rank] = profile_RX @ axes_XC
    components_RC[0] = 0
    seen_R = counts_R1[:, 0] > 0
    seen_R[0] = False
    if int(seen_R.sum()) > 1:
        components_RC /= components_RC[seen_R].std().clamp_min(1e-6)
    return components_RC

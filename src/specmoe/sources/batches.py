"""From documents to batches of token ids: what a model reads, in an order that does not depend on interruptions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specmoe.errors import SpecmoeError
from specmoe.sources.chats import ChatReader
from specmoe.sources.corpus import Document
from specmoe.sources.families import Family
from specmoe.sources.loading import LoadedModel

__all__ = ["Encoded", "batched", "encode_documents"]


@dataclass(frozen=True)
class Encoded:
    """A document and the token ids [T] int32 that the model reads of it."""

    document: Document
    ids: np.ndarray

    def captured(self, family: Family, stack: str) -> np.ndarray:
        """The ids that the captured stack reads."""
        if not family.is_encoder_decoder:
            return self.ids
        half = len(self.ids) // 2
        return self.ids[:half] if stack == "encoder" else self.ids[half:]


def encode_documents(
    loaded: LoadedModel,
    documents: Sequence[Document],
    longest: int,
    budget: int | None,
    seed: int,
    written: int = 0,
    chats: ChatReader | None = None,
) -> tuple[list[Encoded], int]:
    """Token ids of every document that is to be read, in the drawn order, and how many are too short or refused.

    Args:
        longest: documents are cut there. budget: tokens to read in all. written: tokens to come after each.
        chats: turns conversations into text; None to make one.
    """
    chats = chats or ChatReader(loaded.tokenizer, loaded.topology.model_id, continued=written > 0)
    names = [document.doc_id for document in documents]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SpecmoeError(f"two documents are named {twice!r}; rename one, or capture them to two traces")
    order = list(documents)
    random.Random(f"documents {seed}").shuffle(order)
    mark = loaded.tokenizer.bos_token_id
    front = [] if mark is None else [mark]
    shortest = 2 if loaded.family.is_encoder_decoder else 1
    known = loaded.model.get_input_embeddings().num_embeddings
    encoded, skipped, left = [], 0, budget
    for start in range(0, len(order), 64):
        chunk = [(document, read) for document in order[start : start + 64] if (read := chats.read(document))]
        skipped += len(order[start : start + 64]) - len(chunk)
        if not chunk:
            continue
        texts = [text for _, (text, _) in chunk]
        rows = loaded.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (document, (_, has_marks)), row in zip(chunk, rows, strict=True):
            ids = [*([] if has_marks else front), *row][:longest][:left]
            if not row or len(ids) < shortest:
                skipped += 1
                continue
            if max(ids) >= known:
                raise SpecmoeError(f"document {document.doc_id!r} has token {max(ids)}; the model knows {known} tokens")
            encoded.append(Encoded(document, np.asarray(ids, dtype=np.int32)))
            left = None if left is None else left - len(ids)
        if left is not None and left < shortest:
            break
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    most = max((len(entry.ids) for entry in encoded), default=0)
    if limit is not None and most + written > limit:
        raise SpecmoeError(
            f"the model reads at most {limit} tokens, the longest document has {most}; lower --tokens-per-document"
            + (f", or --generate from {written}" if written else "")
        )
    if not encoded:
        why = "".join(f" ({line})" for line in chats.lines())
        raise SpecmoeError(f"no document has enough text to be read; give other files with --text{why}")
    return encoded, skipped


def batched(encoded: list[Encoded], batch_tokens: int, seed: int) -> list[list[Encoded]]:
    """Documents of similar length together. A function of the whole list alone, so that resuming is exact."""
    batches: list[list[Encoded]] = []
    for entry in sorted(encoded, key=lambda entry: len(entry.ids), reverse=True):
        # The first document of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= batch_tokens:
            batches[-1].append(entry)
        else:
            batches.append([entry])
    # In random order, so that the speed of the first batches foretells that of the rest.
    random.Random(f"batches {seed}").shuffle(batches)
    return batches

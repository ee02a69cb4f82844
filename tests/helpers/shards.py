"""Processes that hold parts of tensors, played by threads."""

import threading

import torch

from lightning_optim.functional.thresholds import Shards


def on_ranks(parts, function):
    """Call ``function(part, shards)`` in one thread per part, with sums over the threads; return the results."""
    barrier = threading.Barrier(len(parts))
    sent, results = [None] * len(parts), [None] * len(parts)

    def work(rank):
        def total(counts):
            sent[rank] = counts
            barrier.wait()
            summed = torch.stack(sent).sum(0)
            barrier.wait()
            return summed

        try:
            results[rank] = function(parts[rank], Shards(rank, len(parts), total))
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def sharded(scores, cuts):
    """Split every tensor along dimension 0 at the given fractions, as fully sharded training does."""
    parts = []
    for low, high in zip([0.0, *cuts], [*cuts, 1.0], strict=True):
        parts.append({name: t[round(low * len(t)) : round(high * len(t))] for name, t in scores.items()})
    return parts

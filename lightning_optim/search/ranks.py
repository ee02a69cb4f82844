"""Lets the processes of one distributed run train the same trial: rank 0 proposes, the others follow."""

import json
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_optim.callbacks.windowed import mro_names

__all__ = ["Ranks"]

PATIENCE = timedelta(days=30)
"""How long a rank waits for the next trial: rank 0 measures meanwhile."""

_count = 0


class Ranks:
    """The ranks of a search, which agree by a key-value store at the address of their launch.

    The process group of a run cannot carry a trial's parameters: Lightning makes it inside ``fit``, when model and
    callbacks are made already. The store is the one that the process group is made from.
    """

    def __init__(self) -> None:
        global _count
        _count += 1
        self._prefix = f"lightning_optim/search/{_count}"
        self._store: Any = None
        self._sent = 0
        # The ranks as Lightning tells them: by torchrun's variable, by that of its own launcher, by SLURM's.
        names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
        self.leads = next((int(os.environ[name]) for name in names if name in os.environ), 0) == 0
        self._messages: list[str] = []
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_PORT" in os.environ:
            self._open()
        elif not self.leads:
            raise MisconfigurationException(
                "`search` finds no address at which this rank could follow rank 0 (MASTER_ADDR and MASTER_PORT). Start "
                "the script with torchrun."
            )

    def _open(self) -> None:
        # With torchrun the agent holds the store. Without, rank 0 does, and the process group of its first run shares
        # it: `multi_tenant` lets two stores of a process use one port.
        held_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self.leads and not held_by_agent,
            timeout=PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
        self._store = PrefixStore(self._prefix, store)

    def join(self, trainer: pl.Trainer) -> None:
        """Open the store for a Trainer that will launch further processes; those run the script, up to here.

        Raises:
            MisconfigurationException: If its processes run ``fit`` alone and what they find is lost.
        """
        launcher = trainer.strategy.launcher
        if launcher is not None and "_MultiProcessingLauncher" in mro_names(launcher) and trainer.world_size > 1:
            raise MisconfigurationException(
                "`search` cannot follow a Trainer that spawns or forks its processes. Pass strategy='ddp', or start "
                "the script with torchrun."
            )
        if trainer.world_size > 1 and self._store is None and self.leads:
            cluster = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"] = str(cluster.main_address)
            os.environ["MASTER_PORT"] = str(cluster.main_port)
            self._open()
            for place in range(self._sent):
                self._put(place)

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell the followers what comes next; kept until there are any."""
        self._messages.append(json.dumps(message))
        self._sent += 1
        if self._store is not None:
            self._put(self._sent - 1)

    def _put(self, place: int) -> None:
        self._store.set(str(place), self._messages[place])

    def received(self) -> Iterator[dict[str, Any]]:
        """Yield what rank 0 sends, up to and with the message that has a "report"."""
        place = 0
        while True:
            message: dict[str, Any] = json.loads(self._store.get(str(place)))
            yield message
            if "report" in message:
                return
            place += 1

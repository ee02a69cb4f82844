"""The report on a folder: its files, its size, and how far its answers are from the module's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.tables import Listed, Listing, size_in_words

__all__ = ["PretrainedReport"]


@dataclass(frozen=True)
class PretrainedReport(Listed):
    """The result of :func:`lightning_optim.export_pretrained`; ``str(report)`` is a table.

    Attributes:
        path: The folder.
        model: Class that reads it.
        parameters: Number of parameters; tied ones count once.
        config: Number of the configuration that followed the shapes -> (before, after).
        files: Name -> bytes, of the files that were written.
        max_difference: Largest absolute difference of any output from the module's.
        packed: Layers stored as packed integers.
        notes: Sentences on anything unexpected.

    Examples:
        >>> report = export_pretrained(model, "small")  # doctest: +SKIP
        >>> report.notes  # what the folder cannot hold  # doctest: +SKIP
    """

    path: Path
    model: str
    parameters: int
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    max_difference: float = 0.0
    packed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def listing(self) -> Listing:
        """Return the files, with sentences on what follows and how far answers are from the module's."""
        rows = [(name, size_in_words(size)) for name, size in self.files.items()]
        sentences = [f"Size: {size_in_words(self.bytes)}."]
        changed = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.config.items())
        if changed:
            sentences.append(f"The configuration follows the shapes: {changed}.")
        if self.packed:
            sentences.append(f"{self.packed} layers are packed in the GPTQ layout.")
        sentences.append(f"Read back and compared: largest difference {self.max_difference:.3g}.")
        title = f"{self.path} ({self.model}, {self.parameters:,} parameters)"
        return Listing(("file", "size"), rows, title=title, after=[*sentences, *self.notes])

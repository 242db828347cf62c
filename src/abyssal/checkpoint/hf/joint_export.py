"""One model directory written by all ranks that hold the model: planned together, each its part, put in place once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from abyssal.checkpoint.hf.file_plan import PlannedFile
from abyssal.checkpoint.hf.names import fold, released_tensors
from abyssal.checkpoint.hf.write_weights import Box, Weight, create_files, held_boxes, share_out, write_weights
from abyssal.config import ModelConfig
from abyssal.errors import CheckpointError, ModelDirectoryError
from abyssal.files.faults import os_faults
from abyssal.ranks.ranks import Ranks

#: Yields the folder in which the directory is made, all but its weights there already, and puts it in place.
Staging = Callable[[], AbstractContextManager[Path]]
DOING = "write the model directory"


@contextmanager
def model_directory_faults() -> Iterator[None]:
    """Turn a CheckpointError of the body, such as ranks agree on, into a ModelDirectoryError of the same words."""
    try:
        yield
    except CheckpointError as error:
        raise ModelDirectoryError(str(error)) from error.__cause__


class JointExport:
    """The steps of one write: every rank takes `offer` and `put`; the first, which decides, `begin` and `finish` too.

    Only the first rank makes the staging folder and renames it.
    """

    def __init__(
        self, path: Path, config: ModelConfig, files: Sequence[PlannedFile[Weight]], tensors: Mapping[str, Tensor]
    ) -> None:
        """Prepare to write what this rank holds of `tensors` into `files`, which are to appear in `path`."""
        self.path, self.config, self.files, self.tensors = path, config, files, tensors

    def run(self, ranks: Ranks, staging: Staging) -> None:
        """Take all steps, together with the other ranks.

        Raises:
            ModelDirectoryError: one of them could not; nothing has changed.
        """
        with model_directory_faults(), ExitStack() as stack:
            name, share = ranks.scatter(self.offer, lambda offers: self.begin(offers, stack, staging))
            folder = self.path.resolve().with_name(name)
            not_finite = ranks.agree(lambda: self.put(folder, share), lambda found: self.finish(found, stack))
            if not_finite:
                raise ModelDirectoryError(
                    f"{self.path}: the model to write is not finite in {', '.join(fold(not_finite))}"
                )

    def offer(self) -> dict[str, Box]:
        """Say what this rank holds.

        Raises:
            ModelDirectoryError: a tensor is not the model's, or of another shape.
        """
        return held_boxes(self.path, self.config, self.tensors)

    def begin(
        self, offers: Sequence[Mapping[str, Box]], stack: ExitStack, staging: Staging
    ) -> list[tuple[str, set[str]]]:
        """Make the folder, which `stack` puts in place or removes, and its files; say its name, and who writes what.

        Raises:
            ModelDirectoryError: the ranks do not hold the whole model, the folder must not be replaced, or the disk
                refused.
            CheckpointError: the disk is too full.
        """
        shares = share_out(self.path, self.config, offers)
        with os_faults(ModelDirectoryError, self.path, DOING):
            folder = stack.enter_context(staging())
            create_files(folder, self.files)
        return [(folder.name, share) for share in shares]

    def put(self, folder: Path, share: set[str]) -> list[str]:
        """Write this rank's part, flushed to the disk, and return the names of what is not finite.

        Raises:
            ModelDirectoryError: the disk refused, or it is not the one that the first rank writes to.
        """
        if not folder.is_dir():
            raise ModelDirectoryError(
                f"{self.path}: what the first rank makes there is not seen here; all ranks of a run need one file "
                "system"
            )
        held = {name: tensor for name, tensor in self.tensors.items() if name in share}
        with os_faults(ModelDirectoryError, self.path, DOING):
            return write_weights(folder, self.files, self.config, held)

    def finish(self, not_finite: Sequence[list[str]], stack: ExitStack) -> list[str]:
        """Put the directory in place if everything is finite; return the names of what is not, in the model's order.

        Raises:
            ModelDirectoryError: the disk refused.
        """
        found = {name for names in not_finite for name in names}
        if not found:
            with os_faults(ModelDirectoryError, self.path, DOING):
                stack.close()
        return [spec.name for spec in released_tensors(self.config) if spec.name in found]

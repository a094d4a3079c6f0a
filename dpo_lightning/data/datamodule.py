"""The data as Lightning takes them; the only file of this room that knows Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from dpo_lightning.data.batches import PairTable, TrainingOrder, ValidationOrder, limited
from dpo_lightning.data.prepare import SIDES, Census, prepare, split, validate
from dpo_lightning.data.sources import FileSource, HubSource, Source
from dpo_lightning.data.tokenize import use_chat
from dpo_lightning.types import Batch


class PreferenceData(pl.LightningDataModule):
    """Preference pairs from one source, tokenised once, split by prompt unless validation data are given.

    Args:
        path, val_path: files, or shipped:NAME. name, subset, split, val_split: a data set on the hub.
        val_fraction: share of the pairs held out when neither val_path nor val_split is given; 0 for none.
        max_pairs: of path or name's split, stop after so many usable pairs; None for all. Validation data that are
            given apart are taken whole.
        max_length: tokens of prompt and one completion together.
        template: auto, chat or plain; see `tokenize_pairs`.
        layout: auto, shared or padded; how the model is to lay out the batches, see `choose_layout`.
        batch_size: pairs of a forward pass on each device.
        load_tokenizer: -> the policy's tokenizer, called once the rows are known to be well-formed.
        seed: of the order.

    """

    def __init__(
        self, *, load_tokenizer: Callable[[], Any], seed: int, max_length: int, batch_size: int, val_fraction: float,
        path: str | None = None, val_path: str | None = None, name: str | None = None, subset: str | None = None,
        split: str = "train", val_split: str | None = None, max_pairs: int | None = None, template: str = "auto",
        shuffle: bool = True, layout: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.source, self.val_source = sources(path, val_path, name, subset, split, val_split)
        self.load_tokenizer, self.seed, self.shuffle = load_tokenizer, seed, shuffle
        self.max_length, self.max_pairs, self.template = max_length, max_pairs, template
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.layout = layout
        self.position: tuple[int, int] = (0, 0)  # epoch and pairs of it that are done
        self.train: Any = None
        self.val: Any = None
        self.pairs: dict[str, PairTable] = {}
        self._dealt: TrainingOrder | None = None
        self.census: Census | None = None
        self.val_census: Census | None = None  # of validation data that are given apart

    def prepare_data(self) -> None:
        """Read, judge and tokenise all rows; idempotent. Raises UserError for what the user can mend."""
        if self.train is not None:
            return
        for source in (self.source, self.val_source):
            if source is not None:
                validate(source)
        self.tokenizer = self.load_tokenizer()
        table, self.census = self._table(self.source, self.max_pairs)
        if self.val_source is not None:
            self.train = table
            self.val, self.val_census = self._table(self.val_source, None)
        else:
            train, val = split(_prompts(table), self.val_fraction)
            self.train, self.val = table.select(train), table.select(val)
        self.pairs = {"train": PairTable(self.train), "val": PairTable(self.val)}
        self.tokens_N = self.lengths(self.train).sum(1)

    def _table(self, source: Source, max_pairs: int | None) -> tuple[Any, Census]:
        return prepare(source, self.tokenizer, self.max_length, self.template, max_pairs)

    def setup(self, stage: str) -> None:
        """Memory-map what `prepare_data` made."""
        self.prepare_data()

    def state_dict(self) -> dict[str, int]:
        """Return how far the training has come, to be asked at a step's end: the same for any number of ranks.

        epoch, `pairs` of it that are done, pairs of a step, pairs of an epoch.
        """
        trainer = self.trainer
        assert trainer is not None
        fit, step_pairs = trainer.fit_loop, self.order().step_pairs
        epoch, batches = fit.epoch_progress.current.ready - 1, fit.epoch_loop.batch_progress.current.ready
        if batches >= trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        pairs = batches // trainer.accumulate_grad_batches * step_pairs
        return {"epoch": epoch, "pairs": pairs, "step_pairs": step_pairs, "of": len(self.train)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there; under DeepSpeed the loader has been made by now."""
        self.position = (state_dict["epoch"], state_dict["pairs"])
        if self._dealt is not None:
            self._dealt.skip = self.position

    def examples(self, count: int) -> list[dict[str, Any]]:
        """Return the first held-out rows, of training where none is held out: prompt as token ids, question as text."""
        table = self.val if len(self.val) else self.train
        return [table[row] for row in range(min(count, len(table)))]

    def is_chat(self) -> bool:
        """Return whether the pairs went through the chat template: messages always do, text where `template` says."""
        assert self.census is not None
        return self.census.conversations > 0 or use_chat(self.tokenizer, self.template)

    def shared_prompts(self) -> int:
        """Return how many validation pairs have a prompt that is trained on: 0 unless validation data were given."""
        return int(np.isin(_prompts(self.val), _prompts(self.train)).sum())

    def lengths(self, table: Any) -> np.ndarray:
        """Return the tokens of prompt, chosen and rejected of each pair, shape (pairs, 3)."""
        parts = (part.flatten().to_numpy() for part in _parts(table, "lengths"))
        return np.concatenate([np.empty(0, np.int32), *parts]).reshape(-1, 3)

    def told_lengths(self, table: Any, census: Census) -> str:
        """Return a table's lengths in words."""
        prompt, chosen, rejected = self.lengths(table).mean(0)
        return (
            f"prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} tokens on average; longest sequence "
            f"{self.longest(table)}, {census.truncated} pairs cut to data.max_length={self.max_length}"
        )

    def longest(self, *tables: Any) -> int:
        """Return the tokens of the longest prompt with a completion, of all pairs where no tables are given."""
        lengths = np.concatenate([self.lengths(table) for table in tables or (self.train, self.val)])
        return int((lengths[:, :1] + lengths[:, 1:]).max())

    def largest_id(self) -> int:
        """Return the largest token id of all pairs."""
        parts = (part for table in (self.train, self.val) for name in SIDES for part in _parts(table, name))
        return max(int(part.flatten().to_numpy().max()) for part in parts)

    def keys(self, table: Any) -> np.ndarray:
        """Return 16 bytes of each pair that change with any of its tokens, shape (pairs,)."""
        parts = (np.array(part.to_pylist(), "S16") for part in _parts(table, "key"))
        return np.concatenate([np.empty(0, "S16"), *parts])

    def rows_ahead(self, name: str) -> np.ndarray:
        """Return which rows of train or val the run can meet: fewer than all where it ends within an epoch."""
        trainer = self.trainer
        assert trainer is not None
        rows = np.arange(len(self.pairs[name]))
        if name == "val":
            order, world = self.val_order(0, 1), trainer.world_size
            batches = limited(-(-len(order) // world), trainer.limit_val_batches) * world
            return np.sort([row for batch in order.batches[:batches] for row in batch.rows]).astype(int)
        epoch, done = self.position  # max_steps counts those before, too: more than can be met, never fewer
        order = self.order()
        met = done + trainer.max_steps * order.step_pairs if trainer.max_steps >= 0 else len(rows)
        batches = limited(len(order), trainer.limit_train_batches)  # each epoch that is cut short has other rows
        first = min(len(rows) - 1, batches // trainer.accumulate_grad_batches * order.step_pairs)
        if trainer.max_epochs == 1 and batches < len(order):
            met = min(met, first)
        ends_early = epoch == 0 and met <= first
        return np.sort(order.rows(0)[:met]) if ends_early else rows

    def seen(self, steps: int) -> int:
        """Return how many of the training pairs a run's first steps have taken, each counted once."""
        trainer, order = self.trainer, self.order()
        assert trainer is not None
        whole = limited(len(order), trainer.limit_train_batches) // trainer.accumulate_grad_batches  # steps an epoch
        epochs = enumerate(range(0, steps, whole))
        rows = [order.rows(epoch)[: min(whole, steps - done) * order.step_pairs] for epoch, done in epochs]
        return len(np.unique(np.concatenate(rows)))

    def order(self) -> TrainingOrder:
        """Return this rank's order of the training pairs."""
        trainer = self.trainer
        assert trainer is not None
        return TrainingOrder(
            self.tokens_N, self.batch_size, trainer.accumulate_grad_batches, self.seed, self.shuffle,
            trainer.global_rank, trainer.world_size,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's micro-batches; Lightning sets the epoch of the order."""
        self._dealt = self.order()
        self._dealt.skip = self.position
        return _loader(self.pairs["train"], self._dealt)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's share of the validation pairs."""
        trainer = self.trainer
        assert trainer is not None
        return _loader(self.pairs["val"], self.val_order(trainer.global_rank, trainer.world_size))

    def val_order(self, rank: int, world: int) -> ValidationOrder:
        """Return the order of one rank's validation pairs."""
        return ValidationOrder(self.lengths(self.val).sum(1), self.batch_size, rank, world)


def _loader(pairs: PairTable, order: Any) -> DataLoader[Batch]:
    """Return a loader that draws no random numbers of the training: it draws one each time it is gone through."""
    return DataLoader(pairs, sampler=order, batch_size=None, generator=torch.Generator())


def _prompts(table: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(part.to_numpy() for part in _parts(table, "prompt_key"))])


def _parts(table: Any, name: str) -> Iterator[Any]:
    """Yield a column as Arrow arrays; datasets' own columns are read row by row."""
    for part in table.select_columns(name).with_format("arrow").iter(batch_size=10_000):
        yield part[name].combine_chunks()


def sources(
    path: str | None,
    val_path: str | None,
    name: str | None,
    subset: str | None,
    split: str,
    val_split: str | None,
) -> tuple[Source, Source | None]:
    """Return where the training rows and, if they are given apart, the validation rows come from."""
    val = FileSource(val_path, "data.val_path") if val_path else None
    if path is not None:
        return FileSource(path), val
    assert name is not None, "config.check demands one of path and name"
    return HubSource(name, split, subset), val or (HubSource(name, val_split, subset) if val_split else None)

"""The training data of a Trainer: read as conversations, and written back as the mixture, in the same columns and layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from resafe.errors import ResafeError
from resafe.finetune import _encode, _pack
from resafe.finetune._examples import BATCH, Example, Examples
from resafe.finetune.mixture import Mixture
from resafe.mitigation import Run
from resafe.preferences import with_rejected
from resafe.rows import Row
from resafe.shapes import Shape, read, shape_of, write

PREFERENCE = (("prompt_ids", "chosen_ids", "rejected_ids"), ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"))  # TRL from 1.0; before
PAIRWISE = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")  # LLaMA-Factory: prompt and answer in one
REFUSED = (
    "RewardTrainer", "PRMTrainer", "GRPOTrainer", "RLOOTrainer", "PPOTrainer", "OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer",
    "KTOTrainer", "BCOTrainer", "ORPOTrainer", "CPOTrainer", "GKDTrainer", "CustomKTOTrainer", "CustomPPOTrainer", "PairwiseTrainer",
)  # fmt: skip
OTHER_TEMPLATE = "your rows are not rendered with the tokenizer's chat template; the safety rows are."
IMAGES = {"pixel_values", "images", "image", "videos", "audios"}


@dataclass
class TrainData:
    """What a trainer trains on. `examples` are its rows, or the documents packed in them; `rows` the same as conversations."""

    dataset: Any
    examples: Examples
    rows: list[Row]
    shape: Shape | None  # of the raw columns, where they are still there
    columns: tuple[str, ...]
    layout: _pack.Layout
    encoder: _encode.Encoder
    tokenizer: Any
    max_length: int | None
    policy: str = "all"
    notes: list[str] = field(default_factory=list)
    cut: int = 0  # new rows whose answers were cut off

    @property
    def preference(self) -> bool:
        """Whether rows hold a chosen and a rejected answer."""
        return bool(_pairs(self.columns) or self.shape and self.shape.preference)

    def tokens(self) -> int | None:
        """Tokens of one pass over the user's rows; None where rows are not tokenised yet."""
        return sum(self.examples.widths) if "input_ids" in self.columns else None

    def example(self, row: Row) -> Example:
        """A new row in the trainer's columns, not padded."""
        if self.preference:
            return self._preference(row)
        if "input_ids" not in self.columns:
            if self.shape is None:
                raise ResafeError(f"the columns {', '.join(self.columns)} are of no shape known here, so no safety row can be written in them.")
            return self._filled(self._raw(row))
        tokens = self.encoder.encode(row)
        n = self.max_length or len(tokens.ids)
        self.cut += not any(tokens.assistant[:n])
        known = {
            "input_ids": tokens.ids, "attention_mask": [1] * len(tokens.ids), "assistant_masks": tokens.assistant,
            "completion_mask": [int(i >= tokens.start) for i in range(len(tokens.ids))],
            "labels": _encode.labels(tokens, self.policy), "token_type_ids": [0] * len(tokens.ids),
            "special_tokens_mask": [0] * len(tokens.ids), "position_ids": list(range(len(tokens.ids))),
        }  # fmt: skip
        cut: Example = {k: v[:n] for k, v in known.items()}
        cut["length"] = cut["num_tokens"] = len(cut["input_ids"])
        return self._filled({**self._raw(row), **cut, **tokens.whole})

    def _raw(self, row: Row) -> Example:
        """A row in the raw columns, where they are still there: texts in the template's marks where the user's are."""
        if self.shape is None:
            return {}
        templated = self.shape.name == "text" or _encode.in_marks(self.shape, self.examples.sample)
        return write(row, self.shape, functools.partial(_encode.rendered, self.tokenizer) if templated else None)

    def _preference(self, row: Row) -> Example:
        """A preference row, in the tokenised columns of TRL or LLaMA-Factory, or in raw ones."""
        names = _pairs(self.columns)
        if not names:
            return self._filled(self._raw(row))
        good = self.encoder.encode(row)
        if good.whole:
            return self._filled(good.whole)
        bad = self.encoder.encode({"messages": [*row["messages"][:-1], {"role": "assistant", "content": row["rejected"]}]})
        start = min(good.start, bad.start)
        self.cut += self.max_length is not None and start >= self.max_length
        if names == PAIRWISE:
            known: Example = {}
            for side, tokens in (("chosen", good), ("rejected", bad)):
                known[f"{side}_input_ids"], known[f"{side}_attention_mask"] = tokens.ids, [1] * len(tokens.ids)
                known[f"{side}_labels"] = [_encode.IGNORED] * start + tokens.ids[start:]
            return self._filled({k: v[: self.max_length] for k, v in known.items()})
        tail = [self.tokenizer.eos_token_id] * self._extra_eos
        values = {names[0]: good.ids[:start], names[1]: good.ids[start:] + tail, names[2]: bad.ids[start:] + tail}
        return self._filled({**self._raw(row), **values})

    @functools.cached_property
    def _extra_eos(self) -> int:
        """1 where every answer of the user's ends with two end-of-sequence tokens (TRL before 1.0 adds one to the template's)."""
        eos, chosen = self.tokenizer.eos_token_id, _pairs(self.columns)[1]
        return int(all(list(e[chosen])[-2:] == [eos, eos] for e in self.examples.sample))

    def _filled(self, known: Example) -> Example:
        """`known` in the trainer's columns; a column that nothing is known of stays empty."""
        return {c: known.get(c) for c in self.columns}

    def padded(self, row: Row) -> Example:
        """A new row in the trainer's columns, padded where the user's are."""
        made = self.layout.join([self.example(row)], ())[0]
        assert not isinstance(made, int)
        return made

    def mixed(self, mixture: Mixture) -> tuple[Any, list[int | Example], int | None]:
        """(the data set to train on, its rows as indexes of the user's and new ones, its tokens)."""
        added = [self.example(row) for row in mixture.added]
        if self.cut:
            raise ResafeError(f"{self.cut} of {len(added)} safety rows keep no answer within the trainer's {self.max_length} tokens a row: raise max_length.")
        own = iter(added)
        documents = [e if isinstance(e, int) else next(own) for e in mixture.entries]
        entries = self.layout.join(documents, self.examples)
        if "input_ids" not in self.columns:
            return _like(self.dataset, entries), entries, None
        tokens = sum(self.examples.widths[e] if isinstance(e, int) else len(e["input_ids"]) for e in entries)
        return _like(self.dataset, entries), entries, tokens


def refuse_unmixable(trainer: Any) -> None:
    """Raise ResafeError for trainers whose data no safety row can stand among."""
    kinds = [c.__name__ for c in type(trainer).__mro__]
    if found := next((k for k in kinds if k in REFUSED), None):
        raise ResafeError(f"{found} trains on rewards or labels, which refusals cannot be mixed into: mix the SFT or DPO stage before it.")
    config = getattr(trainer.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ResafeError("encoder-decoder models are not supported: rows are mixed for causal language models.")
    model = trainer.model
    getter = getattr(model, "get_base_model", None)  # PEFT
    name = type(getter() if callable(getter) else model).__name__
    if "Classification" in name or "QuestionAnswering" in name or "MaskedLM" in name:
        raise ResafeError(f"{name} does not write answers, so refusals cannot be mixed into its training data.")


def read_data(trainer: Any) -> TrainData:
    """The trainer's map-style training data. Raises ResafeError for what cannot be mixed into."""
    refuse_unmixable(trainer)
    dataset = trainer.train_dataset
    if dataset is None or len(dataset) == 0:
        raise ResafeError("the trainer has no training rows, so there is nothing to mix into.")
    return _described(trainer, dataset, Examples(dataset))


def describe_stream(trainer: Any, sample: Sequence[Any]) -> TrainData:
    """The same from the first rows of a stream. Raises ResafeError for preference data and for packed rows."""
    refuse_unmixable(trainer)
    data = _described(trainer, None, Examples(sample))
    if data.preference or not isinstance(data.layout, (_pack.Plain, _pack.Padded)) or data.layout.rebuilds:
        raise ResafeError("a stream of preference rows or of packed rows cannot be mixed into: make it a map-style Dataset.")
    return data


def _described(trainer: Any, dataset: Any, examples: Examples) -> TrainData:
    sample = examples.sample
    columns = tuple(sample[0])
    if images := IMAGES & {c for c in columns if any(e[c] is not None for e in sample)}:
        raise ResafeError(f"rows with {', '.join(sorted(images))} are not supported: text-only safety rows do not fit a vision trainer's collator.")
    if any(c.startswith("ref_") and c.endswith("logps") for c in columns):
        raise ResafeError("reference log-probabilities were precomputed without the safety rows: set precompute_ref_log_probs=False.")
    tokenizer = _encode.own_tokenizer(trainer)
    shape, pairs, tokenised = shape_of(sample[0]), _pairs(columns), "input_ids" in columns
    if not (pairs or tokenised or shape):
        raise ResafeError(f"the training rows hold {', '.join(columns)}: neither input_ids nor a conversation.")
    layout = _pack.layout_of(trainer, examples, columns, tokenizer) if tokenised else _pack.Plain()
    documents = Examples(layout.split(examples)) if layout.rebuilds else examples
    raw = None if layout.rebuilds else shape
    probes = documents.sample if tokenised or pairs in PREFERENCE else []
    encoder = _encode.find_encoder(trainer, tokenizer, raw, probes)
    data = TrainData(
        dataset, documents, _rows(documents, raw, tokenizer), raw, columns, layout, encoder, tokenizer, layout.limit or _max_length(trainer),
        _encode.label_policy(documents.sample) if "labels" in columns else "all",
    )  # fmt: skip
    if raw and probes and not _encode.reproduces(encoder, probes[0], raw):
        data.notes.append(OTHER_TEMPLATE)
    if tokenised and raw is None and encoder.name == _encode.TEMPLATE and type(layout) is not _pack.Wrapped:
        data.notes += [] if _encode.opens_like(tokenizer, documents.sample) else [OTHER_TEMPLATE]
    return data


def safety_for_preferences(run: Run) -> None:
    """Give the run's safety rows an answer to reject each."""
    refusals = list(run.refusals)
    run.refusals = [with_rejected(r, refusals) for r in run.refusals]
    run.contrast = [with_rejected({**r, "kind": "contrast"}, refusals) for r in run.contrast]


def _max_length(trainer: Any) -> int | None:
    """Tokens per row: the trainer's own limit, else what the model has positions for."""
    for name in ("max_length", "max_seq_length", "cutoff_len"):
        if isinstance(value := getattr(trainer.args, name, None), int):
            return value
    value = getattr(getattr(trainer.model, "config", None), "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def _rows(examples: Examples, shape: Shape | None, tokenizer: Any) -> list[Row]:
    """Rows as conversations: from their raw columns, else decoded, what is not trained on being the prompt."""
    if shape is not None:
        return [_read(i, e, shape, tokenizer.eos_token) for i, e in enumerate(examples.select(shape.keys))]
    names = _pairs(tuple(examples.sample[0]))
    rows: list[Row] = []
    for start in range(0, len(examples), BATCH):
        parts = [_parts(e, names) for e in examples[start : start + BATCH]]
        texts = [tokenizer.batch_decode(column, skip_special_tokens=True) for column in zip(*parts)]
        for prompt, good, *bad in zip(*texts):
            row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]}
            rows.append({**row, "rejected": bad[0]} if bad else row)
    return rows


def _parts(example: Example, names: tuple[str, ...]) -> tuple[list[int], ...]:
    """(prompt, answer) or (prompt, chosen, rejected) as token ids."""
    if names == PAIRWISE:
        start = _first_trained(example["chosen_labels"])
        return example["chosen_input_ids"][:start], example["chosen_input_ids"][start:], example["rejected_input_ids"][start:]
    if names:
        return tuple(example[k] for k in names)
    ids = _encode.unpadded(example, "input_ids")
    start = _first_trained(_encode.unpadded(example, "labels") if "labels" in example else ids)
    return ids[:start], ids[start:]


def _first_trained(labels: Sequence[int]) -> int:
    """Where the first token stands that is trained on."""
    return next((i for i, v in enumerate(labels) if v != _encode.IGNORED), 0)


def _pairs(columns: Sequence[str]) -> tuple[str, ...]:
    """The tokenised preference columns among `columns`, in the notation that they are in; () if there are none."""
    return next((names for names in (*PREFERENCE, PAIRWISE) if set(names) <= set(columns)), ())


def _read(index: int, example: Example, shape: Shape, eos: str) -> Row:
    try:
        return _as_written(read(example, shape), eos)
    except ResafeError as error:
        raise ResafeError(f"training row {index}: {error}") from None


def _as_written(row: Row, eos: str) -> Row:
    """`row` without the end-of-sequence text that TRL puts behind the answers of plain-text rows: as it stands in the user's file."""
    *head, last = row["messages"]
    bare = {**row, "messages": [*head, {**last, "content": last["content"].removesuffix(eos)}]}
    return {**bare, "rejected": row["rejected"].removesuffix(eos)} if "rejected" in row else bare


def _like(dataset: Any, entries: Sequence[int | Example]) -> Any:
    """A data set of the user's rows (by index) and new ones, of the user's type, features and format."""
    from datasets import Dataset, concatenate_datasets

    if not isinstance(dataset, Dataset):
        return _mapped(dataset, entries)
    added = [e for e in entries if not isinstance(e, int)]
    bare = dataset.with_format(None)
    if len(added) == len(entries):
        both, order = Dataset.from_list(added, features=dataset.features), list(range(len(added)))
    else:
        both = concatenate_datasets([bare, Dataset.from_list(added, features=dataset.features)]) if added else bare
        place = iter(range(len(bare), len(bare) + len(added)))
        order = [e if isinstance(e, int) else next(place) for e in entries]
    both = both.select(order)
    return both.with_format(**_format(dataset))


def _format(dataset: Any) -> dict[str, Any]:
    found = dataset.format
    return {"type": found["type"], "columns": found["columns"], "output_all_columns": found["output_all_columns"], **found["format_kwargs"]}


def _mapped(dataset: Any, entries: Sequence[int | Example]) -> Any:
    """The same for a torch Dataset of any kind."""
    import torch

    sample = dataset[0]

    def typed(example: Example) -> Example:
        if missing := [k for k, v in example.items() if v is None]:
            raise ResafeError(f"rows carry {', '.join(missing)}, which a safety row has no value for; mix the data file instead (resafe mix).")
        return {k: torch.tensor(v, dtype=sample[k].dtype) if isinstance(sample[k], torch.Tensor) else v for k, v in example.items()}

    class Mixed(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.items = [e if isinstance(e, int) else typed(e) for e in entries]

        def __len__(self) -> int:
            return len(self.items)

        def __getitem__(self, index: int | str) -> Any:
            if isinstance(index, str):  # a whole column, as ms-swift asks for lengths
                column = dataset[index]
                return [column[item] if isinstance(item, int) else item[index] for item in self.items]
            item = self.items[index]
            return dataset[item] if isinstance(item, int) else item

    return Mixed()


def mixed_stream(dataset: Any, mixture: Mixture, example: Callable[[Row], Example]) -> Any:
    """An IterableDataset that reads the user's stream and puts the safety rows in their places, over and over."""
    from datasets import IterableDataset
    from torch.utils.data import IterableDataset as TorchStream

    added = [e if isinstance(e, int) else example(e) for e in mixture.entries]

    def rows() -> Iterator[Example]:
        own = iter(dataset)
        while True:
            for entry in added:
                if isinstance(entry, int):
                    try:
                        yield next(own)
                    except StopIteration:
                        return
                else:
                    yield entry

    if isinstance(dataset, IterableDataset):
        kind = getattr(getattr(dataset, "_formatting", None), "format_type", None)
        dataset = dataset.with_format(None)
        mixed = IterableDataset.from_generator(rows, features=dataset.features)
        return mixed.with_format(kind) if kind else mixed

    class Mixed(TorchStream):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Example]:
            return rows()

    return Mixed()

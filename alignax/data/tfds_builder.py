"""The TFDS builder class of prepared records: one row per record, stored as array_record, without TensorFlow.

Columns that TFDS can read without TensorFlow are flat or a sequence of scalars, so the nested parts of a record (the
messages of several completions, tool descriptions) stand in `record`, its canonical JSON form, which is what comes
back; the other columns are there for other readers and for filters:

    id, file: text. line: int64.
    prompt: text; a dialogue as the JSON list of its messages.  completions: sequence of text, likewise.
    dialogue: bool, whether any of these is a dialogue.
    scores, labels: sequence of float32 (what a row can hold), empty where the data has none.
    margin: float32, NaN where the data has none.
    record: text, the JSON form of the whole record; numbers are exact here.

Shards hold the records in order; which record stands in which shard is decided by the caller.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignax.data.records import Content, Record, from_json, plain, to_json
from alignax.types import ConfigError

NAME, VERSION = "preferences", "1.0.0"


def require_tfds():
    """The module `tensorflow_datasets`; ConfigError naming the extra where it or array_record is not installed."""
    try:
        import array_record.python.array_record_module  # noqa: F401  (TFDS imports it late, and says less)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ConfigError(f"prepared datasets need tensorflow-datasets, array_record and grain ({error}); install "
                          "them with: pip install 'alignax[data]'") from error
    return tfds


def columns(record: Record) -> dict[str, Any]:
    """The row of one record (see the module)."""
    return {"id": record.id, "file": record.file, "line": record.line, "prompt": content_text(record.prompt),
            "completions": [content_text(part) for part in record.completions], "dialogue": record.is_chat,
            "scores": list(record.scores or ()), "labels": list(record.labels or ()),
            "margin": math.nan if record.margin is None else record.margin, "record": _dump(to_json(record))}


def content_text(content: Content) -> str:
    """A prompt or a completion as one text: itself, or the JSON list of its messages."""
    return content if isinstance(content, str) else _dump(plain(content))


def record_of(row: Mapping[str, Any]) -> Record:
    """The record of a row as `as_data_source` gives it: the inverse of `columns`."""
    return from_json(json.loads(row["record"]), row["file"].decode("utf-8"), int(row["line"]))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)


@functools.cache
def builder_class() -> type:
    """The `tfds.core.ShardBasedBuilder` of prepared records; ConfigError where TFDS is not installed.

    Preferences(shards, done, advance, data_dir=...): shards: split -> lists of records, one list per shard. done: a
    folder that keeps finished shards until the whole dataset is in place, so that a run that was killed goes on
    behind them. advance: called once per record.
    """
    tfds = require_tfds()
    import numpy as np
    from tensorflow_datasets.proto import tf_example_pb2

    example_type = tf_example_pb2.Example

    class Writer(tfds.core.dataset_builder.writer_lib.ExampleWriter):
        """Writes a shard under another name first, and takes a finished one of an earlier run as it is."""

        def __init__(self, file_format, done: Path):
            super().__init__(file_format=file_format)
            self._done = done

        def write(self, path, examples: Iterable) -> None:
            kept = self._done / Path(path).name
            if not kept.exists():
                partial = kept.with_name(kept.name + ".tmp")
                # A row is a protobuf map, whose order TFDS leaves to the process: equal rows shall be equal bytes.
                super().write(partial, ((key, example_type.FromString(row).SerializeToString(deterministic=True))
                                        for key, row in examples))
                os.replace(partial, kept)
            try:
                os.link(kept, path)
            except OSError:  # a file system without hard links
                shutil.copyfile(kept, path)

    class Preferences(tfds.core.ShardBasedBuilder):
        """Preference records in the order given."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        url_infos: dict = {}  # nothing is downloaded; TFDS would look for a file of checksums beside this module

        def __init__(self, shards: Mapping[str, Sequence[Sequence[Record]]], done: Path,
                     advance: Callable[[], None], **kwargs):
            self._shards, self._done, self._advance = shards, done, advance
            super().__init__(file_format="array_record", **kwargs)

        def _info(self):
            text, many = tfds.features.Text, tfds.features.Sequence
            features = {"id": text(), "file": text(), "line": tfds.features.Scalar(np.int64), "prompt": text(),
                        "completions": many(text()), "dialogue": tfds.features.Scalar(np.bool_),
                        "scores": many(np.float32), "labels": many(np.float32),
                        "margin": tfds.features.Scalar(np.float32), "record": text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _shard_iterators_per_split(self, dl_manager):
            del dl_manager
            return {split: [functools.partial(_rows, shard, self._advance) for shard in shards]
                    for split, shards in self._shards.items()}

        def _example_writer(self):
            return Writer(self.info.file_format, self._done)

        def _log_download_bytes(self):
            """Nothing is downloaded; TFDS would write to the console here and below."""

        def _log_download_done(self):
            """See above."""

    return Preferences


def _rows(shard: Sequence[Record], advance: Callable[[], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(key, row) of a shard's records. TFDS counts what this yields, also for a shard that needs no writing."""
    for index, record in enumerate(shard):
        yield index, columns(record)
        advance()
